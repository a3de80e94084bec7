"""Solve for the latents of all boundaries at once: Newton, quasi-Newton and Jacobi iterations with a safeguard.

The latents of a bounded model obey `m_{k+1} = f_k(m_k)`. From a guess `g` of all of them, all `F_{k+1} = f_k(g_k)` can
be evaluated at once. A step puts `m_{k+1} = F_{k+1} + c_{k+1}` with

    c_1 = 0,    c_{k+1} = A_k (m_k - g_k) = A_k c_k + A_k (F_k - g_k),

an affine recurrence that one prefix scan solves. With `A_k = J_k = d f_k / d m_k` this is Newton's step, with the
diagonal of `J_k` a quasi-Newton one, with 0 Jacobi's.

**It ends.** Whatever the `A_k` are: if `g_1 .. g_j` are exact, then so is `F_{j+1}`, and `c_1 .. c_{j+1}` are zero,
for they are sums of products with `F_i - g_i = 0`, i <= j. So `m_1 .. m_{j+1}` are exact after the step, and `m_1`
after the first. Hence all K - 1 latents between K regions are exact after K - 1 steps, clipped or not. Rounding does
not spoil it: a latent that is exact stays the very number that its region gave.

**How far off.** With `rho_k = F_k - g_k` the error `e_k = g_k - m_k` of a guess obeys `e_{k+1} = J_k e_k - rho_{k+1}`
to first order, so no error is larger than the largest norm of a running product `J_j ... J_i` times the sum of the
`|rho_k|`. The residual told here is that sum over the mean norm of the latents, the largest over all indices.
Gradients are those of the regions at the values they were given, the exact ones of a model whose latents are off by
no more than that; so they too are off by a constant times it.

Sources: Lim et al., "Parallelizing non-linear sequential models over the sequence length" (DEER) and Danieli et al.,
"DeepPCR", for Newton by a scan; Gonzalez et al., "Towards scalable and stable parallelization of nonlinear RNNs", for
its ending and the diagonal. Clipping Jacobians where the step would be large is ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .kernels.ops import prefix_scan
from .kernels.products import product_norms

SEQUENTIAL, PARALLEL, QUASI, JACOBI = "sequential", "parallel", "quasi-newton", "jacobi"
METHODS = (SEQUENTIAL, PARALLEL, QUASI, JACOBI)

# A correction larger than this share of the latents is no small step, for which the Jacobians at the guess speak: it is
# computed again with Jacobians that stretch nothing, for a product of many would throw the iterates further off.
TRUSTED = 0.3
# Squarings of `J J^T` in the bound on its norm, which is then at most R^(1/64) too large: 4% at R = 16.
SQUARINGS = 5
# Relative residual that counts as converged, by dtype of the latents.
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}
# Roundings of a region that the default tolerance leaves room for, for each of the K residuals that add up.
ROUNDINGS = 8

# Values `F` `[K - 1, N, R]` of latents 1 .. K - 1 at a guess of them, and Jacobians `[K - 2, N, R, R]` of regions
# 1 .. K - 2 there; ``None`` for the method that uses none.
Evaluate = Callable[[Tensor], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True, slots=True)
class Solve:
    """How the latents of the last call were found.

    Attributes:
        method: ``"sequential"``, ``"parallel"`` (Newton), ``"quasi-newton"`` or ``"jacobi"``; ``"sequential"`` where it
            fell back.
        why: The reason, one sentence.
        iterations: Evaluations of all regions side by side.
        residual: Sum over boundaries of `|f_k(m_k) - m_{k+1}|`, over the mean norm of the latents, the largest over all
            indices, at the last evaluation; the step after it is not counted. 0 where every latent is exact by
            construction.
        residuals: The same at every evaluation.
        clipped: Steps in which a Jacobian was clipped.
        tol: Residual that counts as converged.
        fallback: Why the regions were run one after another after all; ``None`` where they were not.
        jacobians: `[K - 2, N, R, R]`, those of the last evaluation; ``None`` without any.
        note: What else is to be told, such as why regions were evaluated without a compiler.
    """

    method: str
    why: str
    iterations: int = 0
    residual: float = 0.0
    residuals: tuple[float, ...] = ()
    clipped: int = 0
    tol: float = 0.0
    fallback: str | None = None
    jacobians: Tensor | None = field(default=None, repr=False, compare=False)
    note: str = ""

    @property
    def product_norm(self) -> float:
        """Largest spectral norm of a running product of Jacobians, from the first on or to the last, and at least 1.

        Errors of the latents and gradients are at most about this times the residual.
        """
        return product_norm(self.jacobians)

    def __str__(self) -> str:
        return "; ".join(filter(None, (self._story(), self.note)))

    def _story(self) -> str:
        if self.fallback is not None:
            return f"{self.method} (fallback: {self.fallback})"
        if self.method == SEQUENTIAL or not self.iterations:
            return f"{self.method} ({self.why})"
        return (
            f"{self.method} ({self.iterations} iterations, residual {self.residual:.1e} of {self.tol:.0e} allowed"
            + (f", {self.clipped} of them clipped)" if self.clipped else ")")
        )


def product_norm(jacobians: Tensor | None) -> float:
    """Largest spectral norm of `J_j ... J_0` and of `J_{K-1} ... J_j` over all j and indices; at least 1.

    Infinite where it is too large for float64; NaN where a Jacobian is not finite.

    Args:
        jacobians: `[K, N, R, R]`, or ``None`` for 1.

    Example:
        >>> product_norm(torch.full((2, 1, 1, 1), 3.0))
        9.0
    """
    if jacobians is None or not jacobians.numel():
        return 1.0
    found = [float(norms.max()) for norms in product_norms(jacobians)]  # NaN stays NaN
    return max(found, key=lambda norm: (norm != norm, norm))


def default_tolerance(dtype: torch.dtype, regions: int) -> float:
    """The residual that counts as converged for latents of ``dtype``.

    Example:
        >>> default_tolerance(torch.float64, 16), default_tolerance(torch.float32, 16)
        (1e-10, 0.0001)
    """
    return max(TOLERANCES.get(dtype, 1e-4), ROUNDINGS * regions * torch.finfo(dtype).eps)


def solve(
    evaluate: Evaluate, guess: Tensor, *, method: str = PARALLEL, tol: float, max_iters: int | None = None
) -> tuple[Tensor | None, Solve]:
    """Find the latents of all boundaries.

    Args:
        evaluate: Runs all regions at a guess `[K - 1, N, R]`.
        guess: `[K - 1, N, R]` of the latents `m_1 .. m_{K-1}`.
        method: ``"parallel"``, ``"quasi-newton"`` or ``"jacobi"``.
        tol: Residual that counts as converged.
        max_iters: Most evaluations, at least one; by default as many as are needed in the worst case, K - 1.

    Returns:
        The latents `[K - 1, N, R]`, or ``None`` where the regions have to be run one after another; and the record.

    Example:
        >>> f = lambda g: (torch.cat([g.new_ones(1, 1, 1), 0.5 * g[:-1]]), g.new_full((2, 1, 1, 1), 0.5))
        >>> m, record = solve(f, torch.zeros(3, 1, 1), tol=1e-6)
        >>> m.flatten().tolist(), record.iterations
        ([1.0, 0.5, 0.25], 2)
    """
    unknown = guess.shape[0]
    most = unknown if max_iters is None else max_iters
    residuals: list[float] = []
    clipped = 0
    jacobians: Tensor | None = None
    fallback = None
    for step in range(1, most + 1):
        values, jacobians = evaluate(guess)
        rho = values - guess
        size = values.square().sum((0, 2))  # [N]
        total, finite = _measure(rho, values)
        residuals.append(total)
        if not finite:
            fallback = f"a value that is not finite in iteration {step}"
            break
        done = total <= tol
        correction, stretched = _correction(rho, jacobians, size, method)
        clipped += stretched
        guess = _stepped(guess, values, correction, size, done=done)
        if done or step == unknown:
            # after as many steps as there are latents, every one is exact by construction
            record = Solve(
                method,
                "converged" if done else f"exact after {step} steps by construction",
                step,
                total if done else 0.0,
                tuple(residuals),
                clipped,
                tol,
                None,
                jacobians,
            )
            return guess, record
    fallback = fallback or f"residual {residuals[-1]:.1e} after {most} iterations, and {tol:.0e} is asked for"
    record = Solve(
        SEQUENTIAL,
        "fallback",
        len(residuals),
        residuals[-1],
        tuple(residuals),
        clipped,
        tol,
        fallback,
        jacobians,
    )
    return None, record


def _measure(rho: Tensor, values: Tensor) -> tuple[float, bool]:
    """The residual, and whether all is finite."""
    mean = values.norm(dim=2).mean(0).clamp(min=torch.finfo(rho.dtype).tiny)
    total = (rho.norm(dim=2).sum(0) / mean).max() if rho.shape[1] else rho.new_zeros(())
    number = float(total)  # one of two waits for the device in an iteration: NaN and infinity show in it too
    return number, math.isfinite(number)


def _correction(rho: Tensor, J: Tensor | None, size: Tensor, method: str) -> tuple[Tensor | None, bool]:
    """`c` of latents 1 .. K - 1, zero where it is not finite; and whether any Jacobian was clipped."""
    if J is None or method == JACOBI or rho.shape[0] < 2:
        return None, False
    J = torch.nan_to_num(J.to(rho.dtype), nan=0.0, posinf=0.0, neginf=0.0)
    if method == QUASI:
        J = torch.diag_embed(J.diagonal(dim1=-2, dim2=-1))
    c = _carried(J, rho)
    trusted = _small(c, size)  # [N], false where c is not finite
    if bool(trusted.all()):
        return c, False
    scale = norm_bound(J).clamp(min=1.0)  # [K - 2, N]
    clipped = bool((scale > 1.0).any(0)[~trusted].any())
    bounded = _carried(J / scale[..., None, None], rho)
    c = torch.where(trusted[:, None], c, bounded)
    return torch.nan_to_num(c, nan=0.0, posinf=0.0, neginf=0.0), clipped


def _carried(A: Tensor, rho: Tensor) -> Tensor:
    """`c_1 = 0, c_{k+1} = A_k (c_k + rho_k)`, `[K - 1, N, R]`."""
    b = (A @ rho[:-1, :, :, None])[..., 0]
    return prefix_scan(A, torch.zeros_like(rho[0]), b)


def _small(step: Tensor, size: Tensor) -> Tensor:
    """Whether a step `[K - 1, N, R]` is small beside latents of squared norms ``size`` `[N]`."""
    return step.square().sum((0, 2)) <= TRUSTED**2 * size


def _stepped(guess: Tensor, values: Tensor, correction: Tensor | None, size: Tensor, *, done: bool) -> Tensor:
    """The next guess; after convergence a step that is no small one is not taken."""
    after = values if correction is None else values + correction
    return torch.where(_small(after - guess, size)[:, None], after, guess) if done else after


def norm_bound(J: Tensor) -> Tensor:
    """An upper bound on spectral norms that is at most `R^(1/64)` too large.

    `|J|_2^{2p} <= trace (J J^T)^p <= R |J|_2^{2p}` with p = 32, which takes five products of matrices and no
    decomposition.

    Args:
        J: `[..., R, R]`.

    Returns:
        `[...]`.

    Example:
        >>> norm_bound(torch.diag(torch.tensor([3.0, 0.0]))).item()
        3.0
    """
    scale = J.abs().amax((-2, -1))
    unit = J / torch.where(scale > 0, scale, torch.ones_like(scale))[..., None, None]
    G = unit @ unit.mT
    logarithm = torch.zeros_like(scale)
    power = 1
    for _ in range(SQUARINGS):
        trace = G.diagonal(dim1=-2, dim2=-1).sum(-1)
        trace = torch.where(trace > 0, trace, torch.ones_like(trace))
        logarithm = logarithm + trace.log() / power
        G = G / trace[..., None, None]
        G = G @ G
        power *= 2
    trace = G.diagonal(dim1=-2, dim2=-1).sum(-1)
    logarithm = logarithm + trace.clamp(min=torch.finfo(J.dtype).tiny).log() / power
    return torch.where(scale > 0, scale * (logarithm / 2).exp(), scale)
