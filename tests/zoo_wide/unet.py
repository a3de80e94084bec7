"""A U-Net of the size and shape of Stable Diffusion 1.5, written from its published description in plain torch.

Four levels of 320, 640, 1280 and 1280 channels, two residual blocks a level on the way down and three on the way up,
spatial transformers with cross attention to a text at the first three levels and in the middle, a time embedding that
every residual block reads, and twelve skips: 860M parameters at the default sizes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class UNet(nn.Module):
    """Predicts the noise in ``latents`` ``[B, 4, H, W]`` at ``timesteps`` ``[B]``, given ``context`` ``[B, T, D]``.

    Args:
        channels: Channels of each level; every level but the last halves height and width.
        attends: For each level, whether its blocks are followed by spatial transformers.
        context: Width of the context.
        heads: Attention heads.
        groups: Groups of the group norms.
    """

    def __init__(
        self,
        channels: Sequence[int] = (320, 640, 1280, 1280),
        attends: Sequence[bool] = (True, True, True, False),
        *,
        context: int = 768,
        heads: int = 8,
        groups: int = 32,
    ) -> None:
        super().__init__()
        first, last, time = channels[0], channels[-1], 4 * channels[0]
        self.time = nn.Sequential(nn.Linear(first, time), nn.SiLU(), nn.Linear(time, time))
        self.conv_in = nn.Conv2d(4, first, 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        skips, width = [first], first
        for level, (out, attend) in enumerate(zip(channels, attends, strict=True)):
            for _ in range(2):
                self.down.append(Block(width, out, time, context if attend else 0, heads, groups))
                width = out
                skips.append(width)
            if level < len(channels) - 1:
                self.down.append(nn.Conv2d(width, width, 3, stride=2, padding=1))
                skips.append(width)
        self.middle = nn.ModuleList(
            [Block(last, last, time, context, heads, groups), Block(last, last, time, 0, heads, groups)]
        )
        for level, (out, attend) in reversed(list(enumerate(zip(channels, attends, strict=True)))):
            for _ in range(3):
                self.up.append(Block(width + skips.pop(), out, time, context if attend else 0, heads, groups))
                width = out
            if level:
                self.up.append(Upsample(width))
        self.norm_out = nn.GroupNorm(groups, first)
        self.conv_out = nn.Conv2d(first, 4, 3, padding=1)

    def forward(self, latents: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
        time = self.time(sinusoids(timesteps, self.time[0].in_features))  # pyright: ignore[reportArgumentType]
        h = self.conv_in(latents)
        skips = [h]
        for module in self.down:
            h = module(h, time, context) if isinstance(module, Block) else module(h)
            skips.append(h)
        for module in self.middle:
            h = module(h, time, context)
        for module in self.up:
            h = module(torch.cat([h, skips.pop()], 1), time, context) if isinstance(module, Block) else module(h)
        return self.conv_out(F.silu(self.norm_out(h)))


def sinusoids(timesteps: Tensor, width: int) -> Tensor:
    """Cosines and sines ``[B, width]`` of the time step at geometrically spaced frequencies."""
    half = width // 2
    frequencies = torch.exp(-math.log(10_000) * torch.arange(half, device=timesteps.device) / half)
    angles = timesteps[:, None].float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], 1)


class Block(nn.Module):
    """A residual block, and a spatial transformer behind it where ``context`` has a width."""

    def __init__(self, width: int, out: int, time: int, context: int, heads: int, groups: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(groups, width), nn.Conv2d(width, out, 3, padding=1)
        self.time = nn.Linear(time, out)
        self.norm2, self.conv2 = nn.GroupNorm(groups, out), nn.Conv2d(out, out, 3, padding=1)
        self.skip = nn.Conv2d(width, out, 1) if width != out else nn.Identity()
        self.attend = SpatialTransformer(out, context, heads, groups) if context else None

    def forward(self, x: Tensor, time: Tensor, context: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x))) + self.time(F.silu(time))[:, :, None, None]
        h = self.skip(x) + self.conv2(F.silu(self.norm2(h)))
        return h if self.attend is None else self.attend(h, context)


class SpatialTransformer(nn.Module):
    """Self-attention over pixels, cross attention to the context and a gated MLP, added to its input."""

    def __init__(self, width: int, context: int, heads: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, width, eps=1e-6)
        self.proj_in, self.proj_out = nn.Conv2d(width, width, 1), nn.Conv2d(width, width, 1)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.itself, self.cross = Attention(width, width, heads), Attention(width, context, heads)
        self.widen, self.narrow = nn.Linear(width, 8 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        h = self.proj_in(self.norm(x)).flatten(2).transpose(1, 2)  # [B, H*W, D]
        normed = self.norms[0](h)
        h = h + self.itself(normed, normed)
        h = h + self.cross(self.norms[1](h), context)
        value, gate = self.widen(self.norms[2](h)).chunk(2, -1)
        h = h + self.narrow(value * F.gelu(gate))
        return x + self.proj_out(h.transpose(1, 2).reshape(x.shape))


class Attention(nn.Module):
    """Attention of ``x`` ``[B, N, D]`` to ``context`` ``[B, T, D']``."""

    def __init__(self, width: int, context: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width, bias=False)
        self.k, self.v = nn.Linear(context, width, bias=False), nn.Linear(context, width, bias=False)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        q, k, v = (
            made.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for made in (self.q(x), self.k(context), self.v(context))
        )
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Upsample(nn.Module):
    """Twice the height and width, then a convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
