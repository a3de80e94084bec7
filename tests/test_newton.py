"""The solver alone, on chains of synthetic regions: it ends, it is exact, and the safeguard does what it says."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from lbi_compile.newton import (
    JACOBI,
    PARALLEL,
    QUASI,
    SEQUENTIAL,
    Solve,
    default_tolerance,
    norm_bound,
    product_norm,
    solve,
)

TOL = 1e-10


class Chain:
    """Residual tanh regions `m' = [norm](m + gain * tanh(m W + x) V)` with Jacobians in closed form, float64.

    Attributes:
        evaluations: How often all regions were evaluated.
    """

    def __init__(self, K: int, *, N: int = 3, r: int = 4, gain: float, residual: bool = True) -> None:
        generator = torch.Generator().manual_seed(K)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        self.W, self.V = normal(K, r, r) * r**-0.5, normal(K, r, r) * (gain * r**-0.5)
        self.x, self.first = normal(K, N, r), normal(N, r)
        self.residual, self.K, self.evaluations = residual, K, 0

    def regions(self, m: Tensor, at: slice) -> Tensor:
        """What regions ``at`` give for `m` `[k, N, R]`."""
        step = torch.tanh(m @ self.W[at] + self.x[at]) @ self.V[at]
        return m + step if self.residual else step

    def sequential(self) -> Tensor:
        """The latents 1 .. K - 1, one after another."""
        m, found = self.first[None], []
        for k in range(self.K - 1):
            m = self.regions(m, slice(k, k + 1))
            found.append(m[0])
        return torch.stack(found)

    def jacobians(self, m: Tensor) -> Tensor:
        """Of regions 1 .. K - 2 at `m` `[K - 2, N, R]`."""
        at = slice(1, self.K - 1)
        slope = 1 - torch.tanh(m @ self.W[at] + self.x[at]).square()  # [K - 2, N, R]
        J = torch.einsum("kij,knj,kjo->knoi", self.W[at], slope, self.V[at])
        return J + torch.eye(J.shape[-1], dtype=J.dtype) if self.residual else J

    def __call__(self, guess: Tensor) -> tuple[Tensor, Tensor]:
        self.evaluations += 1
        values = self.regions(torch.cat([self.first[None], guess[:-1]]), slice(0, self.K - 1))
        return values, self.jacobians(guess[:-1])

    def cold(self) -> Tensor:
        return self.regions(self.first[None], slice(0, 1)).expand(self.K - 1, -1, -1).clone()


def error(found: Tensor, expected: Tensor) -> float:
    """Largest error of a latent over the mean norm of the latents of its index."""
    return float(((found - expected).norm(dim=2) / expected.norm(dim=2).mean(0)).max())


CASES = [(3, 4), (8, 16), (32, 4)]
LONG = [pytest.param(K, r, marks=pytest.mark.slow) for K, r in [(64, 32), (128, 4), (128, 16), (256, 32)]]


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("gain", [0.3, 1.0, 1.5])
@pytest.mark.parametrize(("K", "r"), [*CASES, *LONG])
def test_the_latents_are_those_of_the_sequential_walk(K: int, r: int, gain: float, residual: bool) -> None:
    chain = Chain(K, r=r, gain=gain, residual=residual)
    expected = chain.sequential()
    for method in (PARALLEL, QUASI, JACOBI):
        chain.evaluations = 0
        found, record = solve(chain, chain.cold(), method=method, tol=TOL)
        assert found is not None
        assert record.method == method
        assert record.iterations == chain.evaluations == len(record.residuals) <= K - 1
        assert record.fallback is None
        norm = product_norm(chain.jacobians(expected[:-1]))
        assert error(found, expected) <= 10 * TOL * norm


def test_newton_needs_few_iterations_where_jacobi_needs_all() -> None:
    chain = Chain(64, gain=0.3)
    steps = {m: solve(chain, chain.cold(), method=m, tol=1e-4)[1].iterations for m in (PARALLEL, QUASI, JACOBI)}
    assert steps[PARALLEL] <= 12
    assert steps[PARALLEL] <= steps[QUASI] <= steps[JACOBI] <= 63


@pytest.mark.parametrize("gain", [0.5, 1.5])
def test_after_k_steps_k_latents_are_exact_clipped_or_not(gain: float) -> None:
    chain = Chain(24, gain=gain)
    expected = chain.sequential()
    seen: list[Tensor] = []

    def watched(guess: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(guess)
        return chain(guess)

    # a guess from which Newton has a long way, and no tolerance would end it early
    _, record = solve(watched, 5 * torch.randn_like(expected), tol=1e-300)
    assert record.clipped
    for step, guess in enumerate(seen):
        torch.testing.assert_close(guess[:step], expected[:step], rtol=1e-14, atol=1e-14)


def test_it_ends_with_jacobians_that_are_wrong_or_not_even_finite() -> None:
    chain = Chain(12, gain=1.0)
    expected = chain.sequential()
    for wrong in (7.0, float("nan"), float("inf")):

        def misled(guess: Tensor, wrong: float = wrong) -> tuple[Tensor, Tensor]:
            values, J = chain(guess)
            return values, torch.full_like(J, wrong)

        found, record = solve(misled, chain.cold(), tol=TOL)
        assert found is not None
        assert record.iterations <= 11
        assert error(found, expected) <= 1e-12


def test_what_does_not_converge_in_time_or_is_not_finite_is_told() -> None:
    chain = Chain(16, gain=1.5)
    found, record = solve(chain, chain.cold(), method=JACOBI, tol=TOL, max_iters=2)
    assert found is None
    assert record.method == SEQUENTIAL
    assert record.iterations == 2
    assert "after 2 iterations" in str(record.fallback)
    assert "fallback" in str(record)

    def broken(guess: Tensor) -> tuple[Tensor, Tensor]:
        values, J = chain(guess)
        return values.log(), J

    found, record = solve(broken, chain.cold(), tol=TOL)
    assert found is None
    assert "not finite in iteration 1" in str(record.fallback)


def test_a_guess_that_is_right_takes_one_iteration() -> None:
    chain = Chain(16, gain=1.0)
    found, record = solve(chain, chain.sequential(), tol=TOL)
    assert found is not None
    assert record.iterations == 1
    assert record.residual <= TOL
    assert "1 iterations, residual" in str(record)


def test_the_error_is_bounded_by_residual_times_running_products() -> None:
    for gain in (0.3, 0.8):
        chain = Chain(32, gain=gain, residual=False)
        expected = chain.sequential()
        norm = product_norm(chain.jacobians(expected[:-1]))
        for size in (1e-2, 1e-4, 1e-6):
            guess = expected + size * torch.randn_like(expected)
            residual = solve(chain, guess, tol=0.9, max_iters=1)[1].residual
            assert error(guess, expected) <= 1.1 * norm * residual


@pytest.mark.parametrize("r", [1, 4, 16, 32])
def test_the_bound_on_a_norm_is_one_and_tight(r: int) -> None:
    J = (
        torch.randn(5, 7, r, r, dtype=torch.float64)
        * torch.logspace(-12, 12, 5, dtype=torch.float64)[:, None, None, None]
    )
    ratio = norm_bound(J) / torch.linalg.matrix_norm(J, 2)
    assert ratio.min() >= 1 - 1e-12
    assert ratio.max() <= r ** (1 / 64) + 1e-12
    assert norm_bound(torch.zeros(2, r, r)).eq(0).all()


def test_running_products_are_multiplied_from_both_ends() -> None:
    J = torch.randn(4, 2, 3, 3, dtype=torch.float64)
    expected = 1.0
    for n in range(2):
        from_first = from_last = torch.eye(3, dtype=torch.float64)
        for a, b in zip(J[:, n], J[:, n].flip(0), strict=True):
            from_first, from_last = a @ from_first, from_last @ b
            expected = max(expected, *(float(torch.linalg.matrix_norm(P, 2)) for P in (from_first, from_last)))
    assert product_norm(J) == pytest.approx(expected, rel=1e-12)
    assert product_norm(None) == product_norm(J[:0]) == 1.0


def test_tolerances_leave_room_for_rounding() -> None:
    sizes = [torch.float64, torch.float32, torch.bfloat16]
    tolerances = [default_tolerance(dtype, 16) for dtype in sizes]
    assert all(a < b for a, b in pairwise(tolerances))
    assert default_tolerance(torch.float32, 4096) > 1e-4


def test_a_record_tells_its_story() -> None:
    told = "parallel (3 iterations, residual 1.0e-12 of 1e-10 allowed"
    assert str(Solve(PARALLEL, "w", 3, 1e-12, tol=1e-10)) == told + ")"
    assert str(Solve(PARALLEL, "w", 3, 1e-12, clipped=2, tol=1e-10)) == told + ", 2 of them clipped)"
    assert str(Solve(SEQUENTIAL, "asked for", 3)) == "sequential (asked for)"
    assert str(Solve(PARALLEL, "one region", 0)) == "parallel (one region)"
    assert str(Solve(SEQUENTIAL, "fallback", 3, fallback="slow", note="by hand")) == (
        "sequential (fallback: slow); by hand"
    )


def linear(rho: float, J: float) -> tuple[Tensor | None, Solve]:
    """Two latents 1 of one number, a guess that is off by ``rho`` at the first, and a Jacobian that says ``J``."""

    def evaluate(guess: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones(2, 1, 1, dtype=torch.float64), torch.full((1, 1, 1, 1), J, dtype=torch.float64)

    guess = torch.tensor([1 - rho, 1.0], dtype=torch.float64).view(2, 1, 1)
    return solve(evaluate, guess, tol=10.0)


def test_a_correction_beyond_the_share_of_trust_is_clipped() -> None:
    # the correction of the second latent is J * rho, beside latents of norm sqrt(2)
    share = 0.3 * 2**0.5
    assert linear(share / 2 * 0.999, 2.0)[1].clipped == 0
    assert linear(share / 2 * 1.001, 2.0)[1].clipped == 1
    # what stretches nothing is not clipped, however large the step
    assert linear(5.0, 1.0)[1].clipped == 0
    assert linear(5.0, 1.001)[1].clipped == 1


def test_after_convergence_no_large_step_is_taken() -> None:
    near, _ = linear(0.1, 1.0)
    assert near is not None
    assert near.flatten().tolist() == pytest.approx([1.0, 1.1])
    far, _ = linear(5.0, 1.0)
    assert far is not None
    assert far.flatten().tolist() == [-4.0, 1.0]


def test_the_residual_is_the_largest_over_indices_and_a_sum_over_latents() -> None:
    """Two indices, three latents of one number: off by 1, 2 and 3 of mean 2 at one index, by nothing at the other."""

    def evaluate(guess: Tensor) -> tuple[Tensor, None]:
        return torch.tensor([[1.0, 1.0], [2.0, 1.0], [3.0, 1.0]], dtype=torch.float64)[..., None], None

    guess = torch.tensor([[0.0, 1.0], [0.0, 1.0], [0.0, 1.0]], dtype=torch.float64)[..., None]
    _, record = solve(evaluate, guess, method=JACOBI, tol=1e-12)
    assert record.residuals == (3.0, 0.0)
    assert (record.iterations, record.why, record.residual) == (2, "converged", 0.0)
    _, record = solve(evaluate, guess, method=JACOBI, tol=3.0)
    assert (record.iterations, record.residual, record.tol) == (1, 3.0, 3.0)


def test_no_index_is_solved_at_once() -> None:
    found, record = solve(lambda guess: (guess, None), torch.zeros(2, 0, 3), method=JACOBI, tol=1e-6)
    assert found is not None
    assert (found.shape, record.iterations, record.residual) == ((2, 0, 3), 1, 0.0)
