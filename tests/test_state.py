"""A bounded model keeps the state of the module it was made from: parameters, modes, buffers, copies and moves."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor, nn

import lbi_compile
from lbi_compile import transform
from tests import cases
from tests.models import BatchNormMLP, CausalTransformer
from tests.small_models import close, gradients, mlp, same, seeded, small
from tests.untouched import differences, snapshot

# -- parameters and state


@pytest.mark.parametrize("name", ["mlp", "transformer", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_weights_of_the_model_come_back(name):
    model, x = cases.MODELS[name](depth=3)
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    bounded = transform(model, x, regions=3, r=4)
    with torch.no_grad():
        for parameter in bounded.parameters():
            parameter.add_(1)
    left = bounded.load_state_dict(weights, strict=False)
    assert left.unexpected_keys == []
    assert left.missing_keys
    assert all(key.startswith("lbi.") for key in left.missing_keys)
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


def test_state_of_a_bounded_model_comes_back():
    model, x, bounded = small()
    state = copy.deepcopy(bounded.state_dict())
    assert [key for key in state if not key.startswith("lbi.")] == list(model.state_dict())
    out = bounded(x)
    other = transform(mlp(), x, regions=3, r=4, seed=1)
    assert not torch.equal(other(x), out)
    other.load_state_dict(state, strict=True)
    assert torch.equal(other(x), out)


def test_parameters_and_buffers_are_the_models_own():
    model = BatchNormMLP(5, width=8, depth=3)
    names = [name for name, _ in model.named_parameters()]
    bounded = transform(model, torch.randn(5, 5), regions=3, r=4)
    own = dict(bounded.named_parameters())
    assert [name for name in own if not name.startswith("lbi.")] == names
    assert all(own[name] is parameter for name, parameter in model.named_parameters())
    assert all(dict(bounded.named_buffers())[name] is buffer for name, buffer in model.named_buffers())
    assert bounded.blocks is model.blocks
    assert bounded.source is model
    assert [name for name, _ in model.named_parameters()] == names
    assert sum(p.numel() for p in bounded.lbi.parameters()) == bounded.lbi.parameter_count > 0


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW])
def test_optimizers_train_model_and_interface(make):
    model, x, bounded = small()
    before = {name: parameter.detach().clone() for name, parameter in bounded.named_parameters()}
    optimizer, target = make(bounded.parameters(), lr=0.02), torch.randn(5, 3)
    losses = []
    for _ in range(30):
        loss = nn.functional.mse_loss(bounded(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    assert all(not torch.equal(parameter, before[name]) for name, parameter in bounded.named_parameters())
    assert torch.equal(model.stem.weight, bounded.stem.weight)


def test_gradients_accumulate_until_they_are_zeroed():
    _, x, bounded = small()
    once = gradients(bounded, bounded(x))
    bounded(x).square().sum().backward()
    assert all(torch.equal(p.grad, 2 * once[name]) for name, p in bounded.named_parameters())
    bounded.zero_grad()
    assert all(p.grad is None for p in bounded.parameters())


def test_tied_weights_stay_tied():
    model = CausalTransformer(vocabulary=11, length=16, width=8, heads=2, depth=2)
    tokens = torch.randint(11, (2, 8))
    bounded = transform(model, tokens, regions=2, r=4)
    again = transform(CausalTransformer(vocabulary=11, length=16, width=8, heads=2, depth=2), tokens, regions=2, r=4)
    again.load_state_dict(bounded.state_dict())
    for tied in (bounded, copy.deepcopy(bounded), pickle.loads(pickle.dumps(bounded)), again, bounded.double()):
        assert tied.head.weight is tied.token.weight
        assert "head.weight" not in dict(tied.named_parameters())
        close(gradients(tied.double(), tied(tokens)), gradients(bounded.double(), bounded(tokens)))
    # both uses are in the gradient: one end alone gives another
    with torch.no_grad():
        untied = copy.deepcopy(bounded)
    untied.source.head.weight = nn.Parameter(untied.token.weight.detach().clone())
    parts = gradients(untied, untied(tokens))
    whole = gradients(bounded, bounded(tokens))["token.weight"]
    torch.testing.assert_close(parts["token.weight"] + parts["head.weight"], whole, rtol=1e-9, atol=1e-12)


def test_parameters_frozen_before_transform():
    model, x = mlp().double(), torch.randn(5, 5, dtype=torch.float64)
    model.stem.requires_grad_(False)
    model.blocks[0].requires_grad_(False)
    bounded = transform(model, x, regions=3, r=4)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {name for name, p in bounded.named_parameters() if not p.requires_grad}
    found = gradients(bounded, bounded(x))
    assert {name for name, gradient in found.items() if gradient is None} == frozen
    with bounded.with_engine("autograd"):
        close(found, gradients(bounded, bounded(x)))
    model.requires_grad_(True)
    assert all(gradient is not None for gradient in gradients(bounded, bounded(x)).values())


def frozen_and_thawed(engine: str) -> None:
    model, x = mlp().double(), torch.randn(5, 5, dtype=torch.float64)
    bounded = transform(model, x, regions=3, r=4, backward=engine)
    parts: list[list[nn.Module]] = [[], [model.stem, *model.blocks[:2], bounded.lbi], [model.blocks[2], model.head], []]
    for part in parts:
        for module in part:
            module.requires_grad_(False)
        out = bounded(x)
        assert bounded.engine.name == engine
        found = gradients(bounded, out)
        assert {n for n, g in found.items() if g is None} == {
            n for n, p in bounded.named_parameters() if not p.requires_grad
        }
        with bounded.with_engine("autograd"):
            close(found, gradients(bounded, bounded(x)))
        bounded.requires_grad_(True)


def test_parameters_frozen_and_thawed_after_transform():
    frozen_and_thawed("chain")


@pytest.mark.slow
def test_parameters_frozen_and_thawed_under_the_scan():
    frozen_and_thawed("scan")


# -- modes and buffers


def test_train_and_eval_switch_dropout():
    model, x, bounded = small(dropout=0.5)
    assert bounded.training
    assert not torch.equal(bounded(x), bounded(x))
    bounded.eval()
    assert not any(module.training for module in model.children())
    assert torch.equal(bounded(x), bounded(x))
    bounded.train()
    assert all(module.training for module in model.blocks.modules())
    assert torch.equal(seeded(lambda: bounded(x)), seeded(lambda: bounded(x)))
    assert not torch.equal(seeded(lambda: bounded(x)), seeded(lambda: bounded(x), 2))
    assert len(bounded.programs) == 2  # one for each mode, however often it changes


@pytest.mark.parametrize("regions", [1, 3])
def test_one_submodule_in_eval_mode(regions):
    model, x = mlp(dropout=0.5), torch.randn(5, 5)
    bounded = transform(model, x, regions=regions, interface="identity")
    seeded(lambda: bounded(x))
    for frozen in (model.blocks[1], model.blocks[2].branch[2]):
        expected_before = seeded(lambda: model(x))
        assert torch.equal(seeded(lambda: bounded(x)), expected_before)
        frozen.eval()
        expected = seeded(lambda: model(x))
        assert not torch.equal(expected, expected_before)
        assert torch.equal(seeded(lambda: bounded(x)), expected)
    model.train()
    (before,) = bounded.programs
    assert torch.equal(seeded(lambda: bounded(x)), seeded(lambda: model(x)))
    (again,) = bounded.programs
    assert again is not before
    frozen.eval()
    model.blocks[1].eval()
    seeded(lambda: bounded(x))
    assert bounded.programs == (before,)  # a combination that was captured is not captured again


@pytest.mark.parametrize("frozen", [False, True])
def test_batch_norm_statistics_are_the_models(frozen):
    torch.manual_seed(0)
    model, x = BatchNormMLP(5, width=8, depth=3), torch.randn(5, 5)
    twin = copy.deepcopy(model)
    bounded = transform(twin, x, regions=3, interface="identity", backward="chain")
    assert differences({**snapshot(model), "parameters": snapshot(twin)["parameters"]}, twin) == ["buffers"]
    for step in range(3):
        for module in (model, twin):
            module.blocks[1].norm.train(not (frozen and step == 1))
        batch = torch.randn(4 + step, 5)
        bounded(batch).sum().backward()
        model(batch).sum().backward()
        for (name, buffer), expected in zip(twin.named_buffers(), model.buffers(), strict=True):
            assert torch.equal(buffer, expected), (step, name)
    assert model.blocks[1].norm.num_batches_tracked == 3 - frozen


@pytest.mark.parametrize(("kind", "interface"), [("stem", "chunked"), ("blocks", "token")])
def test_transform_leaves_batch_norm_statistics_alone(kind, interface):
    """Also where the passes run the model on real numbers to measure what depends on what."""
    model = CausalTransformer(vocabulary=11, length=16, width=8, heads=2, depth=2)

    class PerPosition(nn.BatchNorm1d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.transpose(1, 2)).transpose(1, 2)

    if kind == "stem":
        model.dropout = PerPosition(8)
    else:
        model.blocks[1].norm_mlp = PerPosition(8)
    tokens = torch.randint(11, (2, 8))
    before = snapshot(model)
    bounded = transform(model, tokens, regions=2, r=4, interface=interface, allow_leak=True)
    assert differences(before, model) == []
    bounded(tokens)
    assert differences(before, model) == ["state"]


@pytest.mark.parametrize("mode", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_verify_leaves_the_bounded_model_alone(mode):
    bounded = transform(BatchNormMLP(5, width=8, depth=3, dropout=0.1), torch.randn(5, 5), regions=3, r=4).train(mode)
    x = torch.randn(5, 5)
    before = snapshot(bounded)
    report = lbi_compile.verify(bounded, x)
    assert report.ok, report
    assert report.batch_independent is not mode
    assert differences(before, bounded) == []


# -- copies and moves


def test_a_deep_copy_trains_by_itself():
    model, x, bounded = small()
    bounded(x)
    twin = copy.deepcopy(bounded)
    out = bounded(x)
    assert torch.equal(twin(x), out)
    assert twin.plan == bounded.plan
    assert not {id(p) for p in twin.parameters()} & {id(p) for p in bounded.parameters()}
    assert twin.source is not model
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(0.1)
    assert torch.equal(bounded(x), out)
    changed = twin(x)
    assert not torch.equal(changed, out)
    expected = transform(copy.deepcopy(twin.source), x, regions=3, r=4)
    expected.load_state_dict(twin.state_dict())
    assert torch.equal(expected(x), changed)
    assert same(gradients(expected, expected(x)), gradients(twin, twin(x)))
    assert all(p.grad is None for p in bounded.parameters())


def test_a_deep_copy_after_a_compiled_scan_runs_its_own_weights():
    _, x, bounded = small(backward="scan")
    out = bounded(x)
    out.div_(2)  # as a result of a model may be used
    twin = copy.deepcopy(bounded)
    with torch.no_grad():
        for parameter in bounded.parameters():
            parameter.zero_()
    torch.testing.assert_close(twin(x) / 2, out)
    assert twin.engine.jacobians == 2
    assert not bounded(x).any()
    found = gradients(twin, twin(x))
    with twin.with_engine("autograd"):
        torch.testing.assert_close(found, gradients(twin, twin(x)))
    assert bounded.stem.weight.grad is None


@pytest.mark.parametrize(
    ("how", "name"), [("pickle", "mlp"), ("torch.save", "vit"), pytest.param("pickle", "gpt2", marks=pytest.mark.slow)]
)
def test_a_bounded_model_survives_pickling(how, name):
    model, x = cases.MODELS[name](depth=3)
    bounded = transform(model.eval(), x, regions=3, r=4)
    out = cases.call(bounded, x)
    if how == "pickle":
        again = pickle.loads(pickle.dumps(bounded))
    else:
        file = io.BytesIO()
        torch.save(bounded, file)
        file.seek(0)
        again = torch.load(file, weights_only=False)
    assert again.plan == bounded.plan
    assert torch.equal(cases.call(again, x), out)
    assert all(p is dict(again.named_parameters())[n] for n, p in again.source.named_parameters())


@pytest.mark.slow
def test_a_bounded_model_survives_pickling_after_a_compiled_scan():
    _, x, bounded = small(backward="scan")
    out = bounded(x)
    again = pickle.loads(pickle.dumps(bounded))
    assert torch.equal(again(x), out)
    close(gradients(again, again(x)), gradients(bounded, bounded(x)))


def test_state_through_a_file(tmp_path):
    _, x, bounded = small()
    torch.save(bounded.state_dict(), tmp_path / "state.pt")
    other = transform(mlp(), x, regions=3, r=4, seed=1)
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(other(x), bounded(x))


@pytest.mark.parametrize("move", [lambda m: m.double(), lambda m: m.to(torch.bfloat16)], ids=["float64", "bfloat16"])
def test_another_dtype_after_transform(move):
    model, x, bounded = small()
    single = bounded(x)
    parameters = dict(bounded.named_parameters())
    assert move(bounded) is bounded
    dtype = bounded.stem.weight.dtype
    assert {p.dtype for p in bounded.parameters()} == {dtype}
    assert all(parameters[name] is p for name, p in bounded.named_parameters())
    assert all(parameters[name] is p for name, p in model.named_parameters())
    out = bounded(x.to(dtype))
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), single, rtol=0.05, atol=0.05)
    assert all(g.dtype == dtype for g in gradients(bounded, out).values())
    assert torch.equal(bounded.float()(x.float()).detach(), bounded(x).detach())


def test_baked_in_constants_move_too():
    class Scaled(nn.Module):
        """Makes a tensor in its forward, which the exporter lifts into a constant."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x * torch.tensor([1.0, 2, 3, 4, 5], dtype=x.dtype))

    model, x = Scaled(), torch.randn(5, 5)
    bounded = transform(model, x, regions=1)
    assert torch.equal(bounded(x), model(x))
    wide = bounded.double()(x.double())
    assert wide.dtype == torch.float64
    assert torch.equal(wide, model(x.double()))
