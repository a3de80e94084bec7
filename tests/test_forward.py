"""``forward="parallel"``: the output, gradients, random numbers and buffers of the sequential forward."""

from __future__ import annotations

import copy
import json
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lbi_compile
from lbi_compile import (
    BatchCouplingError,
    BoundedModule,
    EngineError,
    OptionError,
    Plan,
)
from lbi_compile.newton import JACOBI, PARALLEL, QUASI
from lbi_compile.verify import relative_errors
from tests.cases import Inputs, call, gradients, in_float64, with_batch
from tests.models import BatchNormMLP

TOL = 1e-10
METHODS = (PARALLEL, QUASI, JACOBI)


def bounded_of(name: str = "mlp", K: int = 6, r: int = 8, **options: Any) -> tuple[BoundedModule, Inputs]:
    """A bounded model in float64 with dropout, without a compiler where nothing else is asked for."""
    model, inputs = in_float64(name, depth=K)
    wanted = {"interface": "pooled", "backward": "autograd", "forward": PARALLEL, **options}
    return lbi_compile.transform(model, inputs, regions=K, r=r, **wanted), inputs


def compare(bounded: BoundedModule, inputs: Inputs, engine: str) -> float:
    """Largest relative error of a gradient against the sequential forward under autograd; same random numbers."""
    with bounded.with_forward("sequential"):
        expected = gradients(bounded, inputs, "autograd")
    state = torch.get_rng_state()
    found = gradients(bounded, inputs, engine)
    assert torch.equal(torch.get_rng_state(), state)
    assert bounded.solve.fallback is None
    assert 1 <= bounded.solve.iterations <= len(bounded.plan.regions)
    return max(relative_errors(found, expected).values())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("mlp", {}),
        ("vit", {"readout": "sum"}),
        ("transformer", {"interface": "chunked", "readout": "last"}),
        pytest.param("gpt2", {"interface": "chunked"}, marks=pytest.mark.slow),
    ],
)
def test_gradients_are_those_of_the_sequential_forward(name: str, options: dict[str, Any], method: str) -> None:
    bounded, inputs = bounded_of(name, forward=method, **options)
    for size in (3, 5):
        error = compare(bounded, with_batch(inputs, size), "autograd")
        assert bounded.solve.method == method
        assert error <= 10 * TOL * bounded.solve.product_norm
    assert compare(bounded, inputs, "chain") <= 10 * TOL * bounded.solve.product_norm


@pytest.mark.slow
def test_compiled_regions_run_side_by_side_forward_and_backward() -> None:
    bounded, inputs = bounded_of(K=4, r=4, backward="scan")
    for size in (3, 5):
        assert compare(bounded, with_batch(inputs, size), "scan") <= 10 * TOL * bounded.solve.product_norm
    ((_, record),) = bounded._solver._compiled.values()
    assert record.jacobians == 2
    assert record.batched.groups >= 20
    assert not record.unrolled
    (final,) = (record for key, (_, record) in bounded._compiled.items() if not key[2])
    with bounded.with_forward("sequential"):
        gradients(bounded, inputs, "scan")
    (chain,) = (record for key, (_, record) in bounded._compiled.items() if key[2])
    # the sequential forward of the same model is a chain that nothing batches
    assert final.batched.nodes > chain.batched.nodes
    assert final.forward_nodes < chain.forward_nodes
    assert record.forward_path < chain.forward_path
    assert final.forward_path < chain.forward_path


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_critical_path_grows_with_the_logarithm_of_regions() -> None:
    paths: dict[int, tuple[int, int, int, int]] = {}
    for K in (4, 8, 16):
        bounded, inputs = bounded_of(K=K, r=4, backward="scan")
        gradients(bounded, inputs, "scan")
        ((_, evaluation),) = bounded._solver._compiled.values()
        ((_, final),) = bounded._compiled.values()
        with bounded.with_forward("sequential"):
            gradients(bounded, inputs, "scan")
        chain = next(record for key, (_, record) in bounded._compiled.items() if key[2])
        # every iteration adds a prefix scan and some operators to the evaluation
        paths[K] = evaluation.forward_path, final.forward_path, final.backward_path, chain.forward_path
    few, many = paths[4], paths[16]
    assert many[:2] == few[:2]
    assert many[3] > 3 * few[3]
    # the suffix scan over 15 boundaries instead of 3
    assert few[2] <= many[2] <= few[2] + 2


def test_boundaries_of_several_lanes() -> None:
    from tests.lane_models import UNet

    torch.manual_seed(0)
    model, x = UNet().double(), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    bounded = lbi_compile.transform(model, x, regions=4, r=8, backward="autograd", forward=PARALLEL)
    assert bounded.plan.lanes
    assert compare(bounded, x, "autograd") <= 10 * TOL * bounded.solve.product_norm


def test_outputs_in_evaluation_and_without_gradients() -> None:
    bounded, inputs = bounded_of()
    bounded.eval()
    with torch.no_grad(), bounded.with_forward("sequential"):
        expected = call(bounded, inputs)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            found = call(bounded, inputs)
        assert bounded.solve.iterations
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


