"""The product: every engine's gradients equal plain autograd's, and autograd's equal finite differences."""

from __future__ import annotations

import itertools
import statistics

import pytest
import torch
from torch import Tensor

import lbi_compile
from lbi_compile import BoundedModule
from lbi_compile.verify import relative_errors
from tests.cases import MODELS, Inputs, call, gradients, in_float64, project, with_batch

TOLERANCE = 1e-10
# the model, K, r, further options, batch sizes (captured with 3); uneven: 5 blocks never divide into 3 equal regions
SHARP = [
    ("mlp", 3, 4, {}, (3, 1, 5)),
    ("transformer", 3, 4, {"interface": "token", "cell": "gru"}, (3, 5)),
    pytest.param(
        "transformer", 3, 4, {"interface": "token", "cell": "linear", "finish": "own"}, (3, 5), marks=pytest.mark.slow
    ),
    pytest.param("transformer", 3, 4, {"interface": "token+chunked", "finish": "own"}, (3, 5), marks=pytest.mark.slow),
    pytest.param("transformer", 3, 8, {"interface": "chunked", "readout": "last"}, (3, 5), marks=pytest.mark.slow),
    pytest.param("vit", 3, 4, {}, (3, 5), marks=pytest.mark.slow),
    pytest.param("gpt2", 4, 4, {}, (3, 5), marks=pytest.mark.slow),  # one of the zoo runs with the fast tests
]
FULL = [
    (name, regions, r, {}) for name, regions, r in itertools.product(MODELS, (1, 2, 3, 8), (1, 4, 16))
] + [
    (name, regions, r, options)
    for name, regions, r in itertools.product(("transformer", "gpt2"), (3, 8), (4, 16))
    for options in ({"interface": "token", "cell": "gru"}, {"interface": "chunked"}, {"interface": "self"})
]  # fmt: skip


def check(
    name: str,
    regions: int,
    r: int,
    options: dict[str, str],
    batches: tuple[int, ...] = (3, 1, 5),
    depth: int | None = None,
) -> None:
    model, inputs = in_float64(name, **({} if depth is None else {"depth": depth}))
    bounded = lbi_compile.transform(model, inputs, regions=regions, r=r, **options)
    for batch in batches:
        data = with_batch(inputs, batch)
        expected = gradients(bounded, data, "autograd")
        assert all(g is not None for g in expected.values()), "a parameter can never learn"
        for engine in ("chain", "scan"):
            worst = relative_errors(gradients(bounded, data, engine), expected)
            name_of_worst = max(worst, key=worst.__getitem__)
            assert worst[name_of_worst] <= TOLERANCE, (engine, batch, name_of_worst, worst[name_of_worst])


@pytest.mark.parametrize(("name", "regions", "r", "options", "batches"), SHARP)
def test_engines_agree_with_autograd(
    name: str, regions: int, r: int, options: dict[str, str], batches: tuple[int, ...]
) -> None:
    check(name, regions, r, options, batches)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("name", "regions", "r", "options"), FULL)
def test_engines_agree_with_autograd_everywhere(name: str, regions: int, r: int, options: dict[str, str]) -> None:
    check(name, regions, r, options, depth=9)


def auxiliary(bounded: BoundedModule, inputs: Inputs) -> Tensor:
    assert isinstance(inputs, Tensor)
    out, taps = bounded.forward_regions(inputs)
    assert len(taps.h) == len(taps.m) == 4
    first, second = taps.m[1], taps.m[3]
    assert first is not None
    assert second is not None
    return project(out) + 3 * project(first.square(), 4) + 2 * project(second.sin(), 5) + project(taps.h[1], 6)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"interface": "token", "cell": "gru"}])
def test_auxiliary_losses_on_two_latents_are_differentiated_exactly(options: dict[str, str]) -> None:
    model, inputs = in_float64("transformer", depth=4)
    bounded = lbi_compile.transform(model, inputs, regions=4, r=4, **options)
    plain = gradients(bounded, inputs, "autograd")
    expected = gradients(bounded, inputs, "autograd", auxiliary)
    assert max(relative_errors(plain, expected).values()) > 1e-3, "the auxiliary losses change nothing"
    for engine in ("chain", "scan"):
        got = gradients(bounded, inputs, engine, auxiliary)
        assert max(relative_errors(got, expected).values()) <= TOLERANCE


