"""Every refusal has a class of its own, says found, expected and what to do, and leaves the model as it was."""

from __future__ import annotations

import contextlib
import inspect
import pickle
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lbi_compile
from lbi_compile import errors, plan, transform
from tests.models import BatchNormMLP, CausalTransformer, PlainMLP, ResidualMLP, VisionTransformer
from tests.untouched import differences, snapshot

ALL = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if kind.__module__ == errors.__name__]


@contextlib.contextmanager
def refused(kind: type[errors.LBIError], *says: str, model: nn.Module | None = None) -> Iterator[None]:
    """Expect exactly ``kind``, with these words in its text, and ``model`` as before."""
    before = snapshot(model) if model is not None else {}
    with pytest.raises(kind) as caught:
        yield
    assert type(caught.value) is kind
    assert re.fullmatch("found: .+\n  expected: .+\n  what to do: .+", str(caught.value))
    assert [word for word in says if word not in str(caught.value)] == []
    if model is not None:
        assert differences(before, model) == []


def line_of(function: Callable[..., Any], code: str) -> str:
    """``file:line`` of a statement of ``function``."""
    lines, first = inspect.getsourcelines(function)
    (at,) = [i for i, line in enumerate(lines) if line.strip() == code]
    return f"{__file__}:{first + at}"


def mlp(**options: Any) -> ResidualMLP:
    return ResidualMLP(8, width=8, depth=4, classes=3, **options)


def language_model(**options: Any) -> CausalTransformer:
    return CausalTransformer(vocabulary=11, length=16, width=8, heads=2, depth=3, **options)


class Wrapped(nn.Module):
    """A residual MLP whose output goes through ``after``."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = mlp()

    def forward(self, x: Tensor) -> Any:
        return self.after(self.inner(x))

    def after(self, out: Tensor) -> Any:
        return out


class NoParameters(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


class Detached(Wrapped):
    def after(self, out: Tensor) -> Tensor:
        return out.detach()


class Ungraded(Wrapped):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self.inner(x)


class Argmax(Wrapped):
    def after(self, out: Tensor) -> Tensor:
        return out.argmax(-1)


class NoBlocks(Wrapped):
    """Without a list of blocks, between which a model that cannot be captured would be cut."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 3)


class Branching(NoBlocks):
    def after(self, out: Tensor) -> Tensor:
        if out.sum() > 0:
            return out
        return -out


class Slicing(NoBlocks):
    def after(self, out: Tensor) -> Tensor:
        return out[:, : int(out.abs().sum())]


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = mlp()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.inner(x + y)


class ConvolutionTower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x).relu()
        return x.mean((2, 3))


class OwnsLbi(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lbi = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.lbi(x)


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.__name__)
def test_every_error_survives_pickling(kind):
    error = pickle.loads(pickle.dumps(kind("this", expected="that", do="something")))
    assert type(error) is kind
    assert issubclass(kind, errors.LBIError)
    assert (error.found, error.expected, error.do) == ("this", "that", "something")
    assert str(error) == "found: this\n  expected: that\n  what to do: something"
    assert kind.__name__ in errors.__all__
    assert getattr(lbi_compile, kind.__name__) is kind