def test_auxiliary_losses_on_latents_and_outputs() -> None:
    bounded, inputs = bounded_of(K=4)

    def loss(bounded: BoundedModule, inputs: Inputs) -> Tensor:
        out, taps = bounded.forward_regions(inputs)
        return out.square().sum() + sum(m.sin().sum() for m in taps.m if m is not None) + taps.h[1].sum()

    with bounded.with_forward("sequential"):
        expected = gradients(bounded, inputs, "autograd", loss)
    assert max(relative_errors(gradients(bounded, inputs, "autograd", loss), expected).values()) <= 1e-8


def test_the_gradient_error_is_bounded_by_the_residual() -> None:
    model, inputs = in_float64("mlp", depth=8)
    errors: list[tuple[float, float]] = []
    for tol in (1e-1, 1e-2, 1e-4, 1e-6):
        # Jacobi's residual falls step by step, so that it comes to lie near each tolerance
        bounded = lbi_compile.transform(
            model, inputs, regions=8, r=8, interface="pooled", backward="autograd", forward=JACOBI, tol=tol
        )
        with bounded.with_forward("sequential"):
            expected = gradients(bounded, inputs, "autograd")
        found = gradients(bounded, inputs, "autograd")
        total = sum(float((g - h).square().sum()) for g, h in zip(found.values(), expected.values(), strict=True))
        size = sum(float(g.square().sum()) for g in expected.values()) ** 0.5
        errors.append((bounded.solve.residual, total**0.5 / size))
    # linear in the residual, with one constant for all
    assert all(error <= 5 * residual for residual, error in errors)


def test_a_call_with_the_same_inputs_starts_at_its_latents() -> None:
    bounded, inputs = bounded_of(K=8)
    bounded.eval()
    call(bounded, inputs)
    first = bounded.solve.iterations
    call(bounded, inputs)
    assert bounded.solve.iterations == 1 < first
    inputs.mul_(1.001)  # type: ignore[union-attr]
    call(bounded, inputs)
    assert 1 < bounded.solve.iterations <= first
    with torch.no_grad():  # nothing is learned from calls without gradients
        seen = bounded._solver.memory._seen
        call(bounded, with_batch(inputs, 5))
        assert bounded._solver.memory._seen is seen


