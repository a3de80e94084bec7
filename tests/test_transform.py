"""``transform`` and ``plan``: the same cut however it is asked for, and nothing but the cut."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import lbi_compile
from lbi_compile import Plan, transform
from tests import cases
from tests.models import PostNormMLP, ResidualMLP, VisionTransformer
from tests.untouched import differences, snapshot


def mlp(**options) -> ResidualMLP:
    return ResidualMLP(5, width=8, depth=5, classes=3, **options)


# -- plan


@pytest.mark.parametrize("name", ["mlp", *(pytest.param(name, marks=pytest.mark.slow) for name in ("vit", "gpt2"))])
def test_plan_is_the_plan_of_transform_and_inserts_nothing(name):
    model, x = cases.MODELS[name]()
    before = snapshot(model)
    plan = lbi_compile.plan(model, x, regions=3, r=4)
    assert differences(before, model) == []
    bounded = transform(model, x, regions=3, r=4)
    assert differences(before, model) == []
    assert bounded.plan == plan
    assert bounded.plan.hash == plan.hash
    assert Plan.from_json(plan.to_json()) == plan
    assert len(plan.regions) == len(bounded.regions) == 3
    assert [record.name for record in plan.passes][:3] == ["liveness", "costs", "separators"]


def test_equal_models_have_equal_plans():
    x = torch.randn(4, 5)
    first = lbi_compile.plan(mlp(), x, regions=3, r=4)
    assert lbi_compile.plan(mlp(), x, regions=3, r=4).hash == first.hash
    changes = [{"regions": 2}, {"r": 8}, {"interface": "identity"}, {"readout": "last"}]
    hashes = {lbi_compile.plan(mlp(), x, **{"regions": 3, "r": 4, **change}).hash for change in changes}
    assert len(hashes | {first.hash}) == 5


def test_every_decision_has_a_reason():
    plan = lbi_compile.plan(mlp(), torch.randn(4, 5), regions=3, r=4)
    about = {decision.about: decision for decision in plan.why}
    assert {"dynamic axes", "canvas", "boundaries", "head", "interface", "readout"} <= about.keys()
    assert all(decision.choice and decision.why for decision in plan.why)
    assert about["interface"].choice == plan.interface == "pooled"
    assert about["readout"].choice == plan.readout == "sum"
    post = lbi_compile.plan(PostNormMLP(5, width=8, depth=5, classes=3), torch.randn(4, 5), regions=3, r=4)
    assert post.readout == "last"
    assert "not proven" in next(d.why for d in post.why if d.about == "readout")


# -- how regions are asked for


def test_regions_by_module_names():
    model, x = mlp(), torch.randn(4, 5)
    bounded = transform(model, x, regions=["blocks.1", "blocks.4"], r=4)
    assert [region.part.modules for region in bounded.plan.regions] == [
        ("blocks.0",),
        ("blocks.1", "blocks.2", "blocks.3"),
        ("blocks.4",),
    ]
    assert [point.name for point in bounded.plan.boundaries] == ["blocks.0:add[0]", "blocks.3:add[0]"]
    assert transform(model, x, regions=("blocks.1", "blocks.4"), r=4).plan == bounded.plan
    assert transform(model, x, regions=["blocks.4", "blocks.1"], r=4).plan.boundaries == bounded.plan.boundaries


def test_regions_by_a_plan():
    model, x = mlp(), torch.randn(4, 5)
    plan = lbi_compile.plan(model, x, regions=["blocks.1", "blocks.4"], r=6, readout="last")
    first = transform(model, x, regions=plan)
    again = transform(copy.deepcopy(model), x, regions=Plan.from_json(plan.to_json()))
    assert first.plan == again.plan == plan
    assert torch.equal(first(x), again(x))
    by_name = transform(model, x, regions=["blocks.1", "blocks.4"], r=6, readout="last")
    assert torch.equal(first(x), by_name(x))
    assert [m.shape[-1] for m in first.forward_regions(x)[1].m] == [6, 6, 6]


# -- interface parameters


def test_seeds():
    model, x = mlp(), torch.randn(4, 5)

    def interface(**options) -> dict[str, torch.Tensor]:
        before = torch.get_rng_state()
        found = transform(model, x, regions=3, r=4, **options).lbi.state_dict()
        assert torch.equal(torch.get_rng_state(), before)
        torch.rand(3)  # whatever state the caller's generator is in
        return found

    first, again, other = interface(), interface(seed=0), interface(seed=1)
    assert first.keys() == again.keys() == other.keys()
    assert all(torch.equal(first[key], again[key]) for key in first)
    weights = [key for key in first if "norm" not in key and key.endswith("weight")]
    assert weights
    assert not any(torch.equal(first[key], other[key]) for key in weights)


@pytest.mark.parametrize(
    ("interface", "readout"),
    [("pooled", "sum"), ("pooled", "last"), ("self", "sum"), ("identity", "last"), ("zero", "sum")],
)
def test_every_parameter_gets_a_gradient(interface, readout):
    model, x = mlp(), torch.randn(4, 5)
    bounded = transform(model, x, regions=3, r=4, interface=interface, readout=readout)
    bounded(x).square().sum().backward()
    assert [name for name, p in bounded.named_parameters() if p.grad is None or not p.grad.any()] == []


# -- one region is the model


@pytest.mark.parametrize(
    ("name", "training"),
    [
        *(("mlp", training) for training in (True, False)),
        *((name, True) for name in ("transformer", "vit", "gpt2")),
        *(pytest.param(name, False, marks=pytest.mark.slow) for name in ("transformer", "vit", "gpt2")),
    ],
)
def test_one_region_is_the_model_bit_for_bit(name, training):
    model, x = cases.MODELS[name](depth=2)
    model.train(training)
    bounded = transform(model, x, regions=1)
    assert bounded.plan.interface == "none"
    assert list(bounded.lbi.parameters()) == []
    assert bounded.state_dict().keys() == model.state_dict().keys()
    batch = cases.with_batch(x, 5)
    results = []
    for module in (model, bounded):
        model.zero_grad()
        torch.manual_seed(3)
        out = cases.call(module, batch)
        out.square().sum().backward()
        state = torch.get_rng_state()
        results.append((out, state, [p.grad.clone() for p in module.parameters()]))
    (out, state, gradients), (got, got_state, got_gradients) = results
    assert torch.equal(got, out)
    assert torch.equal(got_state, state)
    assert all(torch.equal(a, b) for a, b in zip(got_gradients, gradients, strict=True))
    assert not training or not torch.equal(cases.call(bounded, batch), out)  # dropout was on


# -- taps


def test_taps_of_a_pooled_model():
    model, x = mlp(), torch.randn(4, 5)
    bounded = transform(model, x, regions=3, r=6)
    out, taps = bounded.forward_regions(x)
    assert torch.equal(out, bounded(x))
    assert [h.shape for h in taps.h] == [(4, 8)] * 3
    assert [m.shape for m in taps.m] == [(4, 6)] * 3
    (sum(m.square().sum() for m in taps.m) + sum(h.square().sum() for h in taps.h)).backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if not name.startswith(("norm", "head")))
    assert model.head.weight.grad is None


def test_taps_of_an_identity_model_are_the_models_own_values():
    model, x = mlp(), torch.randn(4, 5)
    bounded = transform(model, x, regions=["blocks.2", "blocks.4"], interface="identity")
    seen: list[torch.Tensor] = []
    _, taps = bounded.forward_regions(x)
    for k in (1, 3, 4):
        model.blocks[k].register_forward_hook(lambda module, args, out: seen.append(out))
    model(x)
    assert all(torch.equal(h, own) for h, own in zip(taps.h, seen, strict=True))


def test_taps_of_a_token_model():
    model, x = cases.transformer(depth=3)
    _, taps = transform(model.eval(), x, regions=3, r=4, interface="token").forward_regions(x)
    assert [h.shape for h in taps.h] == [(3, 9, 16)] * 3
    assert taps.m[0] is None
    assert [m.shape for m in taps.m[1:]] == [(3, 9, 4)] * 2


def test_taps_of_one_region():
    model, x = mlp(), torch.randn(4, 5)
    out, taps = transform(model, x, regions=1).forward_regions(x)
    assert torch.equal(out, model(x))
    assert [h.shape for h in taps.h] == [(4, 8)]
    assert taps.m == (None,)


def test_regions_are_modules_that_fetch_the_models_parameters():
    model, x = VisionTransformer(width=8, heads=2, depth=3), torch.randn(2, 1, 8, 8)
    bounded = transform(model, x, regions=3, r=4)
    assert [region.k for region in bounded.regions] == [0, 1, 2]
    own = [{name: id(p) for name, p in region.named_parameters()} for region in bounded.regions]
    held = {name: id(p) for name, p in model.named_parameters()}
    assert own == [{name: held[name] for name in held if name.startswith(f"blocks.{k}.")} for k in range(3)]
    calls: list[int] = []
    for region in bounded.regions:
        region.register_forward_hook(lambda module, args, out: calls.append(module.k))
    out = bounded(x)
    assert calls == [0, 1, 2]
    with torch.no_grad():
        model.blocks[1].mlp[2].weight.zero_()
    changed = bounded(x)
    assert not torch.equal(changed, out)
    weight = model.blocks[1].mlp[2].weight
    model.blocks[1].mlp[2].weight = nn.Parameter(torch.randn_like(weight))  # a new object is found too
    assert not torch.equal(bounded(x), changed)
