"""Causal transformer blocks: rotary positions, RMSNorm, SwiGLU, and fewer heads of keys and values than of queries."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .common import Residual

BASE = 10_000.0


class Attention(nn.Module):
    """Causal self-attention with rotary positions, `[B, T, D]` -> `[B, T, D]`.

    Args:
        width: Width D, a multiple of twice ``heads``.
        heads: Heads of queries.
        kv_heads: Heads of keys and values, a divisor of ``heads``; each serves ``heads / kv_heads`` heads of queries.

    Example:
        >>> Attention(32, heads=4, kv_heads=2)(torch.randn(2, 7, 32)).shape
        torch.Size([2, 7, 32])

    Su et al., "RoFormer", 2021 (rotary positions); Ainslie et al., "GQA", 2023 (grouped keys and values).
    """

    frequencies: Tensor

    def __init__(self, width: int, *, heads: int, kv_heads: int) -> None:
        super().__init__()
        size = width // heads
        self.heads, self.kv_heads = heads, kv_heads
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, kv_heads * size, bias=False)
        self.value = nn.Linear(width, kv_heads * size, bias=False)
        self.output = nn.Linear(width, width, bias=False)
        self.register_buffer("frequencies", BASE ** -(torch.arange(0, size, 2) / size), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        angle = torch.arange(x.shape[1], device=x.device)[:, None] * self.frequencies  # [T, P / 2]
        cos, sin = angle.cos(), angle.sin()
        query = rotate(self._split(self.query(x), self.heads), cos, sin)
        key = rotate(self._split(self.key(x), self.kv_heads), cos, sin)
        key, value = self._shared(key), self._shared(self._split(self.value(x), self.kv_heads))
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.output(mixed.transpose(1, 2).flatten(2))

    def _split(self, x: Tensor, heads: int) -> Tensor:
        return x.unflatten(-1, (heads, -1)).transpose(1, 2)  # [B, H, T, P]

    def _shared(self, x: Tensor) -> Tensor:
        return x if self.kv_heads == self.heads else x.repeat_interleave(self.heads // self.kv_heads, 1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (i, i + P/2) of the last axis, `[B, H, T, P]`, by the angle of its position, `[T, P/2]`."""
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, first * sin + second * cos), -1)


class SwiGLU(nn.Module):
    """Gated MLP, `[B, T, D]` -> `[B, T, D]`.

    Args:
        width: Width D.
        hidden: Width between the projections.

    Shazeer, "GLU Variants Improve Transformer", 2020.
    """

    def __init__(self, width: int, *, hidden: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.output = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(F.silu(self.gate(x)) * self.up(x))


def transformer_block(width: int, *, heads: int, kv_heads: int, hidden: int) -> nn.Module:
    """Attention, then a gated MLP, each in its residual branch, `[B, T, D]` -> `[B, T, D]`.

    Args:
        width: Width D.
        heads: Heads of queries.
        kv_heads: Heads of keys and values.
        hidden: Width inside the MLP.
    """
    attention = Attention(width, heads=heads, kv_heads=kv_heads)
    return nn.Sequential(Residual(width, attention), Residual(width, SwiGLU(width, hidden=hidden)))
