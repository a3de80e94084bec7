"""Models whose boundaries need several lanes, or lanes in another shape than the canvas."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, VOCABULARY = 16, 20


class _Attention(nn.Module):
    def __init__(self, *, causal: bool = False) -> None:
        super().__init__()
        self.query, self.pair, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.causal = causal

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        key, value = self.pair(memory).chunk(2, -1)
        return self.out(F.scaled_dot_product_attention(self.query(x), key, value, is_causal=self.causal))


class _Block(nn.Module):
    def __init__(self, *, decoder: bool, dropout: float) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2 + decoder))
        self.own = _Attention(causal=decoder)
        self.cross = _Attention() if decoder else None
        self.mlp = nn.Sequential(
            nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Dropout(dropout), nn.Linear(2 * WIDTH, WIDTH)
        )

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        y = self.norms[0](x)
        x = x + self.own(y, y)
        if self.cross is not None:
            assert memory is not None
            x = x + self.cross(self.norms[2](x), memory)
        return x + self.mlp(self.norms[1](x))


class EncoderDecoder(nn.Module):
    """``source [B, S]``, ``target [B, T]`` integers -> logits ``[B, T, V]``; the decoder looks back only."""

    def __init__(self, *, depth: int = 3, dropout: float = 0.0) -> None:
        super().__init__()
        self.source, self.target = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(VOCABULARY, WIDTH)
        self.encoder = nn.ModuleList(_Block(decoder=False, dropout=dropout) for _ in range(depth))
        self.decoder = nn.ModuleList(_Block(decoder=True, dropout=dropout) for _ in range(depth))
        self.out = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        memory = self.source(source)
        for block in self.encoder:
            memory = block(memory)
        x = self.target(target)
        for block in self.decoder:
            x = block(x, memory)
        return self.out(x)

    @staticmethod
    def inputs(batch: int = 3, source: int = 7, target: int = 9) -> tuple[Tensor, Tensor]:
        """Example inputs."""
        return torch.randint(VOCABULARY, (batch, source)), torch.randint(VOCABULARY, (batch, target))


class UNet(nn.Module):
    """``x [B, 3, 8, 8]`` -> ``[B, 2, 8, 8]``: two levels down, two up, each joined with its skip."""

    def __init__(self) -> None:
        super().__init__()
        widths = (6, 8, 12)
        self.stem = nn.Conv2d(3, widths[0], 3, padding=1)
        self.down = nn.ModuleList(self._convs(a, b) for a, b in itertools.pairwise(widths))
        self.middle = self._convs(widths[2], widths[2])
        self.up = nn.ModuleList(self._convs(b + b, a) for a, b in reversed(list(itertools.pairwise(widths))))
        self.head = nn.Conv2d(widths[0], 2, 1)

    @staticmethod
    def _convs(inputs: int, outputs: int) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, padding=1), nn.GroupNorm(2, outputs), nn.SiLU(),
            nn.Conv2d(outputs, outputs, 3, padding=1), nn.SiLU(),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        x, skips = self.stem(x), []
        for block in self.down:
            x = block(x)
            skips.append(x)
            x = F.avg_pool2d(x, 2)
        x = self.middle(x)
        for block in self.up:
            x = F.interpolate(x, scale_factor=2.0)
            x = block(torch.cat([x, skips.pop()], 1))
        return self.head(x)


class Recurrent(nn.Module):
    """``x [B, 12, 5]`` -> ``[B, 12, 3]``: a GRU cell in a Python loop, its outputs stacked at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.out = nn.GRUCell(5, WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        h, steps = x.new_zeros(x.shape[0], WIDTH), []
        for t in range(12):
            h = self.cell(x[:, t], h)
            steps.append(self.out(h))
        return torch.stack(steps, 1)


class Conditioned(nn.Module):
    """``x [B, 6]``, ``t [B, 1]`` -> ``[B, 6]``: residual blocks that all read one cheap condition, and a tap."""

    def __init__(self, *, depth: int = 6, width: int = 24) -> None:
        super().__init__()
        self.condition = nn.Linear(1, 3)
        self.stem, self.head = nn.Linear(6, width), nn.Linear(width, 6)
        self.blocks = nn.ModuleList(nn.Linear(width + 3, width) for _ in range(depth))
        self.side = nn.Linear(width, 2)

    def forward(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        c, h = torch.tanh(self.condition(t)), self.stem(x)
        middle = h
        for i, block in enumerate(self.blocks):
            h = h + torch.tanh(block(torch.cat([h, c], 1)))
            middle = h if i == len(self.blocks) // 2 else middle
        return self.head(h), self.side(middle).square().mean(1)
