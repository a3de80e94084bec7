"""Triton vector form of the scans: one sweep over the steps, every index in parallel, each Jacobian moved once.

The same kernel sweeps whole scans and, with a start per chunk, the chunks of the chunked form.
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

# Jacobians on their way at a time, this step's included. Where Triton cannot copy them ahead of time (elements of two
# bytes that are not neighbours in memory) they are loaded when they are needed.
STAGES = 4


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
        A tile that keeps its Jacobians in registers (see ``test_kernels_sm90.py`` for the gate on spills).

    Example:
        >>> launch_shape(8192, 16, torch.float32)
        LaunchShape(padded=16, block=8, warps=4)
    """
    padded = power_of_two(R)
    area = padded * padded
    shrink = 2 if dtype == torch.float64 else 1
    block = max(1, min(_TILE // shrink // area, _MAX_BLOCK, power_of_two(N)))
    warps = max(1, min(block * area * shrink // _PER_WARP, _MAX_WARPS))
    return LaunchShape(padded, block, warps)


def power_of_two(size: int) -> int:
    """The smallest power of two that is not below ``size``.

    Example:
        >>> power_of_two(33)
        64
    """
    return 1 << (size - 1).bit_length()


def order(J: Tensor) -> str:
    """How the entries of one Jacobian lie: ``"row"``, ``"column"`` or ``"any"``.

    Triton learns from a stride that it is 1 or a multiple of 16, but not that it is 4 or 8; told so, it moves 16 bytes
    at a time there too, and can copy elements of two bytes ahead of time.

    Example:
        >>> order(torch.ones(2, 3, 4, 4)), order(torch.ones(2, 3, 4, 4).mT), order(torch.ones(2, 3, 4, 8)[..., :4])
        ('row', 'column', 'any')
    """
    R = J.shape[-1]
    return {(R, 1): "row", (1, R): "column"}.get((J.stride(2), J.stride(3)), "any")


@triton.jit(do_not_specialize=["K", "N", "chunk"])
def scan_kernel(
    J,  # [K, N, R, R], axes: step, index, summed, kept
    start,  # [chunks, N, R]
    b,  # [K, N, R]
    out,  # [K + 1, N, R], contiguous
    K,
    N,
    chunk,
    j_step,
    j_index,
    j_summed,
    j_kept,
    start_chunk,
    start_index,
    start_row,
    b_step,
    b_index,
    b_row,
    R: tl.constexpr,
    PADDED: tl.constexpr,
    ORDER: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_B: tl.constexpr,
    DESCENDING: tl.constexpr,
    SHARED: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One block of indices, one chunk: ``v <- sum_s J[k, n, s, :] v[s] + b[k]`` over its k, every v stored."""
    exact = tl.float64 if out.dtype.element_ty == tl.float64 else tl.float32
    if ORDER == "row":
        j_summed, j_kept = R, 1
    elif ORDER == "column":
        j_summed, j_kept = 1, R
    # 64 bits from here on: K * N * R * R passes 2^31 at training sizes.
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row = tl.arange(0, PADDED).to(tl.int64)
    live = (n < N)[:, None] & (row < R)[None, :]  # [BLOCK, PADDED]
    piece = tl.program_id(1).to(tl.int64)
    low = piece * chunk
    steps = tl.minimum(K - low, chunk).to(tl.int32)

    if SHARED:  # one Jacobian for every index: a program reads it once, not once per index
        J_at = row[None, :, None] * j_summed + row[None, None, :] * j_kept
        live_J = (row < R)[None, :, None] & (row < R)[None, None, :]  # [1, PADDED, PADDED]
    else:
        J_at = n[:, None, None] * j_index + row[None, :, None] * j_summed + row[None, None, :] * j_kept
        live_J = live[:, :, None] & (row < R)[None, None, :]  # [BLOCK, PADDED, PADDED]
    b_at = n[:, None] * b_index + row[None, :] * b_row
    out_at = n[:, None] * R + row[None, :]
    out_step = N.to(tl.int64) * R
    begin = low
    if DESCENDING:
        begin = low + steps
        J += (begin - 1) * j_step
        b += (begin - 1) * b_step
    else:
        J += begin * j_step
        b += begin * b_step
    out += begin * out_step
    move = -1 if DESCENDING else 1

    start += piece * start_chunk
    v = tl.load(start + n[:, None] * start_index + row[None, :] * start_row, mask=live, other=0.0).to(exact)
    if begin == (K if DESCENDING else 0):  # every other chunk begins with what its neighbour ends with
        tl.store(out + out_at, v.to(out.dtype.element_ty), mask=live)
    for _ in tl.range(0, steps, num_stages=STAGES):  # pyright: ignore[reportGeneralTypeIssues]
        tile = tl.load(J + J_at, mask=live_J, other=0.0).to(exact)
        v = tl.sum(tile * v[:, :, None], axis=1)
        if HAS_B:
            v += tl.load(b + b_at, mask=live, other=0.0).to(exact)
        J += move * j_step
        b += move * b_step
        out += move * out_step
        tl.store(out + out_at, v.to(out.dtype.element_ty), mask=live)


def sweep(J: Tensor, start: Tensor, b: Tensor | None, out: Tensor, *, chunk: int, descending: bool) -> None:
    """Fill ``out`` with ``v <- J[k]^T v + b[k]`` over the steps of every chunk.

    Args:
        J: ``[K, N, R, R]``, any strides; transposed by the caller for the other direction.
        start: ``[chunks, N, R]``, where each chunk begins; any strides.
        b: ``[K, N, R]``, any strides, or ``None``.
        out: ``[K + 1, N, R]``, contiguous.
        chunk: Steps per chunk, at least 1.
        descending: From the last step to the first.

    Example:
        >>> sweep(J, last[None], None, out, chunk=J.shape[0], descending=True)  # doctest: +SKIP
    """
    K, N, R, _ = J.shape
    shape = launch_shape(N, R, J.dtype)
    scan_kernel[(triton.cdiv(N, shape.block), start.shape[0])](
        J,
        start,
        start if b is None else b,
        out,
        K,
        N,
        chunk,
        *J.stride(),
        *start.stride(),
        *((0, 0, 0) if b is None else b.stride()),
        R=R,
        PADDED=shape.padded,
        ORDER=order(J),
        BLOCK=shape.block,
        HAS_B=b is not None,
        DESCENDING=descending,
        SHARED=N > 1 and J.stride(1) == 0,
        STAGES=STAGES,
        num_warps=shape.warps,  # pyright: ignore[reportCallIssue]  an option of Triton's launcher
    )
