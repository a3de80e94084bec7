"""A bounded model behaves as the module it was made from: state, modes, copies, moves, arguments and gradients."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lbi_compile
from lbi_compile import BoundedModule, FutureLeakError, PlanError, transform
from tests import cases
from tests.models import BatchNormMLP, CausalTransformer, ResidualMLP
from tests.untouched import differences, snapshot


def mlp(**options: Any) -> ResidualMLP:
    return ResidualMLP(5, width=8, depth=3, classes=3, **options)


def small(*, regions: int = 3, **options: Any) -> tuple[ResidualMLP, Tensor, BoundedModule]:
    """A residual MLP, its input and its bounded model."""
    model, x = mlp(dropout=options.pop("dropout", 0.0)), torch.randn(5, 5)
    return model, x, transform(model, x, regions=regions, r=4, **options)


def seeded(call: Callable[[], Any], seed: int = 1) -> Any:
    torch.manual_seed(seed)
    return call()


def gradients(module: nn.Module, out: Tensor) -> dict[str, Tensor | None]:
    module.zero_grad()
    out.square().sum().backward()
    return {name: None if p.grad is None else p.grad.clone() for name, p in module.named_parameters()}


def same(a: dict[str, Tensor | None], b: dict[str, Tensor | None]) -> bool:
    """Bit-equal gradients under equal names."""
    assert a.keys() == b.keys()
    return all((p is None and q is None) or torch.equal(p, q) for p, q in zip(a.values(), b.values(), strict=True))


def close(a: dict[str, Tensor | None], b: dict[str, Tensor | None]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name] is None) == (b[name] is None), name
        if a[name] is not None:
            torch.testing.assert_close(a[name], b[name], rtol=1e-9, atol=1e-12, msg=lambda text, name=name: name + text)


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


# -- arguments and results


class Options(nn.Module):
    """Takes tensors, numbers, flags and nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = mlp()

    def forward(
        self, x: Tensor, shift: Tensor | None = None, scale: float | None = 2.0, *, flip: bool = False
    ) -> dict[str, Any]:
        if shift is not None:
            x = x + shift
        if scale is not None:
            x = x * scale
        out = self.inner(x)
        return {"out": -out if flip else out, "parts": (out, [x]), "scale": scale, "nothing": None}


def flat(result: Any) -> list[Any]:
    return torch.utils._pytree.tree_leaves(result)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scale": 0.5},
        {"scale": 3},
        {"scale": None},
        {"shift": None},
        {"shift": torch.linspace(-1, 1, 25).view(5, 5)},
        {"shift": torch.linspace(-1, 1, 5)},
        {"flip": True},
        {"flip": True, "shift": torch.ones(5, 5), "scale": -1.0},
    ],
    ids=lambda options: "-".join(f"{k}={list(v.shape) if isinstance(v, Tensor) else v}" for k, v in options.items()),
)
def test_arguments_that_are_not_the_example_ones(options):
    model, x = Options(), torch.randn(5, 5)
    bounded = transform(model, x, regions=3, interface="identity")
    got, expected = bounded(x, **options), model(x, **options)
    assert list(got) == list(expected)
    assert (got["scale"], got["nothing"], type(got["parts"])) == (expected["scale"], None, tuple)
    assert type(got["scale"]) is type(expected["scale"])
    assert torch.equal(got["out"], expected["out"])
    assert torch.equal(got["parts"][0], expected["parts"][0])
    assert torch.equal(got["parts"][1][0], expected["parts"][1][0])
    again = bounded(x, **options)
    assert torch.equal(again["out"], got["out"])
    assert len(bounded.programs) == (1 if options in ({}, {"shift": None}) else 2)


def test_positions_and_names_are_one_call():
    model, x, shift = Options(), torch.randn(5, 5), torch.randn(5, 5)
    bounded = transform(model, (x, shift), regions=2, r=4)
    out = bounded(x, shift)["out"]
    for got in (bounded(x, shift=shift), bounded(shift=shift, x=x), bounded(x=x, shift=shift)):
        assert torch.equal(got["out"], out)
    assert len(bounded.programs) == 1


def test_the_forms_of_example_inputs_make_one_plan():
    model, x, shift = Options(), torch.randn(5, 5), torch.randn(5, 5)
    forms = [(x, shift), [x, shift], {"x": x, "shift": shift}, {"shift": shift, "x": x}, ((x,), {"shift": shift})]
    made = [transform(model, form, regions=2, r=4) for form in forms]
    assert len({bounded.plan.hash for bounded in made}) == 1
    assert len({str(bounded.programs[0]) for bounded in made}) == 1
    assert lbi_compile.plan(model, x, regions=2, r=4) == lbi_compile.plan(model, (x,), regions=2, r=4)


