"""``bench scan``: the operator ``lbi::suffix_scan`` against other ways to solve the same recursion."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lbi_compile import _torch
from lbi_compile.kernels import ops, reference

from . import graphs
from .compare import Cell, Contender, Oracle, Terms, Variant, compare
from .measure import Timed, paired

ORACLE = "kernels/reference.py in float64"
PART = "scan"
# Several times the last-level cache of any GPU of today.
_COPIED = 1 << 30


class Problem(NamedTuple):
    """Inputs of a scan: Jacobians ``J`` ``[K, N, R, R]``, ``last`` ``[N, R]``, ``b`` ``[K, N, R]``."""

    J: Tensor
    last: Tensor
    b: Tensor


def problem(*, K: int, N: int, r: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Problem:
    """Random Jacobians that keep the mean square of an adjoint, so that no number grows or fades with K."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw).to(device=device, dtype=dtype)

    return Problem(normal(K, N, r, r) / r**0.5, normal(N, r), normal(K, N, r))


def bmm_loop(J: Tensor, last: Tensor, b: Tensor) -> Tensor:
    """K launches of ``baddbmm``, one after the other, each into its place; ``[K + 1, N, R]``."""
    out = last.new_empty((J.shape[0] + 1, *last.shape))
    out[-1] = last
    for k in range(J.shape[0] - 1, -1, -1):
        torch.baddbmm(b[k].unsqueeze(-1), J[k].mT, out[k + 1].unsqueeze(-1), out=out[k].unsqueeze(-1))
    return out


def generic_associative_scan(J: Tensor, last: Tensor, b: Tensor) -> Tensor:
    """Torch's generic associative scan over the affine maps, in log2 K steps; ``[K + 1, N, R]``.

    The monoid is ``(P, p) o (Q, q) = (P Q, p + P q)``; the last element is the constant map to ``last``.
    """
    P = torch.cat([J.mT, torch.zeros_like(J[:1])])
    p = torch.cat([b, last.unsqueeze(0)])
    return _torch.associative_scan(_after, (P, p), reverse=True)[1]


def _after(later: tuple[Tensor, Tensor], earlier: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    # in reverse the scan hands over what it has, which belongs to the larger k, first
    (Q, q), (P, p) = later, earlier
    return P @ Q, p + (P @ q.unsqueeze(-1)).squeeze(-1)


FORMS: tuple[tuple[str, str, Callable[..., Tensor], bool, bool], ...] = (
    # name, what it is, function, is a baseline, compiles
    ("bmm loop", "K launches of baddbmm", bmm_loop, True, False),
    ("generic", "torch's associative_scan, generic mode", generic_associative_scan, True, False),
    ("gen. ind.", "generic under torch.compile", generic_associative_scan, True, True),
    ("reference", "kernels/reference.py", reference.suffix_scan, True, False),
    ("lbi", "torch.ops.lbi.suffix_scan", ops.suffix_scan, False, False),
)
NAMES = tuple(name for name, *_ in FORMS)


def cell(*, K: int, N: int, r: int, terms: Terms, only: tuple[str, ...] = NAMES, cuda_graphs: bool = False) -> Cell:
    """Compare all forms on one problem.

    Args:
        K: Jacobians.
        N: Independent indices.
        r: Width.
        terms: How to compare.
        only: Names of the forms to run.
        cuda_graphs: Replay each form as a CUDA graph.
    """
    given = problem(K=K, N=N, r=r, dtype=terms.dtype, device=terms.device, seed=terms.seed)
    moved = sum(x.numel() * x.element_size() for x in (given.J, given.b)) + (K + 2) * N * r * given.J.element_size()

    def oracle() -> Mapping[str, Tensor]:
        J, last, b = (x.double() for x in given)
        return {"adjoints": reference.suffix_scan(J, last, b)}

    def make(function: Callable[..., Tensor], compiled: bool) -> Contender:
        def run(_: Any = None) -> Tensor:
            return form(*given)

        form = torch.compile(function, dynamic=False) if compiled else function
        if cuda_graphs:
            return graphs.contender(PART, run, moved=moved)
        return Contender({PART: Timed(run)}, lambda: {"adjoints": run()}, run, moved)

    torch.compiler.reset()
    variants = [
        Variant(name, what, lambda f=function, c=compiled: make(f, c), ORACLE, baseline, compiled)
        for name, what, function, baseline, compiled in FORMS
        if name in only
    ]
    with torch.no_grad():
        return compare({"name": "scan", "K": K, "N": N, "r": r}, variants, {ORACLE: Oracle(oracle)}, terms)


def cells(
    *, K: tuple[int, ...], N: tuple[int, ...], r: tuple[int, ...], terms: Terms, **options: Any
) -> tuple[Cell, ...]:
    """One cell for each combination."""
    return tuple(cell(K=k, N=n, r=width, terms=terms, **options) for n, k, width in product(N, K, r))


def copy_bandwidth(terms: Terms) -> float:
    """Bytes per second that a copy on the device reads and writes."""
    source = torch.empty(_COPIED, dtype=torch.uint8, device=terms.device)
    target = torch.empty_like(source)
    seconds = paired({"copy": Timed(lambda _: target.copy_(source))}, rounds=terms.rounds, device=terms.device)
    return 2 * _COPIED / min(seconds["copy"])
