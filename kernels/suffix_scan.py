"""Triton vector form of the scans: one sweep over K, every index in parallel, each Jacobian read once.

Importing this file needs Triton; :mod:`lbi_compile.kernels.ops` does so only when it meets a CUDA tensor. The oracle is
:mod:`lbi_compile.kernels.reference`, which has the same signatures.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# Elements of one tile of Jacobians, and how many of them a warp holds in registers: 16 a thread in float32. At 32 a
# thread the strided form takes all 255 registers at R = 8, and R = 1 spills. Blocks are bounded so that a narrow latent
# still gives many programs.
_TILE = 2048
_PER_WARP = 512
_MAX_BLOCK = 32
_MAX_WARPS = 16


class LaunchShape(NamedTuple):
    """What the kernel is specialised to.

    Attributes:
        padded: R rounded up to a power of two.
        block: Independent indices per program.
        warps: Warps per program.
    """

    padded: int
    block: int
    warps: int


def launch_shape(N: int, R: int, dtype: torch.dtype) -> LaunchShape:
    """Choose the tile for ``N`` indices of width ``R``.

    Args:
        N: Independent indices.
        R: Latent width.
        dtype: Dtype of the Jacobians.

    Returns:
        A tile that keeps its Jacobians in registers (see ``test_suffix_scan.py`` for the gate on spills).

    Example:
        >>> launch_shape(8192, 16, torch.float32)
        LaunchShape(padded=16, block=8, warps=4)
    """
    padded = _power_of_two(R)
    area = padded * padded
    shrink = 2 if dtype == torch.float64 else 1
    block = max(1, min(_TILE // shrink // area, _MAX_BLOCK, _power_of_two(N)))
    warps = max(1, min(block * area * shrink // _PER_WARP, _MAX_WARPS))
    return LaunchShape(padded, block, warps)


def _power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length()


@triton.jit(do_not_specialize=["K", "N"])
def scan_kernel(
    J,  # [K, N, R, R], axes: step, index, summed, kept
    start,  # [N, R]
    b,  # [K, N, R]
    out,  # [K + 1, N, R], contiguous
    K,
    N,
    j_step,
    j_index,
    j_summed,
    j_kept,
    start_index,
    start_row,
    b_step,
    b_index,
    b_row,
    R: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_B: tl.constexpr,
    DESCENDING: tl.constexpr,
):
    """One block of indices: ``v <- sum_s J[k, n, s, :] v[s] + b[k]`` over all k, every v stored."""
    exact = tl.float64 if out.dtype.element_ty == tl.float64 else tl.float32
    # 64 bits from here on: K * N * R * R passes 2^31 at training sizes.
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row = tl.arange(0, PADDED).to(tl.int64)
    live = (n < N)[:, None] & (row < R)[None, :]  # [BLOCK, PADDED]
    live_J = live[:, :, None] & (row < R)[None, None, :]  # [BLOCK, PADDED, PADDED]

    J_at = n[:, None, None] * j_index + row[None, :, None] * j_summed + row[None, None, :] * j_kept
    b_at = n[:, None] * b_index + row[None, :] * b_row
    out_at = n[:, None] * R + row[None, :]
    out_step = N.to(tl.int64) * R
    if DESCENDING:
        steps = K.to(tl.int64)
        J += (steps - 1) * j_step
        b += (steps - 1) * b_step
        out += steps * out_step
    move = -1 if DESCENDING else 1

    v = tl.load(start + n[:, None] * start_index + row[None, :] * start_row, mask=live, other=0.0).to(exact)
    tl.store(out + out_at, v.to(out.dtype.element_ty), mask=live)
    for _ in range(K):
        tile = tl.load(J + J_at, mask=live_J, other=0.0).to(exact)
        v = tl.sum(tile * v[:, :, None], axis=1)
        if HAS_B:
            v += tl.load(b + b_at, mask=live, other=0.0).to(exact)
        J += move * j_step
        b += move * b_step
        out += move * out_step
        tl.store(out + out_at, v.to(out.dtype.element_ty), mask=live)


def suffix_scan(J: Tensor, last: Tensor, b: Tensor | None = None) -> Tensor:
    """Solve the adjoint recursion on the device; see :func:`lbi_compile.kernels.reference.suffix_scan`.

    Args:
        J: ``[K, N, R, R]``, any strides.
        last: ``[N, R]``, any strides.
        b: ``[K, N, R]``, any strides, or ``None``.

    Returns:
        ``[K + 1, N, R]``, contiguous, in the dtype of ``last``.
    """
    return _launch(J, last, b, descending=True)


def prefix_scan(J: Tensor, first: Tensor, b: Tensor | None = None) -> Tensor:
    """Run the linear recurrence on the device; see :func:`lbi_compile.kernels.reference.prefix_scan`.

    Args:
        J: ``[K, N, R, R]``, any strides.
        first: ``[N, R]``, any strides.
        b: ``[K, N, R]``, any strides, or ``None``.

    Returns:
        ``[K + 1, N, R]``, contiguous, in the dtype of ``first``.
    """
    return _launch(J.mT, first, b, descending=False)


def _launch(J: Tensor, start: Tensor, b: Tensor | None, *, descending: bool) -> Tensor:
    K, N, R, _ = J.shape
    out = start.new_empty((K + 1, N, R))
    if N == 0:
        return out
    shape = launch_shape(N, R, J.dtype)
    scan_kernel[(triton.cdiv(N, shape.block),)](
        J,
        start,
        start if b is None else b,
        out,
        K,
        N,
        *J.stride(),
        *start.stride(),
        *((0, 0, 0) if b is None else b.stride()),
        R=R,
        PADDED=shape.padded,
        BLOCK=shape.block,
        HAS_B=b is not None,
        DESCENDING=descending,
        num_warps=shape.warps,  # pyright: ignore[reportCallIssue]  an option of Triton's launcher
    )
    return out
