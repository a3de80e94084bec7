"""The pooled interface, one latent per sample, and its control in which nothing crosses."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor, nn

from .base import Decoder, Draw, Encoder, Interface


class PooledLayers(Interface):
    """The parameters that the pooled interface and its control share.

    Region k has a decoder `U_k`; between regions k and k + 1 stand an encoder `D_k`, a gate `g_k` and a norm. Gates
    start at tanh(g_k) = 1 / sqrt(k + 2): then each region weighs about as much in the latent as every one before it.
    """

    def __init__(self, draw: Draw, *, regions: int, width: int, r: int) -> None:
        super().__init__(regions=regions, r=r)
        hidden = 4 * r
        self.encode_canvas = Encoder(draw, width=width, hidden=hidden, r=r)
        self.decoders = nn.ModuleList(Decoder(draw, r=r, hidden=hidden, width=width) for _ in range(regions))
        self.encoders = nn.ModuleList(Encoder(draw, width=width, hidden=hidden, r=r) for _ in range(regions - 1))
        self.gates = nn.ParameterList(draw.parameter(math.atanh(1 / math.sqrt(k + 2))) for k in range(regions - 1))
        self.norms = nn.ModuleList(draw.latent_norm(r) for _ in range(regions - 1))

    def _read(self, k: int, canvas: Tensor, latent: Tensor) -> Tensor:
        """`canvas + U_k(latent)`, the same for all positions, `[B, D]` or `[B, T, D]`."""
        decoded = self.decoders[k](latent).to(canvas.dtype)
        return canvas + (decoded.unsqueeze(1) if canvas.dim() == 3 else decoded)

    def _step(self, k: int, latent: Tensor, value: Tensor) -> Tensor:
        """`norm(latent + tanh(g_k) * D_k(mean value))`, `[B, R]`."""
        step = latent + self.gates[k].tanh() * self.encoders[k](_mean(value))
        return self.norms[k](step).to(latent.dtype)  # CUDA's autocast lets a norm of bfloat16 return float32.


class PooledInterface(PooledLayers):
    """One latent `[B, R]` per sample, as in latent bridge interfaces.

    `m_0 = E_in(mean canvas)`; region k reads `canvas + U_k(m_k)`;
    `m_{k+1} = LayerNorm(m_k + tanh(g_k) * D_k(mean h_k))`; means are over positions. Canvas and `h_k` are `[B, D]` or
    `[B, T, D]`. Below four numbers tanh takes the place of the LayerNorm.
    """

    kind: ClassVar[str] = "pooled"
    first_latent: ClassVar[int | None] = 0
    reader_offsets: ClassVar[Mapping[str, int]] = {"decoders": 0, "encoders": 0, "gates": 0, "norms": 0}

    def region_of(self, name: str) -> int | None:
        return 0 if name.startswith("encode_canvas.") else super().region_of(name)

    def initial(self, canvas: Tensor) -> Tensor:
        return self.encode_canvas(_mean(canvas))

    def enter(self, k: int, canvas: Tensor, m: Tensor) -> Tensor:
        return self._read(k, canvas, m)

    def leave(self, k: int, *, m: Tensor, h: Tensor, z: Tensor | None = None) -> Tensor | None:
        return self._step(k, m, h) if k < self.regions - 1 else None

    def latent_shape(self, canvas_shape: tuple[int, ...]) -> tuple[int, ...]:
        return canvas_shape[0], self.r


class SelfPooledInterface(PooledLayers):
    """Control of the pooled interface: its parameters, fed with the canvas, so that nothing crosses.

    Region 0 reads `canvas + U_0(E_in(mean canvas))`, region k >= 1 `canvas + U_k(LayerNorm(E_in(mean canvas) +
    tanh(g_{k-1}) * D_{k-1}(mean canvas)))`. (Without `E_in` in the sum the norm would cancel the gate.)
    """

    kind: ClassVar[str] = "self"
    parallel: ClassVar[bool] = True
    reader_offsets: ClassVar[Mapping[str, int]] = {"decoders": 0, "encoders": 1, "gates": 1, "norms": 1}
    readouts: tuple[str, ...] = ("sum",)

    def enter(self, k: int, canvas: Tensor, m: Tensor | None) -> Tensor:
        own = self.encode_canvas(_mean(canvas))
        return self._read(k, canvas, own if k == 0 else self._step(k - 1, own, canvas))


def _mean(value: Tensor) -> Tensor:
    """Mean over positions, `[B, T, D]` -> `[B, D]`; a value without positions as it is."""
    return value.mean(1) if value.dim() == 3 else value