def test_a_forward_with_nameless_arguments():
    class Summed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp()

        def forward(self, *parts: Tensor, factor: float = 1.0, **more: Tensor) -> Tensor:
            return self.inner(factor * sum(parts) + sum(2 * more[name] for name in more))

    model, x, y = Summed(), torch.randn(5, 5), torch.randn(5, 5)
    bounded = transform(model, (x, y), regions=3, interface="identity")
    for size in (5, 7):
        x, y = torch.randn(size, 5), torch.randn(size, 5)
        assert torch.equal(bounded(x, y), model(x, y))
    assert len(bounded.programs) == 1
    assert torch.equal(bounded(x), model(x))
    assert torch.equal(bounded(x, x, factor=0.5), model(x, x, factor=0.5))
    assert torch.equal(bounded(x, extra=y), model(x, extra=y))


def test_a_forward_with_positional_only_arguments():
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp()

        def forward(self, x: Tensor, /, y: Tensor) -> Tensor:
            return self.inner(x - y)

    model, x, y = Pair(), torch.randn(5, 5), torch.randn(5, 5)
    bounded = transform(model, (x, y), regions=3, interface="identity")
    x, y = torch.randn(7, 5), torch.randn(7, 5)
    assert torch.equal(bounded(x, y), model(x, y))
    assert torch.equal(bounded(x, y=y), model(x, y))


def test_two_lengths_that_are_equal_by_chance():
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp()

        def forward(self, x: Tensor, context: Tensor) -> Tensor:
            return self.inner(x + context.mean(1, keepdim=True))

    model = Reader()
    bounded = transform(model, (torch.randn(3, 4, 5), torch.randn(3, 4, 5)), regions=3, interface="identity")
    for batch, here, there in ((3, 4, 6), (2, 7, 4)):
        x, context = torch.randn(batch, here, 5), torch.randn(batch, there, 5)
        assert torch.equal(bounded(x, context), model(x, context))
    assert len(bounded.programs) == 1


def test_the_callers_tensors_get_no_marks():
    model, x = Options(), torch.randn(5, 5)
    shift = torch.randn(5)  # as long as the batch, by chance
    bounded = transform(model, (x, shift), regions=2, r=4)
    bounded(x, shift)
    assert vars(x) == vars(shift) == {}


def test_another_argument_may_not_move_the_boundaries():
    """The sums of this model stand at its top, so that one more of them would make each name mean the next one."""

    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Linear(5, 8)
            self.blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU()) for _ in range(4))
            self.head = nn.Linear(8, 3)

        def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
            x = self.stem(x)
            if shift is not None:
                x = x + shift
            for block in self.blocks:
                x = x + block(x)
            return self.head(x)

    model, x, shift = Flat(), torch.randn(5, 5), torch.randn(5, 8)
    bounded = transform(model, x, regions=4, interface="identity")
    assert [point.name for point in bounded.plan.boundaries] == [f"<model>:add[{k}]" for k in range(3)]
    with pytest.raises(PlanError, match=r"blocks\.0.* region 1 of this capture, but in region 0 of the plan"):
        bounded(x, shift)
    assert torch.equal(bounded(x), model(x))
    assert torch.equal(transform(model, (x, shift), regions=4, interface="identity")(x, shift), model(x, shift))


