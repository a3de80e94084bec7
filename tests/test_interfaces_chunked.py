"""The chunked interface looks back only, bit for bit."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from lbi_compile.interfaces import ChunkedInterface, chunk_count, tokens_per_chunk
from tests.interface_chain import B, Chain, D, Pointwise, T, build


def test_chunk_numbers():
    counts = {r: chunk_count(r) for r in (1, 2, 3, 4, 6, 7, 8, 10, 12, 14, 16, 24, 32, 64)}
    assert counts == {1: 1, 2: 1, 3: 1, 4: 1, 6: 1, 7: 1, 8: 2, 10: 2, 12: 3, 14: 2, 16: 4, 24: 4, 32: 4, 64: 4}
    assert chunk_count(6, 3) == 3
    assert [tokens_per_chunk(length, 16) for length in (1, 5, 6, 128)] == [1, 1, 2, 26]
    lbi = build("chunked", canvas=torch.randn(B, 128, D))
    assert isinstance(lbi, ChunkedInterface)
    assert (lbi.chunks, lbi.chunk, lbi.chunk_width) == (4, 26, 4)


@pytest.mark.parametrize(("r", "chunks"), [(16, 4), (12, 3), (6, 3), (3, 3), (5, 1)])
@pytest.mark.parametrize("length", [1, 2, 3, 4, 7, 8, 9, 11, 12, 13, 16, 29])
def test_chunked_formulas(r: int, chunks: int, length: int):
    """Against loops over positions."""
    w, chunk = r // chunks, 3
    lbi = build("chunked", r=r, chunks=chunks, chunk=chunk, canvas=torch.randn(B, T, D).double())
    assert isinstance(lbi, ChunkedInterface)
    with torch.no_grad():  # Biases start at zero, which would hide what an empty chunk gets from them.
        for parameter in lbi.parameters():
            parameter.add_(torch.rand_like(parameter))
    canvas, h = torch.randn(2, B, length, D, dtype=torch.float64)
    group = [min(t // chunk, chunks) for t in range(length)]

    def pooled(value: Tensor, c: int) -> Tensor | None:
        rows = [value[:, t] for t in range(length) if group[t] == c]
        return sum(rows[1:], rows[0]) / len(rows) if rows else None

    def norm(value: Tensor) -> Tensor:
        return value / (value.square().mean(-1, keepdim=True) + 1e-6).sqrt() if w >= 4 else value.tanh()

    m = lbi.initial(canvas)
    gate = torch.tanh(lbi.gates[1])
    after = lbi.leave(1, m=m, h=h)
    for c in range(chunks):
        part = slice(c * w, (c + 1) * w)
        first, mean = pooled(canvas, c), pooled(h, c)
        if first is None or mean is None:
            assert not m[:, part].any()
            assert not after[:, part].any()
        else:
            torch.testing.assert_close(m[:, part], lbi.encode_canvas(first))
            torch.testing.assert_close(after[:, part], norm(m[:, part] + gate * lbi.encoders[1](mean)))
    x = lbi.enter(2, canvas, m)
    for t in range(length):
        seen = torch.cat([m[:, : group[t] * w], torch.zeros(B, r - group[t] * w)], 1)
        read = lbi.decoders[2](seen) if group[t] else 0.0
        torch.testing.assert_close(x[:, t], canvas[:, t] + read)


def _chunked_chain(dtype: torch.dtype = torch.float32) -> Chain:
    return Chain(build("chunked", chunk=3, canvas=torch.randn(B, T, D)), part=Pointwise).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [2, 7, 12, 13, 16, 40])
def test_chunked_reads_no_later_position(length: int, dtype: torch.dtype):
    chain = _chunked_chain(dtype)
    canvas = torch.randn(B, length, D, dtype=dtype)
    xs, hs, _ = chain.trace(canvas)
    for t in range(1, length):
        for change in (torch.randn(B, length - t, D, dtype=dtype), torch.tensor(math.nan, dtype=dtype)):
            changed = canvas.clone()
            changed[:, t:] = change
            xs_, hs_, _ = chain.trace(changed)
            for value, other in zip(xs + hs, xs_ + hs_, strict=True):
                assert torch.equal(value[:, :t], other[:, :t])
                assert not torch.equal(value[:, t:], other[:, t:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 3])
def test_chunked_prefix_does_not_depend_on_what_follows(batch: int, dtype: torch.dtype):
    chain = _chunked_chain(dtype)
    canvas = torch.randn(batch, 67, D, dtype=dtype)
    whole = chain(canvas)
    for length in range(1, 67):
        assert torch.equal(chain(canvas[:, :length]), whole[:, :length]), length


@pytest.mark.slow
def test_chunked_prefix_with_wide_long_input():
    """Sizes at which PyTorch splits sums over threads and vectors differently."""
    torch.set_num_threads(2)
    try:
        lbi = build("chunked", canvas=torch.randn(2, 1000, 384))
        canvas = torch.randn(2, 1000, 384)
        whole, m = lbi.initial(canvas), torch.randn(2, 16)
        for length in (1, 200, 201, 399, 400, 401, 799, 801, 802, 999):
            full = min(length // lbi.chunk, lbi.chunks) * lbi.chunk_width
            assert torch.equal(lbi.initial(canvas[:, :length])[:, :full], whole[:, :full])
            assert torch.equal(lbi.enter(1, canvas[:, :length], m), lbi.enter(1, canvas, m)[:, :length])
    finally:
        torch.set_num_threads(1)


def test_chunked_passes_on_what_came_before():
    chain = _chunked_chain()
    canvas = torch.randn(B, 16, D)
    changed = canvas.clone()
    changed[:, 0] += 1
    moved = (chain.trace(canvas)[0][2] - chain.trace(changed)[0][2]).abs().amax((0, 2))
    # Position 0 feeds chunk 0, which its own group does not read.
    assert (moved[1:3] == 0).all()
    assert (moved[3:] > 0).all()


def test_chunked_jacobian_is_block_lower_triangular():
    lbi = build("chunked", chunk=3).double()
    body = nn.Linear(D, D, dtype=torch.float64)
    canvas = torch.randn(1, 16, D, dtype=torch.float64)
    m = torch.randn(1, 16, dtype=torch.float64)
    J = torch.autograd.functional.jacobian(lambda m: lbi.leave(1, m=m, h=body(lbi.enter(1, canvas, m)), z=None), m)
    blocks = J[0, :, 0].unflatten(1, (4, 4)).unflatten(0, (4, 4)).abs().amax((1, 3))  # [C, C]
    assert torch.equal(blocks > 0, torch.ones(4, 4, dtype=torch.bool).tril())
