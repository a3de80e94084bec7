"""What the user asked ``transform`` for."""

from __future__ import annotations

from dataclasses import dataclass

from .credit.base import Credit
from .passes.jacobian_budget import JACOBIAN_BYTES
from .plan import Plan


@dataclass(frozen=True, slots=True)
class Options:
    """The arguments of ``transform``, checked."""

    regions: int | tuple[str, ...] | Plan
    r: int
    interface: str
    cell: str
    readout: str
    backward: str
    allow_leak: bool
    seed: int
    credit: Credit | None = None
    batch_regions: bool = True
    jacobian_bytes: int = JACOBIAN_BYTES
    forward: str = "sequential"
    tol: float | None = None
    max_iters: int | None = None
    finish: str = "auto"
