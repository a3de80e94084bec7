"""Which form of a scan runs: a table and a rule, the same answer for the same arguments everywhere.

Nothing here asks a device or a clock. The figures of a GPU are estimates from work, traffic and occupancy (README.md)
and still to be measured on one; those of a CPU are measured.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch


class Form(NamedTuple):
    """How a scan is computed.

    Attributes:
        name: ``"torch"`` (the oracle's operators), ``"numpy"`` (one call per step on a CPU), ``"vector"`` (Triton,
            sequential in K) or ``"chunked"`` (Triton, products of chunks first).
        chunk: Steps per chunk of the chunked form, 0 for the others.
    """

    name: str
    chunk: int = 0


class StepCost(NamedTuple):
    """What one step costs on a GPU at one padded width, in units of a step of the vector form.

    Attributes:
        products: One step of the rows of a chunk's product, relative to one step of a single vector.
        resident: Programs of that kernel which one multiprocessor holds at a time.
    """

    products: float
    resident: int


# Programs of the product kernel carry 8 rows (4 at 64) where the vector form carries one: twice to four times the
# instructions per Jacobian element, hidden behind the latency of the step where that is all there is (narrow latents).
# Resident programs: 64 warps of a Hopper multiprocessor over the warps of a program, halved for registers from 32 on.
_STEP_COSTS = {
    1: StepCost(1.0, 16),
    2: StepCost(1.0, 16),
    4: StepCost(1.0, 16),
    8: StepCost(1.0, 16),
    16: StepCost(1.5, 8),
    32: StepCost(3.0, 4),
    64: StepCost(5.0, 2),
}
_CHUNKS = (16, 32, 64, 128, 256)
# Two more launches, and a step over the chunks reads two things that depend on each other: in units of a step.
_LAUNCHES = 20.0
_STEP_OVER_CHUNKS = 2.0
# The chunked form has to look this much cheaper: its figures are estimates, and where its products are not trustworthy
# it walks a chunk step by step after all.
_MARGIN = 2.0

# Elements of Jacobians per step up to which one numpy call beats torch operators on a CPU (README.md).
_NUMPY_STEP = 16384


def choose(K: int, N: int, R: int, *, dtype: torch.dtype, device: str, vectors: int = 1, processors: int = 132) -> Form:
    """Choose the form of a scan.

    Args:
        K: Steps.
        N: Independent indices.
        R: Latent width.
        dtype: Dtype of the Jacobians.
        device: Type of the device, ``"cpu"`` or ``"cuda"``; any other runs the oracle.
        vectors: Adjoints per index that share its Jacobians.
        processors: Multiprocessors of the device; 132 for an H100 or H200.

    Returns:
        The form.

    Example:
        >>> choose(8, 8192, 16, dtype=torch.float32, device="cuda")
        Form(name='vector', chunk=0)
        >>> choose(4096, 1, 16, dtype=torch.float32, device="cuda")
        Form(name='chunked', chunk=64)
        >>> choose(64, 1, 16, dtype=torch.float32, device="cpu")
        Form(name='numpy', chunk=0)

    Source: kernels/README.md, Which form.
    """
    if device == "cpu":
        return Form("numpy" if N * R * R * vectors <= _NUMPY_STEP else "torch")
    if device != "cuda":
        return Form("torch")
    padded = 1 << (R - 1).bit_length()
    if vectors > 1 or padded not in _STEP_COSTS or N == 0:
        return Form("vector")
    costs = {chunk: _chunked_steps(K, N, R, _STEP_COSTS[padded], dtype, chunk, processors) for chunk in _CHUNKS}
    chunk = min(costs, key=lambda chunk: costs[chunk])
    return Form("chunked", chunk) if _MARGIN * costs[chunk] < K else Form("vector")


def _chunked_steps(K: int, N: int, R: int, cost: StepCost, dtype: torch.dtype, chunk: int, processors: int) -> float:
    """Dependent steps of the chunked form, in units of a step of the vector form, which takes K of them."""
    chunks = math.ceil(K / chunk)
    programs = N * chunks * math.ceil((R + 1) / 8)
    waves = max(1.0, programs / (processors * cost.resident))
    wide = 2.0 if dtype == torch.float64 else 1.0
    return chunk * cost.products * wide * waves + chunks * _STEP_OVER_CHUNKS + chunk + _LAUNCHES
