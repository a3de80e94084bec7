"""The token interface, one latent per position, and its control in which nothing crosses."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import DECODED_SHARE, Decoder, Draw, Interface

CELLS = ("gru", "linear")


class TokenEncoder(nn.Module):
    """`Linear(norm(a))` per position, `[..., D]` -> `[..., R]`."""

    def __init__(self, draw: Draw, *, width: int, r: int, gain: float) -> None:
        super().__init__()
        self.norm = draw.norm(width)
        self.out = draw.linear(width, r, gain=gain)

    def forward(self, a: Tensor) -> Tensor:
        dtype = self.out.weight.dtype
        # Autocast would give another dtype than the cell does: latents keep the dtype of the parameters.
        return self.out(self.norm(a.to(dtype))).to(dtype)


class GRUCell(nn.Module):
    """Gated recurrent unit over depth, `[..., R]`, in plain operations; the gate starts at keeping ``keep`` of m.

    Cho et al., "Learning Phrase Representations using RNN Encoder-Decoder", 2014, in the form of ``torch.nn.GRUCell``.
    """

    def __init__(self, draw: Draw, *, r: int, keep: float) -> None:
        super().__init__()
        self.input = draw.linear(r, 3 * r)
        self.latent = draw.linear(r, 3 * r, bias=False)
        with torch.no_grad():
            self.input.bias[:r] = math.log(keep / (1 - keep))

    def forward(self, z: Tensor, m: Tensor) -> Tensor:
        z_keep, z_reset, z_new = self.input(z).chunk(3, -1)
        m_keep, m_reset, m_new = self.latent(m).chunk(3, -1)
        keep = torch.sigmoid(z_keep + m_keep)
        new = torch.tanh(z_new + torch.sigmoid(z_reset + m_reset) * m_new)
        return keep * m + (1 - keep) * new


class LinearCell(nn.Module):
    """`A m + z` per position, `[..., R]`; A starts as ``keep`` times a rotation near the identity."""

    def __init__(self, draw: Draw, *, r: int, keep: float) -> None:
        super().__init__()
        # Not the identity itself: matrices that commute with everything would hide a transposed or swapped Jacobian.
        turn = draw.normal(r, r) * (0.3 / math.sqrt(r))
        self.A = draw.parameter(keep * torch.linalg.matrix_exp(turn - turn.T))

    def forward(self, z: Tensor, m: Tensor) -> Tensor:
        return F.linear(m, self.A) + z


class TokenLayers(Interface):
    """The parameters that the token interface and its control share.

    Cells stand in regions 1..K-2 and decoders in 1..K-1; ``first_encoder`` is the first of the K - 1 regions that
    encode. Linear cells start at `m_{k+1} = sqrt(k / (k + 1)) m_k + sqrt(1 / (k + 1)) z_k` up to rotations, with the
    second factor inside the encoder: the latent keeps unit variance at any depth, every region weighs the same in it,
    and no region's word fades exponentially. GRU cells start with their gate at keeping `k / (k + 1)`: a running mean,
    which shrinks with depth where regions say unlike things (to a quarter after 24).

    Args:
        widths: Width of `a_k` by region.
        own_finish: By region, whether its finish is empty, so that the decoder is an MLP R -> 4R -> D instead of a
            linear layer.
    """

    first_encoder: ClassVar[int]
    splits: ClassVar[bool] = True
    parallel: ClassVar[bool] = True
    # A latent never depends on any h_k: under "last" all finishes and decoders but the last region's would be idle.
    readouts: tuple[str, ...] = ("sum",)

    def __init__(
        self, draw: Draw, *, regions: int, r: int, widths: Sequence[int], own_finish: Sequence[bool], cell: str
    ) -> None:
        super().__init__(regions=regions, r=r)
        self.cell = cell
        self.encoders = nn.ModuleDict()
        for k in range(self.first_encoder, self.first_encoder + regions - 1):
            gain = self._encoder_gain(k) if cell == "linear" else 1.0
            self.encoders[str(k)] = TokenEncoder(draw, width=widths[k], r=r, gain=gain)
        self.cells = nn.ModuleDict()
        for k in range(1, regions - 1):
            if cell == "linear":
                self.cells[str(k)] = LinearCell(draw, r=r, keep=math.sqrt(k / (k + 1)))
            else:
                self.cells[str(k)] = GRUCell(draw, r=r, keep=k / (k + 1))
        self.decoders = nn.ModuleDict()
        for k in range(1, regions):
            if own_finish[k]:
                self.decoders[str(k)] = Decoder(draw, r=r, hidden=4 * r, width=widths[k])
            else:
                self.decoders[str(k)] = draw.linear(r, widths[k], gain=DECODED_SHARE * draw.scale)

    def _encoder_gain(self, k: int) -> float:
        """Root mean square of `z_k` with which linear cells give latents of unit variance."""
        raise NotImplementedError

    def encode(self, k: int, a: Tensor) -> Tensor | None:
        return self.encoders[str(k)](a) if str(k) in self.encoders else None

    def _add(self, k: int, a: Tensor, latent: Tensor) -> Tensor:
        return a + self.decoders[str(k)](latent).to(a.dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, cell={self.cell!r}"


class TokenInterface(TokenLayers):
    """One latent `[B, T, R]` per position: causal wherever the model is, with an R x R Jacobian for each position.

    `z_k = Linear(norm(a_k))` for k <= K-2; `m_1 = z_0`, `m_{k+1} = cell_k(z_k, m_k)`;
    `h_k = finish_k(a_k + decode_k(m_k))` for k >= 1. Bodies read the canvas only.
    """

    kind: ClassVar[str] = "token"
    first_latent: ClassVar[int | None] = 1
    first_encoder: ClassVar[int] = 0
    reader_offsets: ClassVar[Mapping[str, int]] = {"encoders": 0, "decoders": 0}
    between: ClassVar[tuple[str, ...]] = ("cells",)

    def _encoder_gain(self, k: int) -> float:
        return 1 / math.sqrt(k + 1)

    def inject(self, k: int, a: Tensor, z: Tensor | None, m: Tensor | None) -> Tensor:
        return a if m is None else self._add(k, a, m)

    def leave(self, k: int, *, m: Tensor | None, h: Tensor | None = None, z: Tensor | None) -> Tensor | None:
        # Region 0 starts the latent, the last one ends it: neither has a cell.
        return self.cells[str(k)](z, m) if str(k) in self.cells else z

    def latent_shape(self, canvas_shape: tuple[int, ...]) -> tuple[int, ...]:
        return *canvas_shape[:-1], self.r


class SelfTokenInterface(TokenLayers):
    """Control of the token interface: as many parameters and operations, but each region hears only itself.

    With `u_k = cell_k(z_k, z_k)` for 1 <= k <= K-2 and `u_{K-1} = z_{K-1}`: `h_k = finish_k(a_k + decode_k(u_k))`.
    """

    kind: ClassVar[str] = "self"
    first_encoder: ClassVar[int] = 1
    reader_offsets: ClassVar[Mapping[str, int]] = {"encoders": 0, "cells": 0, "decoders": 0}

    def _encoder_gain(self, k: int) -> float:
        return 1.0 if k == self.regions - 1 else 1 / (1 + math.sqrt(k / (k + 1)))

    def inject(self, k: int, a: Tensor, z: Tensor | None, m: Tensor | None) -> Tensor:
        if z is None:
            return a
        return self._add(k, a, self.cells[str(k)](z, z) if str(k) in self.cells else z)
