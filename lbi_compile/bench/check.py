"""What a variant computes is held against its oracle before its speed is reported."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lbi_compile.verify import relative_errors

# Largest relative error of a gradient that passes in any case: rounding of some layers in turn, far below a wrong
# formula.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 1e-1}
# Where hundreds of layers round more than that, a variant may be this many times as far off as plain autograd.
AS_PLAIN = 4.0


@dataclass(frozen=True, slots=True)
class Check:
    """Whether a variant gives what its oracle gives.

    Attributes:
        ok: It does.
        error: Largest relative error of all tensors.
        worst: The tensor that has it.
        tensors: How many were compared.
        tolerance: Largest error that passes.
        oracle: What they were compared with.
    """

    ok: bool
    error: float
    worst: str
    tensors: int
    tolerance: float
    oracle: str


def judge(
    got: Mapping[str, Tensor | None],
    expected: Mapping[str, Tensor | None],
    *,
    dtype: torch.dtype,
    oracle: str,
    tolerance: float | None = None,
) -> Check:
    """Compare by the relative error of :func:`lbi_compile.verify.relative_errors`; ``loss`` by its own size.

    Args:
        got: What the variant gives, by name: gradients, and its loss under ``"loss"``.
        expected: What the oracle gives.
        dtype: The run's.
        oracle: What the oracle is, in words.
        tolerance: Largest error that passes; by default that of the dtype.

    Example:
        >>> judge({"w": torch.ones(2)}, {"w": torch.ones(2)}, dtype=torch.float32, oracle="itself").ok
        True
    """
    tolerance = TOLERANCE[dtype] if tolerance is None else tolerance
    errors = relative_errors(_gradients(got), _gradients(expected))
    if "loss" in expected:
        # its own ratio: in one sum with gradients a large loss would excuse errors of theirs
        errors |= relative_errors({"loss": got.get("loss")}, {"loss": expected["loss"]})
    worst = max(errors, key=lambda name: errors[name], default="")
    error = errors.get(worst, math.inf)  # nothing to compare is no success
    return Check(error <= tolerance, error, worst, len(errors), tolerance, oracle)


def tolerance_beside(
    plain: Mapping[str, Tensor | None], exact: Mapping[str, Tensor | None], *, dtype: torch.dtype
) -> float:
    """Largest error that passes where plain autograd itself, in the run's dtype, is off by rounding.

    Args:
        plain: What plain autograd gives in the run's dtype.
        exact: The same in float64.
        dtype: The run's.

    Example:
        >>> tolerance_beside({"w": torch.full((), 1.001)}, {"w": torch.ones(())}, dtype=torch.float32)
        0.004...
    """
    return max(TOLERANCE[dtype], AS_PLAIN * judge(plain, exact, dtype=dtype, oracle="itself in float64").error)


def _gradients(tensors: Mapping[str, Tensor | None]) -> dict[str, Tensor | None]:
    return {name: tensor for name, tensor in tensors.items() if name != "loss"}