class OwnLoss(nn.Module):
    """Gives the last logits, or with targets all of them and the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = CausalTransformer(vocabulary=11, length=16, width=8, heads=2, depth=3)

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        logits = self.inner(tokens)
        if targets is None:
            return logits[:, -1:], None
        return logits, nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


@pytest.mark.parametrize("regions", [1, 3])
@pytest.mark.parametrize("targets", [True, False])
def test_a_model_with_its_own_loss(regions, targets):
    model, tokens = OwnLoss(), torch.randint(11, (2, 8))
    example = (tokens, tokens) if targets else tokens
    bounded = transform(model, example, regions=regions, interface="identity")
    for call in ((tokens,), (tokens, tokens)):
        (got, loss), (expected, expected_loss) = bounded(*call), model(*call)
        assert torch.equal(got, expected)
        assert (loss is None) if expected_loss is None else torch.equal(loss, expected_loss)


def test_a_leak_that_only_other_arguments_show():
    """Without targets only the last logit comes out, for which a pooled latent sees no later position."""
    model, tokens = OwnLoss(), torch.randint(11, (2, 8))
    bounded = transform(model, tokens, regions=3, r=4)
    assert bounded.plan.interface == "pooled"
    for _ in range(2):
        with pytest.raises(FutureLeakError, match="'pooled'"):
            bounded(tokens, tokens)
    assert transform(model, (tokens, tokens), regions=3, r=4).plan.interface == "token"
    allowed = transform(model, tokens, regions=3, r=4, allow_leak=True)
    assert allowed(tokens, tokens)[0].shape == (2, 8, 11)


def test_nested_inputs():
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp()

        def forward(self, batch: dict[str, Any]) -> Tensor:
            return self.inner(batch["x"] + batch["more"][1])

    model, x = Nested(), torch.randn(5, 5)
    bounded = transform(model, ({"x": x, "more": (3, x)},), regions=3, interface="identity")
    x = torch.randn(7, 5)
    batch = {"x": x, "more": (3, 2 * x)}
    assert torch.equal(bounded(batch), model(batch))
    assert torch.equal(bounded(dict(reversed(batch.items()))), model(batch))


@pytest.mark.parametrize("backward", ["autograd", "chain"])
def test_gradients_of_inputs(backward):
    model, x = mlp().double(), torch.randn(5, 5, dtype=torch.float64)
    for bounded in (
        transform(model, x, regions=3, interface="identity", backward=backward),
        transform(model, x.clone().requires_grad_(), regions=1, backward=backward),
    ):
        wanted = x.clone().requires_grad_()
        bounded(wanted).square().sum().backward()
        expected = x.clone().requires_grad_()
        model(expected).square().sum().backward()
        torch.testing.assert_close(wanted.grad, expected.grad, rtol=1e-12, atol=1e-14)
        assert not bounded.requires_grad_(False)(x).requires_grad
        assert bounded(wanted).requires_grad  # frozen, it still hands gradients to its input
        bounded.requires_grad_(True)


def test_gradients_of_inputs_under_the_scan():
    model, x = mlp().double(), torch.randn(5, 5, dtype=torch.float64)
    bounded = transform(model, x, regions=3, interface="identity", backward="scan")
    wanted, expected = x.clone().requires_grad_(), x.clone().requires_grad_()
    bounded(wanted).square().sum().backward()
    assert (bounded.engine.name, bounded.engine.jacobians) == ("scan", 2)
    assert vars(wanted) == {}  # Dynamo's marks are gone
    model(expected).square().sum().backward()
    torch.testing.assert_close(wanted.grad, expected.grad, rtol=1e-12, atol=1e-14)


def test_hugging_face_outputs_and_labels():
    model, x = cases.gpt2(depth=2)
    tokens = x["input_ids"]
    bounded = transform(model.eval(), x, regions=2, r=4)
    out, expected = bounded(tokens), model(tokens, use_cache=False)
    assert type(out) is type(expected)
    assert list(out) == list(expected) == ["logits"]
    assert model.config.use_cache is True
    with_loss = bounded(input_ids=tokens, labels=tokens)
    assert list(with_loss) == ["loss", "logits"]
    assert torch.equal(with_loss.logits, out.logits)
    loss = nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    torch.testing.assert_close(with_loss.loss, loss)
    with_loss.loss.backward()
    assert all(p.grad is not None for p in bounded.parameters())
    row = bounded(tokens, return_dict=False)
    assert type(row) is tuple
    assert torch.equal(row[0], out.logits)
    assert bounded(tokens[:1, :4]).logits.shape == (1, 4, 32)
    assert len(bounded.programs) == 3


# -- grad modes and autocast


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode):
    _, x, bounded = small()
    out = bounded(x)
    with mode():
        quiet, (hidden, taps) = bounded(x), bounded.forward_regions(x)
    assert torch.equal(quiet, out)
    assert torch.equal(hidden, out)
    assert not quiet.requires_grad
    assert not any(h.requires_grad for h in taps.h)
    assert bounded.engine.name == "none"
    assert bounded(x).requires_grad


@pytest.mark.parametrize(
    "context",
    [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)],
    ids=["no_grad", "inference_mode", "autocast"],
)
@pytest.mark.parametrize("name", ["mlp", pytest.param("transformer", marks=pytest.mark.slow)])
def test_where_the_first_call_happens_does_not_matter(context, name):
    """Neither the captured program nor the interface parameters take anything from the context of that call."""
    model, x = cases.MODELS[name]()
    expected = transform(copy.deepcopy(model), x, regions=3, r=4)
    lazy = transform(model, regions=3, r=4)
    with context():
        lazy(x)
        early = transform(model, x.clone(), regions=3, r=4)
    reference = seeded(lambda: expected(x))
    for bounded in (lazy, early):
        out = seeded(lambda bounded=bounded: bounded(x))
        assert out.dtype == torch.float32
        assert torch.equal(out, reference)
        assert same(gradients(bounded, out), gradients(expected, seeded(lambda: expected(x))))
        assert all(p.requires_grad and not p.is_inference() for p in bounded.parameters())


def test_programs_can_be_read():
    _, x, bounded = small()
    bounded.eval()(x)
    assert len(bounded.programs) == 2
    for program in bounded.programs:
        text = str(program)
        parts = ["prologue", "stem", "region 0 body", "region 1 body", "region 2 body", "head"]
        assert [line[2:] for line in text.splitlines() if line.startswith("# ")] == parts
        assert text.count("torch.ops.aten.linear.default") == 2 + 2 * 3