class Counting(nn.Module):
    """Blocks that count their calls in a buffer which they read."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 6)
        self.blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(4))
        self.register_buffer("calls", torch.zeros(()))
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        self.calls.add_(1)
        for block in self.blocks:
            x = x + block(x).tanh() / self.calls
        return self.head(x)


def test_buffers_are_written_once() -> None:
    torch.manual_seed(0)
    model, x = Counting().double(), torch.randn(3, 4, dtype=torch.float64)
    bounded = lbi_compile.transform(model, x, regions=4, r=4, interface="pooled", backward="autograd", forward=PARALLEL)
    before = model.calls.item()
    for step in (1, 2, 3):
        found = bounded(x * step)
        assert model.calls.item() == before + step
        model.calls.sub_(1)
        with bounded.with_forward("sequential"):
            torch.testing.assert_close(found, bounded(x * step), rtol=0, atol=1e-9)


def test_models_that_mix_samples() -> None:
    model, x = BatchNormMLP(6, width=8, depth=4, classes=3).double(), torch.randn(5, 6, dtype=torch.float64)
    options: dict[str, Any] = {"regions": 4, "r": 4, "interface": "pooled", "backward": "autograd"}
    for method in (PARALLEL, QUASI):
        with pytest.raises(BatchCouplingError, match="jacobi"):
            lbi_compile.transform(model, x, forward=method, **options)
    bounded = lbi_compile.transform(model, x, forward=JACOBI, **options)
    before = copy.deepcopy(dict(model.named_buffers()))
    found = bounded(x)
    after = copy.deepcopy(dict(model.named_buffers()))
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            buffer.copy_(before[name])
    with bounded.with_forward("sequential"):
        torch.testing.assert_close(found, bounded(x), rtol=0, atol=1e-9)
    for name, buffer in model.named_buffers():
        torch.testing.assert_close(buffer, after[name], rtol=0, atol=1e-8)
    with bounded.with_forward(PARALLEL), pytest.raises(BatchCouplingError):
        bounded(x)


def test_what_does_not_converge_runs_region_after_region_and_says_so() -> None:
    bounded, inputs = bounded_of(K=8, max_iters=1)
    with bounded.with_forward("sequential"):
        expected = gradients(bounded, inputs, "autograd")
    found = gradients(bounded, inputs, "autograd")
    assert bounded.solve.method == "sequential"
    assert "after 1 iterations" in str(bounded.solve.fallback)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    report = lbi_compile.verify(bounded, inputs)
    (check,) = (check for check in report.checks if check.name == "forward")
    assert check.ok is False
    assert "fallback" in check.detail
    assert not report.ok


def test_verify_checks_the_forward() -> None:
    bounded, inputs = bounded_of(tol=1e-4)
    report = lbi_compile.verify(bounded, inputs)
    assert report.ok, report
    (check,) = (check for check in report.checks if check.name == "forward")
    assert "iterations, residual" in check.detail
    assert report.jacobian_norms
    with bounded.with_forward("sequential"):
        assert not [check for check in lbi_compile.verify(bounded, inputs).checks if check.name == "forward"]


def test_nothing_to_solve() -> None:
    model, inputs = in_float64("mlp", depth=4)
    for options in ({"regions": 1}, {"regions": 4, "interface": "zero"}):
        bounded = lbi_compile.transform(model, inputs, r=4, backward="autograd", forward=PARALLEL, **options)
        call(bounded, inputs)
        assert bounded.solve.iterations == 0
        assert "nothing crosses" in bounded.solve.why
    bounded = lbi_compile.transform(
        model, inputs, regions=2, r=4, interface="pooled", backward="autograd", forward=PARALLEL
    )
    assert compare(bounded, inputs, "autograd") == 0
    assert bounded.solve.iterations == 1


def test_the_plan_keeps_it() -> None:
    bounded, inputs = bounded_of(K=4, tol=1e-6, max_iters=3)
    plan = bounded.plan
    assert (plan.forward, plan.tol, plan.max_iters) == (PARALLEL, 1e-6, 3)
    assert Plan.from_json(plan.to_json()) == plan
    assert "parallel, tol 1e-06, at most 3 iterations" in str(plan)
    again = lbi_compile.transform(bounded.source, inputs, regions=plan, backward="autograd")
    assert again.plan.hash == plan.hash
    assert again.forward_method == PARALLEL
    plain = lbi_compile.transform(bounded.source, inputs, regions=4, r=8, interface="pooled").plan
    assert plain.hash != plan.hash
    record = json.loads(plain.to_json())
    for name in ("forward", "tol", "max_iters"):
        del record[name]
    assert Plan.from_json(json.dumps(record)) == plain


def test_copies_and_moves_forget_guesses() -> None:
    bounded, inputs = bounded_of(K=4)
    call(bounded, inputs)
    twin = pickle.loads(pickle.dumps(bounded))
    assert twin.forward_method == PARALLEL
    assert twin._solver.memory._last is None
    bounded.float()
    assert bounded._solver.memory._last is None
    assert call(bounded, inputs.float()).dtype == torch.float32  # type: ignore[union-attr]
    assert bounded.solve.tol == pytest.approx(1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"forward": "newton"},
        {"forward": PARALLEL, "tol": 0.0},
        {"forward": PARALLEL, "tol": True},
        {"forward": PARALLEL, "max_iters": 0},
        {"forward": PARALLEL, "max_iters": 2.5},
        {"tol": 1e-3},
        {"max_iters": 3},
        {"forward": PARALLEL, "credit": "sid"},
    ],
)
def test_options_that_do_not_exist_or_do_not_go_together(options: dict[str, Any]) -> None:
    model, inputs = in_float64("mlp", depth=4)
    with pytest.raises(OptionError):
        lbi_compile.transform(model, inputs, regions=4, r=4, **options)


def test_where_regions_cannot_or_need_not_run_side_by_side() -> None:
    model, inputs = in_float64("transformer", depth=4)
    with pytest.raises(OptionError, match="token"):
        lbi_compile.transform(model, inputs, regions=4, r=4, interface="token", forward=PARALLEL)
    bounded = lbi_compile.transform(model, inputs, regions=4, r=4, interface="token", backward="autograd")
    with pytest.raises(OptionError, match="token"), bounded.with_forward(PARALLEL):
        pass
    assert bounded.forward_method == "sequential"

    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)))

        def forward(self, x: Tensor) -> Tensor:
            return self.blocks(x if x.sum() > 0 else -x)

    with pytest.raises(EngineError, match="hooks"):
        lbi_compile.transform(Branches(), torch.randn(3, 4), regions=2, r=4, forward=PARALLEL)
    bounded, inputs = bounded_of(K=3)
    with pytest.raises(OptionError, match="a loop that looks at values"):
        torch.export.export(bounded, (inputs,))
    model, x = in_float64("mlp", depth=4)
    with pytest.raises(EngineError, match="64"):
        lbi_compile.transform(model, x, regions=4, r=80, interface="pooled", forward=PARALLEL)


def test_jacobians_row_by_row_are_told() -> None:
    """An operator without a batching rule."""

    @torch.library.custom_op("lbi_test::halve", mutates_args=())
    def halve(x: Tensor) -> Tensor:
        return x / 2

    halve.register_fake(torch.empty_like)
    halve.register_autograd(lambda ctx, grad: halve(grad))

    class Halving(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return halve(x)

    model, inputs = in_float64("mlp", depth=4)
    model.blocks[1] = nn.Sequential(model.blocks[1], Halving())
    bounded = lbi_compile.transform(
        model, inputs, regions=4, r=4, interface="pooled", backward="autograd", forward=PARALLEL
    )
    assert compare(bounded, inputs, "autograd") <= 10 * TOL * bounded.solve.product_norm
    assert "Jacobians row by row: lbi_test::halve" in str(bounded.solve)
