"""The chunked interface: one latent per sample whose parts look back only, for causal models."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import LatentWidthError
from .base import SMALLEST_NORM, Decoder, Draw, Encoder, Interface

MOST_CHUNKS = 4


def chunk_count(r: int, chunks: int | None = None) -> int:
    """How many chunks C a latent of width ``r`` has.

    The most that divide ``r``, are no more than 4 and leave at least 4 numbers to each: 4 of 4 for 16, 2 of 4 for 8,
    2 of 5 for 10. Below 8, and where nothing divides, one.

    Args:
        r: Latent width R.
        chunks: A number to use instead, however narrow the chunks get.

    Raises:
        LatentWidthError: ``chunks`` does not divide ``r``.

    Example:
        >>> chunk_count(16), chunk_count(12), chunk_count(6), chunk_count(6, chunks=3)
        (4, 3, 1, 3)
    """
    if chunks is None:
        return max(c for c in range(1, MOST_CHUNKS + 1) if c == 1 or (r % c == 0 and r // c >= SMALLEST_NORM))
    if chunks < 1 or r % chunks:
        raise LatentWidthError(
            f"a latent of width r={r} in {chunks} chunks",
            expected="a positive number of chunks that divides r",
            do=f"take r={max(1, r // max(chunks, 1)) * max(chunks, 1)}, or leave the number of chunks to the library",
        )
    return chunks


def tokens_per_chunk(T: int, r: int, chunks: int | None = None) -> int:
    """Positions per chunk for sequences of about ``T``: `ceil(T / (C + 1))`, as the last group feeds no chunk.

    Example:
        >>> tokens_per_chunk(128, 16)
        26
    """
    return math.ceil(T / (chunk_count(r, chunks) + 1))


class Chunks:
    """Groups of positions that look back only: C chunks of ``length`` positions, and a last group of all the rest.

    Args:
        count: Number of chunks C.
        length: Positions per chunk.
    """

    def __init__(self, count: int, length: int) -> None:
        self.count, self.length = count, length

    def pool(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """Mean over each chunk's positions, `[B, T, D]` -> `[B, C, D]`, and which chunks have any `[C, 1]`.

        Sums run over an axis of fixed length: their order, and so their bits, does not depend on T. Padding by the full
        length keeps shapes free of a case distinction on T, which a dynamic graph could not hold.
        """
        length = self.count * self.length
        slots = F.pad(value, (0, 0, 0, length))[:, :length].unflatten(1, (self.count, self.length))
        starts = torch.arange(self.count, device=value.device) * self.length
        counts = (value.shape[1] - starts).clamp(0, self.length)[:, None]  # [C, 1]
        return slots.sum(2) / counts.clamp(min=1).to(value.dtype), counts > 0

    def readable(self, latent: Tensor) -> Tensor:
        """What groups 1..C may read: the chunks before them, the others zero, `[B, C, w]` -> `[B, C, C w]`."""
        index = torch.arange(self.count, device=latent.device)
        past = index[:, None] >= index  # [C, C]: group g = row + 1 may read chunks 0..g-1
        # where, not a product with zeros: a NaN in a later chunk must not reach an earlier group.
        return torch.where(past[:, :, None], latent[:, None], latent.new_zeros(())).flatten(2)

    def spread(self, rows: Tensor, positions: int) -> Tensor:
        """Give each position its group's row, `[B, C + 1, D]` (groups 0..C) -> `[B, T, D]`."""
        blocks = rows[:, :-1, None].expand(-1, -1, self.length, -1).flatten(1, 2)  # [B, C * length, D]
        rest = rows[:, -1:].expand(-1, positions, -1)
        return torch.cat([blocks, rest], 1)[:, :positions]


