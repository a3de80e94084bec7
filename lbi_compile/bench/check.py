"""What a variant computes is held against its oracle before its speed is reported."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lbi_compile.verify import relative_errors

# Largest relative error of a gradient that passes: rounding of a few hundred layers in turn, far below a wrong formula.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 1e-1}


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
    got: Mapping[str, Tensor | None], expected: Mapping[str, Tensor | None], *, dtype: torch.dtype, oracle: str
) -> Check:
    """Compare by the relative error of :func:`lbi_compile.verify.relative_errors`; ``loss`` by its own size.

    Args:
        got: What the variant gives, by name: gradients, and its loss under ``"loss"``.
        expected: What the oracle gives.
        dtype: The run's; it sets the tolerance.
        oracle: What the oracle is, in words.

    Example:
        >>> judge({"w": torch.ones(2)}, {"w": torch.ones(2)}, dtype=torch.float32, oracle="itself").ok
        True
    """
    errors = relative_errors(_gradients(got), _gradients(expected))
    if "loss" in expected:
        # its own ratio: in one sum with gradients a large loss would excuse errors of theirs
        errors |= relative_errors({"loss": got.get("loss")}, {"loss": expected["loss"]})
    worst = max(errors, key=lambda name: errors[name], default="")
    error = errors.get(worst, math.inf)  # nothing to compare is no success
    return Check(error <= TOLERANCE[dtype], error, worst, len(errors), TOLERANCE[dtype], oracle)


def _gradients(tensors: Mapping[str, Tensor | None]) -> dict[str, Tensor | None]:
    return {name: tensor for name, tensor in tensors.items() if name != "loss"}
