"""Triton form of a scan with many vectors per index that share its Jacobians: rows of a matrix.

The full products are such a scan, started at the rows of the identity; so are adjoints under ``vmap`` over cotangents.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lbi_compile.kernels.vector_form import STAGES, order, power_of_two


class RowsShape(NamedTuple):
    """What a kernel on rows is specialised to.

    Attributes:
        padded: R rounded up to a power of two.
        rows: Rows per program.
        warps: Warps per program.
    """

    padded: int
    rows: int
    warps: int


def rows_shape(S: int, R: int, dtype: torch.dtype) -> RowsShape:
    """Choose the tile for ``S`` rows of width ``R``.

    Args:
        S: Rows per index.
        R: Latent width.
        dtype: Dtype of the Jacobians.

    Returns:
        A tile whose product stays in registers (see ``test_kernels_sm90.py``).

    Example:
        >>> rows_shape(16, 16, torch.float32)
        RowsShape(padded=16, rows=8, warps=4)
    """
    padded = power_of_two(R)
    shrink = 2 if dtype == torch.float64 else 1
    rows = min(power_of_two(S), 8 if padded * shrink <= 32 else 4)
    return RowsShape(padded, rows, max(1, min(rows * padded * padded * shrink // 512, 16)))


@triton.jit
def next_rows(v, tile):
    """``v @ tile``: ``[ROWS, PADDED]``, ``[PADDED, PADDED]`` -> ``[ROWS, PADDED]``; plain products, no tensor cores."""
    return tl.sum(tile[None, :, :] * v[:, :, None], axis=1)


@triton.jit(do_not_specialize=["K", "N", "S"])
def rows_kernel(
    J,  # [K, N, R, R], axes: step, index, summed, kept
    start,  # [N, S, R]
    b,  # [K, N, S, R]
    out,  # [K + 1, N, S, R], contiguous
    K,
    N,
    S,
    j_step,
    j_index,
    j_summed,
    j_kept,
    start_index,
    start_vector,
    start_row,
    b_step,
    b_index,
    b_vector,
    b_row,
    R: tl.constexpr,
    PADDED: tl.constexpr,
    ORDER: tl.constexpr,
    ROWS: tl.constexpr,
    HAS_B: tl.constexpr,
    DESCENDING: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Some rows of one index: ``v <- v J[k, n] + b[k, n]`` over all k, every v stored."""
    exact = tl.float64 if out.dtype.element_ty == tl.float64 else tl.float32
    if ORDER == "row":
        j_summed, j_kept = R, 1
    elif ORDER == "column":
        j_summed, j_kept = 1, R
    blocks = (S + ROWS - 1) // ROWS
    n = (tl.program_id(0) // blocks).to(tl.int64)
    s = (tl.program_id(0) % blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row = tl.arange(0, PADDED).to(tl.int64)
    live = (s < S)[:, None] & (row < R)[None, :]  # [ROWS, PADDED]
    live_J = (row < R)[:, None] & (row < R)[None, :]  # [PADDED, PADDED]

    J_at = n * j_index + row[:, None] * j_summed + row[None, :] * j_kept
    b_at = n * b_index + s[:, None] * b_vector + row[None, :] * b_row
    out_at = (n * S + s)[:, None] * R + row[None, :]
    out_step = N.to(tl.int64) * S * R
    if DESCENDING:
        steps = K.to(tl.int64)
        J += (steps - 1) * j_step
        b += (steps - 1) * b_step
        out += steps * out_step
    move = -1 if DESCENDING else 1

    start_at = n * start_index + s[:, None] * start_vector + row[None, :] * start_row
    v = tl.load(start + start_at, mask=live, other=0.0).to(exact)
    tl.store(out + out_at, v.to(out.dtype.element_ty), mask=live)
    for _ in tl.range(0, K, num_stages=STAGES):  # pyright: ignore[reportGeneralTypeIssues]
        v = next_rows(v, tl.load(J + J_at, mask=live_J, other=0.0).to(exact))
        if HAS_B:
            v += tl.load(b + b_at, mask=live, other=0.0).to(exact)
        J += move * j_step
        b += move * b_step
        out += move * out_step
        tl.store(out + out_at, v.to(out.dtype.element_ty), mask=live)


def sweep_rows(J: Tensor, start: Tensor, b: Tensor | None, out: Tensor, *, descending: bool) -> None:
    """Fill ``out`` with ``v <- J[k]^T v + b[k]`` for every vector v of every index.

    Args:
        J: ``[K, N, R, R]``, any strides; transposed by the caller for the other direction.
        start: ``[N, S, R]``, any strides.
        b: ``[K, N, S, R]``, any strides, or ``None``.
        out: ``[K + 1, N, S, R]``, contiguous.
        descending: From the last step to the first.

    Example:
        >>> sweep_rows(J, start, None, out, descending=True)  # doctest: +SKIP
    """
    K, N, R, _ = J.shape
    S = start.shape[1]
    shape = rows_shape(S, R, J.dtype)
    rows_kernel[(N * triton.cdiv(S, shape.rows),)](
        J,
        start,
        start if b is None else b,
        out,
        K,
        N,
        S,
        *J.stride(),
        *start.stride(),
        *((0, 0, 0, 0) if b is None else b.stride()),
        R=R,
        PADDED=shape.padded,
        ORDER=order(J),
        ROWS=shape.rows,
        HAS_B=b is not None,
        DESCENDING=descending,
        STAGES=STAGES,
        num_warps=shape.warps,  # pyright: ignore[reportCallIssue]  an option of Triton's launcher
    )