class ChunkedInterface(Interface):
    """One latent `[B, R]` per sample, made of C chunks of w = R / C numbers that look back only.

    Position t belongs to group `min(t // chunk, C)`. Group g < C is pooled into chunk g of the latent, and its
    positions read chunks 0..g-1 only: group 0 reads nothing, group C reads all and is pooled into none. Per chunk,
    `m_0 = E_in(mean canvas)` and `m_{k+1} = norm(m_k + tanh(g_k) * D_k(mean h_k))`, with an RMS norm for w >= 4 and
    tanh below; a chunk without positions is 0. So `J_k` is `R x R`, block lower triangular, and nothing looks ahead:
    whatever a position reads comes from chunks that are full, the same bit for bit however many positions follow.
    With one chunk (R < 8) no region hears a latent and passes on what it heard: such a model has to sum its readout.

    Canvas and `h_k` are `[B, T, D]`, for any T.

    Args:
        draw: Makes the layers.
        regions: Number of regions K.
        width: Width D of the canvas.
        r: Latent width R.
        chunks: Number of chunks C.
        chunk: Positions per chunk.
        pooled_widths: By region, width of what is pooled; by default ``width``.
    """

    kind: ClassVar[str] = "chunked"
    first_latent: ClassVar[int | None] = 0
    reader_offsets: ClassVar[Mapping[str, int]] = {"decoders": 0, "encoders": 0, "gates": 0}

    def region_of(self, name: str) -> int | None:
        return 0 if name.startswith("encode_canvas.") else super().region_of(name)

    def __init__(
        self,
        draw: Draw,
        *,
        regions: int,
        width: int,
        r: int,
        chunks: int,
        chunk: int,
        pooled_widths: Sequence[int] | None = None,
    ) -> None:
        super().__init__(regions=regions, r=r)
        pooled_widths = pooled_widths or (width,) * regions
        self.chunks, self.chunk, self.chunk_width = chunks, chunk, r // chunks
        self._groups = Chunks(chunks, chunk)
        self.readouts = _readouts(chunks)
        hidden = 4 * r
        self.encode_canvas = Encoder(draw, width=width, hidden=hidden, r=self.chunk_width)
        self.decoders = nn.ModuleList(Decoder(draw, r=r, hidden=hidden, width=width) for _ in range(regions))
        self.encoders = nn.ModuleList(
            Encoder(draw, width=width, hidden=hidden, r=self.chunk_width) for width in pooled_widths[: regions - 1]
        )
        self.gates = nn.ParameterList(draw.parameter(math.atanh(1 / math.sqrt(k + 2))) for k in range(regions - 1))

    @classmethod
    def readouts_for(cls, r: int) -> tuple[str, ...]:
        return _readouts(chunk_count(r))

    def initial(self, canvas: Tensor) -> Tensor:
        means, filled = self._groups.pool(canvas)
        return keep(self.encode_canvas(means), filled).flatten(1)

    def enter(self, k: int, canvas: Tensor, m: Tensor) -> Tensor:
        latent = m.unflatten(1, (self.chunks, self.chunk_width))  # [B, C, w]
        decoded = self.decoders[k](self._groups.readable(latent)).to(canvas.dtype)  # [B, C, D]
        rows = F.pad(decoded, (0, 0, 1, 0))  # group 0 reads nothing
        return canvas + self._groups.spread(rows, canvas.shape[1])

    def leave(self, k: int, *, m: Tensor, h: Tensor, z: Tensor | None = None) -> Tensor | None:
        if k == self.regions - 1:
            return None
        means, filled = self._groups.pool(h)
        latent = m.unflatten(1, (self.chunks, self.chunk_width))
        latent = latent + self.gates[k].tanh() * self.encoders[k](means)
        # CUDA's autocast lets the norm of a bfloat16 latent return float32.
        return keep(chunk_norm(latent), filled).flatten(1).to(m.dtype)

    def latent_shape(self, canvas_shape: tuple[int, ...]) -> tuple[int, ...]:
        return canvas_shape[0], self.r

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, chunks={self.chunks}, chunk={self.chunk}"


def chunk_norm(latent: Tensor) -> Tensor:
    """Norm of each chunk by itself, `[B, C, w]`: RMS for w >= 4, tanh below. (One across chunks would look ahead.)"""
    if latent.shape[-1] < SMALLEST_NORM:
        return latent.tanh()
    return latent * torch.rsqrt(latent.square().mean(-1, keepdim=True) + 1e-6)


def _readouts(chunks: int) -> tuple[str, ...]:
    """With one chunk, what `U_k` adds is pooled into nothing: it leaves its region by the sum only."""
    return ("sum",) if chunks == 1 else ("sum", "last")


def keep(latent: Tensor, filled: Tensor) -> Tensor:
    """Zero the chunks that have no positions."""
    return torch.where(filled, latent, latent.new_zeros(()))
