"""Triton two-level form of the scans, for few indices and many steps: first across chunks of steps, then inside them.

1. Every chunk of steps is multiplied out to one affine map, all chunks at a time.
2. One program per index walks over the maps and leaves the value each chunk begins with.
3. The vector form sweeps all chunks at a time from there.

A product can leave the range of a number, or lose to cancellation, where the values themselves do neither. Step 1 keeps
a mark per chunk and step 2 compares magnitudes; a chunk that does not pass is walked step by step (README.md).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lbi_compile.kernels.rows_form import next_rows, rows_shape
from lbi_compile.kernels.vector_form import STAGES, order, power_of_two, sweep


@triton.jit(do_not_specialize=["K", "N", "chunk", "first"])
def chunk_maps_kernel(
    J,  # [K, N, R, R], axes: step, index, summed, kept
    b,  # [K, N, R]
    maps,  # [chunks, N, ROWS_ALL, R], contiguous: R rows of the product, then the offset where there is b
    sound,  # [chunks, N, blocks], contiguous: 1 where the range was kept, else 0
    K,
    N,
    chunk,
    first,
    j_step,
    j_index,
    j_summed,
    j_kept,
    b_step,
    b_index,
    b_row,
    R: tl.constexpr,
    PADDED: tl.constexpr,
    ORDER: tl.constexpr,
    ROWS: tl.constexpr,
    ROWS_ALL: tl.constexpr,
    DESCENDING: tl.constexpr,
    STAGES: tl.constexpr,
    RANGE: tl.constexpr,
):
    """Some rows of one chunk's map of one index: unit vectors (and 0 for the offset) swept over its steps."""
    exact = maps.dtype.element_ty
    if ORDER == "row":
        j_summed, j_kept = R, 1
    elif ORDER == "column":
        j_summed, j_kept = 1, R
    blocks = (ROWS_ALL + ROWS - 1) // ROWS
    n = (tl.program_id(0) // blocks).to(tl.int64)
    part = tl.program_id(0) % blocks
    s = part * ROWS + tl.arange(0, ROWS)
    row = tl.arange(0, PADDED)
    live = (s < ROWS_ALL)[:, None] & (row < R)[None, :]  # [ROWS, PADDED]
    live_J = (row < R)[:, None] & (row < R)[None, :]  # [PADDED, PADDED]
    piece = (tl.program_id(1) + first).to(tl.int64)
    low = piece * chunk
    steps = tl.minimum(K - low, chunk).to(tl.int32)

    wide = row.to(tl.int64)
    J_at = n * j_index + wide[:, None] * j_summed + wide[None, :] * j_kept
    b_at = n * b_index + wide * b_row
    begin = low
    if DESCENDING:
        begin = low + steps - 1
    J += begin * j_step
    b += begin * b_step
    move = -1 if DESCENDING else 1

    is_product = (s < R)[:, None]
    v = tl.where(is_product & (s[:, None] == row[None, :]), 1.0, 0.0).to(exact)
    has_product = part * ROWS < R
    size = 1.0
    kept = True
    for _ in tl.range(0, steps, num_stages=STAGES):  # pyright: ignore[reportGeneralTypeIssues]
        v = next_rows(v, tl.load(J + J_at, mask=live_J, other=0.0).to(exact))
        if ROWS_ALL > R:
            added = tl.load(b + b_at, mask=row < R, other=0.0).to(exact)
            v += tl.where(s[:, None] == R, added[None, :], 0.0)
        now = tl.max(tl.where(is_product, tl.abs(v), 0.0)).to(tl.float32)
        # Nothing over- or underflowed, and no step shrank the rows as only a projection or a cancellation does.
        kept = kept & (now < RANGE) & (now * RANGE > 1.0) & (now * 16.0 > size)
        size = now
        J += move * j_step
        b += move * b_step

    place = piece * N + n
    tl.store(maps + (place * ROWS_ALL + s[:, None]) * R + row[None, :], v, mask=live)
    tl.store(sound + place * blocks + part, (kept | (has_product == 0)).to(tl.int32))


@triton.jit(do_not_specialize=["K", "N", "chunk", "chunks"])
def chunk_ends_kernel(
    J,
    start,  # [N, R]
    b,
    maps,
    sound,
    ends,  # [chunks, N, R], contiguous: the value each chunk begins with
    K,
    N,
    chunk,
    chunks,
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
    ORDER: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCKS_PADDED: tl.constexpr,
    HAS_B: tl.constexpr,
    DESCENDING: tl.constexpr,
    CANCELLED: tl.constexpr,
):
    """One index: over its chunks by their maps, or step by step where a map is not to be trusted."""
    exact = ends.dtype.element_ty
    if ORDER == "row":
        j_summed, j_kept = R, 1
    elif ORDER == "column":
        j_summed, j_kept = 1, R
    n = tl.program_id(0).to(tl.int64)
    row = tl.arange(0, PADDED).to(tl.int64)
    part = tl.arange(0, BLOCKS_PADDED)
    live = row < R
    live_J = live[:, None] & live[None, :]
    rows_all = R + 1 if HAS_B else R
    J_at = n * j_index + row[:, None] * j_summed + row[None, :] * j_kept
    b_at = n * b_index + row * b_row
    move = -1 if DESCENDING else 1

    v = tl.load(start + n * start_index + row * start_row, mask=live, other=0.0).to(exact)
    piece = chunks.to(tl.int64) - 1 if DESCENDING else chunks.to(tl.int64) * 0
    for _ in range(chunks - 1):
        place = piece * N + n
        tl.store(ends + place * R + row, v, mask=live)

        rows = maps + place * rows_all * R
        product = tl.load(rows + row[:, None] * R + row[None, :], mask=live_J, other=0.0)
        far = tl.sum(product * v[:, None], axis=0)
        weight = tl.max(tl.abs(product)) * tl.max(tl.abs(v))
        if HAS_B:
            offset = tl.load(rows + R * R + row, mask=live, other=0.0)
            far += offset
            weight = tl.maximum(weight, tl.max(tl.abs(offset)))
        marks = tl.load(sound + place * BLOCKS + part, mask=part < BLOCKS, other=1)
        # Comparisons with NaN are false, so a NaN anywhere ends up in the steps.
        finite = tl.min((tl.abs(far) < float("inf")).to(tl.int32))
        trusted = tl.min(marks) * finite * (tl.max(tl.abs(far)) * CANCELLED >= weight).to(tl.int32)

        low = piece * chunk
        inside = tl.minimum(K - low, chunk).to(tl.int32)
        k = low + inside - 1 if DESCENDING else low
        v = tl.where(trusted != 0, far, v)
        for _ in range(tl.where(trusted != 0, 0, inside)):
            tile = tl.load(J + k * j_step + J_at, mask=live_J, other=0.0).to(exact)
            v = tl.sum(tile * v[:, None], axis=0)
            if HAS_B:
                v += tl.load(b + k * b_step + b_at, mask=live, other=0.0).to(exact)
            k += move
        piece += move
    tl.store(ends + (piece * N + n) * R + row, v, mask=live)


# A product may grow or shrink by this much: entries that matter stay far from the ends of float32, and of float64.
_RANGE = 2.0**60
# A value this much smaller than the terms it is the sum of has lost too many of their digits.
_CANCELLED = {torch.float32: 2.0**10, torch.float64: 2.0**20}


def sweep_chunks(J: Tensor, start: Tensor, b: Tensor | None, out: Tensor, *, chunk: int, descending: bool) -> None:
    """Fill ``out`` with ``v <- J[k]^T v + b[k]`` over all steps, chunks of them at a time.

    Args:
        J: ``[K, N, R, R]``, any strides; transposed by the caller for the other direction.
        start: ``[N, R]``, any strides.
        b: ``[K, N, R]``, any strides, or ``None``.
        out: ``[K + 1, N, R]``, contiguous.
        chunk: Steps per chunk.
        descending: From the last step to the first.

    Example:
        >>> sweep_chunks(J, last, None, out, chunk=64, descending=True)  # doctest: +SKIP
    """
    K, N, R, _ = J.shape
    exact = torch.float64 if J.dtype == torch.float64 else torch.float32
    chunks = -(-K // chunk)
    rows_all = R if b is None else R + 1
    shape = rows_shape(rows_all, R, J.dtype)
    blocks = -(-rows_all // shape.rows)
    maps = J.new_empty((chunks, N, rows_all, R), dtype=exact)
    sound = J.new_empty((chunks, N, blocks), dtype=torch.int32)
    ends = J.new_empty((chunks, N, R), dtype=exact)
    some_b = start if b is None else b
    b_strides = (0, 0, 0) if b is None else b.stride()
    if chunks > 1:  # nobody needs the map of the chunk that is reached last
        chunk_maps_kernel[(N * blocks, chunks - 1)](
            J,
            some_b,
            maps,
            sound,
            K,
            N,
            chunk,
            1 if descending else 0,
            *J.stride(),
            *b_strides,
            R=R,
            PADDED=shape.padded,
            ORDER=order(J),
            ROWS=shape.rows,
            ROWS_ALL=rows_all,
            DESCENDING=descending,
            STAGES=STAGES,
            RANGE=_RANGE,
            num_warps=shape.warps,  # pyright: ignore[reportCallIssue]  an option of Triton's launcher
        )
    chunk_ends_kernel[(N,)](
        J,
        start,
        some_b,
        maps,
        sound,
        ends,
        K,
        N,
        chunk,
        chunks,
        *J.stride(),
        *start.stride(),
        *b_strides,
        R=R,
        PADDED=shape.padded,
        ORDER=order(J),
        BLOCKS=blocks,
        BLOCKS_PADDED=power_of_two(blocks),
        HAS_B=b is not None,
        DESCENDING=descending,
        CANCELLED=_CANCELLED[exact],
        num_warps=ends_warps(R, exact),  # pyright: ignore[reportCallIssue]  an option of Triton's launcher
    )
    sweep(J, ends, b, out, chunk=chunk, descending=descending)


def ends_warps(R: int, exact: torch.dtype) -> int:
    """Warps of the walk over the chunks: 64 bytes of a map per thread.

    Example:
        >>> ends_warps(16, torch.float32), ends_warps(64, torch.float64)
        (1, 16)
    """
    return max(1, power_of_two(R) ** 2 * exact.itemsize // 2048)