@pytest.mark.parametrize(
    ("name", "options"), [("mlp", {}), ("transformer", {"interface": "chunked"}), ("transformer", {})]
)
def test_autograd_agrees_with_central_differences(name: str, options: dict[str, str]) -> None:
    model, inputs = in_float64(name)
    bounded = lbi_compile.transform(model, inputs, regions=3, r=4, **options)
    found = gradients(bounded, inputs, "chain")
    generator = torch.Generator().manual_seed(0)
    parameters = dict(bounded.named_parameters())
    for group in ("lbi.", ""):
        direction = {
            name: torch.randn(p.shape, generator=generator, dtype=torch.float64)
            for name, p in parameters.items()
            if name.startswith("lbi.") == bool(group)
        }
        slope = sum(float((found[name] * step).sum()) for name, step in direction.items())  # type: ignore[operator]
        step = 1e-6
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                for name, change in direction.items():
                    parameters[name].add_(change, alpha=sign * step)
                torch.manual_seed(7)
                values.append(float(project(call(bounded, inputs))))
                for name, change in direction.items():
                    parameters[name].sub_(change, alpha=sign * step)
        assert (values[0] - values[1]) / (2 * step) == pytest.approx(slope, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"),
    [("mlp", {}), ("transformer", {"interface": "token", "cell": "gru"})],
)
def test_bfloat16_autocast_is_as_accurate_as_compiled_autograd(name: str, options: dict[str, str]) -> None:
    model, inputs = in_float64(name)
    model.eval()  # masks drawn in two precisions differ, so the reference would measure dropout
    reference = lbi_compile.transform(model, inputs, regions=3, r=4, **options)
    narrow_model, _ = in_float64(name)
    narrow_inputs = inputs.float() if isinstance(inputs, Tensor) and inputs.is_floating_point() else inputs
    bounded = lbi_compile.transform(narrow_model.float().eval(), narrow_inputs, regions=3, r=4, **options)
    torch._dynamo.reset()

    def plain(model: BoundedModule, data: Inputs) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return project(compiled(data))

    def narrow(model: BoundedModule, data: Inputs) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return project(call(model, data))

    compiled = torch.compile(bounded, backend="aot_eager")
    call(bounded, narrow_inputs)
    errors: dict[str, list[float]] = {"scan": [], "plain": []}
    for seed in range(5):
        with torch.no_grad():
            torch.manual_seed(seed)
            for name_of, parameter in reference.named_parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.02)
                dict(bounded.named_parameters())[name_of].copy_(parameter)
                parameter.copy_(dict(bounded.named_parameters())[name_of])
        expected = gradients(reference, inputs, "autograd")
        for arm, engine, loss in (("scan", "scan", narrow), ("plain", None, plain)):
            got = (
                gradients(bounded, narrow_inputs, engine, loss)
                if engine
                else _compiled_gradients(bounded, loss, inputs)
            )
            errors[arm].append(_total_error(got, expected))
    assert 1e-4 < statistics.median(errors["plain"]) < 0.2
    assert statistics.median(errors["scan"]) <= 1.5 * statistics.median(errors["plain"])


def _compiled_gradients(bounded: BoundedModule, loss: object, inputs: Inputs) -> dict[str, Tensor | None]:
    bounded.zero_grad()
    narrow = inputs.float() if isinstance(inputs, Tensor) and inputs.is_floating_point() else inputs
    loss(bounded, narrow).backward()  # type: ignore[operator]
    return {name: p.grad for name, p in bounded.named_parameters()}


def _total_error(got: dict[str, Tensor | None], expected: dict[str, Tensor | None]) -> float:
    """Distance of all gradients together, relative to their length."""
    pairs = [(got[name], wanted) for name, wanted in expected.items() if wanted is not None]
    difference = sum(float((g.double() - e).square().sum()) for g, e in pairs if g is not None)
    return (difference / sum(float(e.square().sum()) for _, e in pairs)) ** 0.5
