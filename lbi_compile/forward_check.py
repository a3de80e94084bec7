"""The check of ``verify`` on a parallel forward: it converges, and to what the regions give one after another."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import engines
from ._torch import pytree
from .capture import Inputs, undisturbed
from .guesses import Memory
from .newton import SEQUENTIAL, default_tolerance
from .report import Check

if TYPE_CHECKING:
    from .bounded import BoundedModule

# The error that a residual of `tol` may leave, as a multiple of `tol` times the largest running product of Jacobians.
SLACK = 10.0


@contextlib.contextmanager
def solved_to(bounded: BoundedModule, tol: float) -> Iterator[None]:
    """Inside, a parallel forward ends at the residual ``tol``, whatever was asked for, in as many steps as it takes."""
    before = bounded._options
    bounded._options = dataclasses.replace(before, tol=tol, max_iters=None)
    try:
        yield
    finally:
        bounded._options = before


def forward_check(twin: BoundedModule, inputs: Inputs) -> tuple[Check, ...]:
    """Compare outputs with those of the sequential forward, at the tolerance that was asked for.

    Args:
        twin: The float64 copy that ``verify`` works on.
        inputs: Of the call, in float64.

    Returns:
        One check; none for a sequential forward.
    """
    method = twin.forward_method
    if method == SEQUENTIAL:
        return ()
    expected = _outputs(twin, inputs, SEQUENTIAL)
    twin._solver.memory = Memory()  # as hard as it gets: what was solved for before is no guess
    found = _outputs(twin, inputs, method)
    solve, norm = twin.solve, twin.solve.product_norm
    if solve.fallback is not None:
        return (Check("forward", False, f"asked for {method}; {solve}"),)
    error = max((_error(a, b) for a, b in zip(found, expected, strict=True)), default=0.0)
    tol = solve.tol or default_tolerance(torch.float64, len(twin.plan.regions))
    detail = f"{solve}; outputs off by {error:.1e}, running products of Jacobians up to {norm:.2g}"
    return (Check("forward", error <= SLACK * tol * norm, detail),)


def _outputs(twin: BoundedModule, inputs: Inputs, method: str) -> list[Tensor]:
    with undisturbed(twin.source), twin.with_forward(method), twin.with_engine(engines.AUTOGRAD), torch.no_grad():
        torch.manual_seed(0)
        leaves = pytree.tree_leaves(twin(*inputs.args, **inputs.kwargs))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _error(found: Tensor, expected: Tensor) -> float:
    size = float(expected.double().norm())
    difference = float((found.double() - expected.double()).norm())
    return difference / size if difference else 0.0