@pytest.mark.parametrize(
    ("options", "kind", "says"),
    [
        ({"regions": 0}, errors.RegionsError, ["regions=0", "positive"]),
        ({"regions": -3}, errors.RegionsError, ["regions=-3"]),
        ({"regions": True}, errors.RegionsError, ["regions=True"]),
        ({"regions": 2.5}, errors.RegionsError, ["regions=2.5"]),
        ({"regions": "blocks.2"}, errors.RegionsError, ["'blocks.2'", "list of module paths"]),
        ({"regions": ["blocks.2", "nowhere"]}, errors.RegionsError, ["'nowhere'", "named_modules"]),
        ({"r": 0}, errors.LatentWidthError, ["r=0"]),
        ({"r": -1}, errors.LatentWidthError, ["r=-1"]),
        ({"r": 4.0}, errors.LatentWidthError, ["r=4.0"]),
        (
            {"interface": "wire"},
            errors.InterfaceError,
            ["'wire'", "pooled, chunked, token, token+chunked, identity, zero, self"],
        ),
        ({"interface": None}, errors.InterfaceError, ["None"]),
        ({"interface": "token"}, errors.InterfaceError, ["(3, 8)", "[B, T, D]", "'pooled'"]),
        ({"interface": "chunked"}, errors.InterfaceError, ["(3, 8)", "[B, T, D]", "'pooled'"]),
        ({"cell": "lstm"}, errors.OptionError, ["'lstm'", "gru, linear"]),
        ({"cell": "lstm", "regions": 1}, errors.OptionError, ["'lstm'"]),
        ({"cell": "gru", "interface": "pooled"}, errors.OptionError, ["'gru'", "'pooled'", "token"]),
        ({"readout": "first"}, errors.OptionError, ["'first'", "auto, last or sum"]),
        ({"readout": "last", "interface": "zero"}, errors.ReadoutError, ["'last'", "'zero'", "never get a gradient"]),
        ({"backward": "adjoint"}, errors.OptionError, ["'adjoint'", "auto, autograd, chain, scan"]),
    ],
    ids=lambda value: "-".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_wrong_options(options, kind, says):
    model, x = mlp(), torch.randn(3, 8)
    with refused(kind, *says, model=model):
        transform(model, x, **{"regions": 2, "r": 4, **options})


def test_more_regions_than_places_to_cut():
    model, x = ResidualMLP(5, width=8, depth=4), torch.randn(3, 5)
    places = ("at most 4 regions", "3 places", "blocks.0", "blocks.1", "blocks.2")
    with refused(errors.TooManyRegionsError, "5 regions", *places, model=model):
        transform(model, x, regions=5)
    assert len(transform(model, x, regions=4, r=2).regions) == 4  # as many as it said


@pytest.mark.parametrize(
    ("kind", "regions"), [(NoParameters, 2), (Detached, 1), (Detached, 2), (Ungraded, 2), (Argmax, 1)]
)
def test_no_float_path(kind, regions):
    model, x = kind(), torch.randn(3, 8)
    with refused(errors.NoFloatPathError, "no output (of 1)", "to a parameter", "detached", model=model):
        transform(model, x, regions=regions)


@pytest.mark.parametrize(
    ("kind", "code"), [(Branching, "if out.sum() > 0:"), (Slicing, "return out[:, : int(out.abs().sum())]")]
)
def test_data_dependent_control_flow_names_the_line(kind, code, capfd):
    model, x = kind(), torch.randn(3, 8)
    with refused(errors.DataDependentControlFlowError, line_of(kind.after, code), code, "torch.where", model=model):
        transform(model, x, regions=2)
    assert capfd.readouterr() == ("", "")  # the exporter's own dump of the graph would bury the message


@pytest.mark.parametrize(
    ("example", "says"),
    [
        (torch.ones(3, 7), ["x=float32[3, 7]", "3x7 and 8x8"]),
        (torch.ones(3, 8, dtype=torch.long), ["x=int64[3, 8]", "dtype"]),
        ((torch.ones(3, 8), torch.ones(3, 8)), ["3 were given"]),
        ((), ["missing 1 required"]),
        ({"images": torch.ones(3, 8)}, ["images=float32[3, 8]", "unexpected keyword"]),
        (((torch.ones(3, 8),), {"x": torch.ones(3, 8)}), ["the argument x by position and by name"]),
        (3, ["example_inputs of type int", "a tensor, a tuple of arguments"]),
    ],
    ids=["width", "dtype", "too many", "none", "name", "twice", "type"],
)
def test_example_inputs_that_do_not_fit(example, says, capfd):
    model = mlp()
    with refused(errors.ExampleInputsError, *says, model=model):
        transform(model, example, regions=2, r=4)
    assert capfd.readouterr() == ("", "")


def test_no_example_inputs_for_a_plan():
    model = mlp()
    with refused(errors.ExampleInputsError, "example_input_array", "dummy_inputs", model=model):
        plan(model, regions=2)


@pytest.mark.parametrize("model", [lambda x: x, None, "gpt2", ResidualMLP], ids=["function", "None", "name", "class"])
def test_not_a_module(model):
    for call in (transform, plan):
        with refused(errors.NotAModuleError, f"type {type(model).__name__}", "torch.nn.Module"):
            call(model, torch.randn(3, 8))


def test_a_bounded_model_is_not_bounded_again():
    x = torch.randn(3, 8)
    bounded = transform(mlp(), x, regions=2, r=4)
    with refused(errors.NotAModuleError, "already bounded", "bounded.source", model=bounded):
        transform(bounded, x, regions=2)


def test_a_submodule_named_lbi():
    model, x = OwnsLbi(), torch.randn(3, 8)
    with refused(errors.OptionError, "submodule named 'lbi'", "rename", model=model):
        transform(model, x, regions=1)


@pytest.mark.parametrize("interface", ["pooled", "token", "zero"])
def test_a_canvas_with_four_axes_is_an_image(interface):
    model, x = ConvolutionTower(), torch.randn(2, 4, 5, 5)
    bounded = transform(model, x, regions=2, interface=interface)
    assert bounded.plan.interface == interface
    assert bounded(x).shape == model(x).shape


def test_a_readout_under_which_parameters_would_be_dead():
    model, tokens = language_model(), torch.randint(11, (2, 8))
    with refused(errors.ReadoutError, "'last'", "'token'", "sum", model=model):
        transform(model, tokens, regions=3, r=4, interface="token", readout="last")


def test_future_leak():
    model, tokens = language_model(), torch.randint(11, (2, 8))
    with refused(errors.FutureLeakError, "'pooled'", "causal", "allow_leak=True", model=model):
        transform(model, tokens, regions=3, r=4, interface="pooled")
    bounded = transform(model, tokens, regions=3, r=4, interface="pooled", allow_leak=True)
    later = tokens.clone()
    later[:, 5:] = (later[:, 5:] + 1) % 11
    assert not torch.equal(bounded(tokens)[:, :5], bounded(later)[:, :5])  # it was refused for a reason


def test_future_leak_without_example_inputs_leaves_an_unbuilt_model():
    model, tokens = language_model(), torch.randint(11, (2, 8))
    bounded = transform(model, regions=3, r=4, interface="pooled")
    for _ in range(2):
        with refused(errors.FutureLeakError, "'pooled'", model=model):
            bounded(tokens)
        with refused(errors.NotBuiltError, "plan"):
            _ = bounded.plan


def coupled() -> tuple[str, ...]:
    """What the refusal of BatchNorm says: operator, module, line, and the way out."""
    from tests.models import _BatchNorm

    lines, first = inspect.getsourcelines(_BatchNorm.forward)
    return "aten.batch_norm", "blocks.0.norm", f"models.py:{first + 1}", lines[1].strip(), 'backward="chain"', "eval()"


def test_batch_norm_in_training_has_no_jacobian_per_sample():
    model, x = BatchNormMLP(8, width=8, depth=4, classes=3), torch.randn(5, 8)
    with refused(errors.BatchCouplingError, *coupled(), model=model):
        transform(model, x, regions=3, r=4, backward="scan")
    for backward in ("auto", "chain", "autograd"):
        bounded = transform(model, x, regions=3, r=4, backward=backward)
        bounded(x).sum().backward()
        assert bounded.engine.name == {"auto": "autograd"}.get(backward, backward)
        assert all(p.grad is not None for p in bounded.parameters())
    # the same model, asked for the scan of one call
    with refused(errors.BatchCouplingError, *coupled(), model=model), bounded.with_engine("scan"):
        bounded(x)
    model.eval()
    bounded = transform(model, x, regions=3, r=4, backward="scan")
    model.train()
    with refused(errors.BatchCouplingError, *coupled(), model=model):
        bounded(x)


def test_batch_norm_in_the_last_region_is_no_obstacle():
    """No latent leaves the last region, so it has no Jacobian."""
    model, x = mlp(), torch.randn(5, 8)
    model.blocks[3].norm = nn.BatchNorm1d(8)
    places = ["blocks.1", "blocks.2", "blocks.3"]
    assert transform(model, x, regions=places, r=4, backward="scan").backward == "scan"
    model.blocks[2].norm = nn.BatchNorm1d(8)
    with refused(errors.BatchCouplingError, "blocks.2.norm", model=model):
        transform(model, x, regions=places, r=4, backward="scan")


def test_another_image_size():
    model, smaller = VisionTransformer(width=8, heads=2, depth=3), torch.randn(3, 1, 6, 6)
    bounded = transform(model, torch.randn(2, 1, 8, 8), regions=3, r=4)
    with refused(
        errors.ShapeNotCapturedError, "[3, 1, 6, 6]", "axis 2", "[B, 1, 8, 8]", "transform again", model=model
    ):
        bounded(smaller)
    assert bounded(torch.randn(3, 1, 8, 8)).shape == (3, 10)


def test_sizes_that_must_be_equal():
    model, five, four = TwoInputs(), torch.randn(5, 8), torch.randn(4, 8)
    bounded = transform(model, (torch.randn(3, 8), torch.randn(3, 8)), regions=2, r=4)
    with refused(
        errors.ShapeNotCapturedError, "y of shape [4, 8]", "axis 0", "equal names for equal sizes", model=model
    ):
        bounded(five, four)
    assert bounded(five, five).shape == (5, 3)


def test_another_rank():
    model, sequence = mlp(), torch.randn(2, 3, 8)
    bounded = transform(model, torch.randn(3, 8), regions=2, r=4)
    with refused(errors.ShapeNotCapturedError, "x=float32[2, 3, 8]", "x [B, 8]", model=model):
        bounded(sequence)


def test_a_plan_of_another_model():
    model, x = mlp(), torch.randn(3, 8)
    other = plan(PlainMLP(8, width=8, depth=4, classes=3), x, regions=2, r=4)
    with refused(errors.PlanError, "PlainMLP", "ResidualMLP", "plan()", model=model):
        transform(model, x, regions=other)
    deeper = plan(ResidualMLP(8, width=8, depth=6, classes=3), x, regions=["blocks.5"], r=4)
    with refused(errors.PlanError, "no value blocks.4:", "new plan", model=model):
        transform(model, x, regions=deeper)


@pytest.mark.parametrize("change", ["forward hook", "forward pre-hook", "backward hook", "swap", "add", "swap on top"])
def test_a_model_that_changed_after_transform(change):
    model, x = mlp(), torch.randn(3, 8)
    bounded = transform(model, x, regions=2, r=4)
    bounded(x)
    at = "blocks.1.branch.0"
    match change:
        case "forward hook":
            model.blocks[1].branch[0].register_forward_hook(lambda *_: None)
        case "forward pre-hook":
            model.blocks[1].branch[0].register_forward_pre_hook(lambda *_: None)
        case "backward hook":
            model.blocks[1].branch[0].register_full_backward_hook(lambda *_: None)
        case "swap":
            model.blocks[1].branch[0] = nn.Linear(8, 16)
        case "add":
            at = "blocks.1.adapter"
            model.blocks[1].adapter = nn.Linear(8, 8)
        case "swap on top":
            at = "head"
            bounded.head = nn.Linear(8, 3)
    with refused(errors.StaleCaptureError, "changed after transform", at, "first, then transform", model=model):
        bounded(x)


def test_hooks_before_transform_are_part_of_the_model():
    model, x = mlp(), torch.randn(3, 8)
    model.blocks[1].register_forward_hook(lambda module, args, out: 2 * out)
    assert torch.equal(transform(model, x, regions=1)(x), model(x))


def test_not_built_yet():
    model, x = mlp(), torch.randn(3, 8)
    bounded = transform(model, regions=2, r=4)
    again = "call bounded(x) once"
    for make in (torch.optim.SGD, torch.optim.AdamW):
        with refused(errors.NotBuiltError, "optimizer", again, model=model):
            make(bounded.parameters(), lr=1e-3)
    for ask in ("plan", "regions"):
        with refused(errors.NotBuiltError, ask, again, model=model):
            getattr(bounded, ask)
    with refused(errors.NotBuiltError, "save", again, model=model):
        bounded.state_dict()
    state = transform(model, x, regions=2, r=4).state_dict()
    for strict in (True, False):
        with refused(errors.NotBuiltError, "load", again, model=model):
            bounded.load_state_dict(state, strict=strict)
    bounded(x)
    torch.optim.AdamW(bounded.parameters())
    bounded.load_state_dict(state)


def penalty(bounded: nn.Module, x: Tensor) -> Tensor:
    """Squared norm of the input gradient, whose own gradient is a double backward."""
    x = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(bounded(x).square().sum(), x, create_graph=True)
    return gradient.square().sum()


def test_double_backward_through_the_chain():
    model, x = mlp().double(), torch.randn(3, 8, dtype=torch.float64)
    bounded = transform(model, x, regions=3, r=4, backward="chain")
    with refused(errors.DoubleBackwardError, "boundary 0", "differentiated again", "autograd", model=model):
        penalty(bounded, x).backward()


def test_double_backward_through_plain_autograd():
    model, x = mlp().double(), torch.randn(3, 8, dtype=torch.float64)
    bounded = transform(model, x, regions=3, r=4, backward="chain")
    weight = model.blocks[1].branch[0].weight
    with bounded.with_engine("autograd"):
        penalty(bounded, x).backward()
        step = torch.randn_like(weight)
        with torch.no_grad():
            weight += 1e-5 * step
        above = penalty(bounded, x).item()
        with torch.no_grad():
            weight -= 2e-5 * step
        below = penalty(bounded, x).item()
    assert (weight.grad * step).sum().item() == pytest.approx((above - below) / 2e-5, rel=1e-6)


def test_double_backward_through_the_scan():
    model, x = mlp().double(), torch.randn(3, 8, dtype=torch.float64)
    bounded = transform(model, x, regions=3, r=4, backward="scan")
    out = bounded(x)
    assert bounded.engine.name == "scan"
    assert bounded.engine.jacobians == 2
    for _ in range(2):
        with refused(errors.DoubleBackwardError, "create_graph=True", '"autograd"', model=model):
            out.sum().backward(create_graph=True)
    out.sum().backward()  # what was refused broke nothing
    assert all(p.grad is not None for p in bounded.parameters())
