"""Mamba-2 blocks: a short convolution, then a state-space recurrence with one decay per head and step."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .common import Residual, RMSNorm, chunked_scan


class Mamba2(nn.Module):
    """Selective state-space mixer, `[B, T, D]` -> `[B, T, D]`.

    `h_t = exp(a dt_t) h_{t-1} + dt_t B_t x_t^T`, `y_t = h_t^T C_t + d x_t` per head, with `a = -exp(log_rate) < 0` and
    `dt_t = softplus(. + step_bias) > 0`. x, B and C come out of a causal convolution, and y is gated by z and normed.

    Args:
        width: Width D.
        state: Size S of the state per channel.
        head_width: Channels P of a head; a divisor of ``expand * width``.
        expand: Inner width over D.
        groups: Number of (B, C) pairs, a divisor of the number of heads.
        kernel: Positions the convolution sees.
        chunk: Positions in a chunk of the scan.

    Example:
        >>> Mamba2(32, state=8, head_width=16)(torch.randn(2, 7, 32)).shape
        torch.Size([2, 7, 32])

    Dao and Gu, "Transformers are SSMs", 2024.
    """

    def __init__(
        self,
        width: int,
        *,
        state: int,
        head_width: int,
        expand: int = 2,
        groups: int = 1,
        kernel: int = 4,
        chunk: int = 64,
    ) -> None:
        super().__init__()
        inner = expand * width
        heads = inner // head_width
        self.heads, self.groups, self.chunk = heads, groups, chunk
        self.sizes = (inner, inner + 2 * groups * state, heads)
        self.parts = (inner, groups * state, groups * state)
        self.input = nn.Linear(width, sum(self.sizes), bias=False)
        self.convolution = nn.Conv1d(self.sizes[1], self.sizes[1], kernel, groups=self.sizes[1])
        self.log_rate = nn.Parameter(torch.empty(heads).uniform_(1, 16).log())
        self.step_bias = nn.Parameter(initial_step_bias(heads))
        self.skip = nn.Parameter(torch.ones(heads))
        self.norm = RMSNorm(inner)
        self.output = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        z, mixed, step = self.input(x).split(self.sizes, -1)
        (kernel,) = self.convolution.kernel_size
        mixed = F.silu(self.convolution(F.pad(mixed.transpose(1, 2), (kernel - 1, 0)))).transpose(1, 2)
        value, key, query = mixed.split(self.parts, -1)
        value = value.unflatten(-1, (self.heads, 1, -1))
        step = F.softplus(step + self.step_bias)
        y = chunked_scan(
            self._per_head(query),
            self._per_head(key),
            value,
            log_decay=step * -self.log_rate.exp(),
            weight=step,
            chunk=self.chunk,
        )
        y = y + value * self.skip[:, None, None]
        return self.output(self.norm(y.flatten(2) * F.silu(z)))

    def _per_head(self, x: Tensor) -> Tensor:
        x = x.unflatten(-1, (self.groups, 1, -1))
        return x if self.groups == 1 else x.repeat_interleave(self.heads // self.groups, 2)


def initial_step_bias(heads: int, *, least: float = 1e-3, most: float = 0.1) -> Tensor:
    """Biases `[H]` whose softplus is log-uniform between ``least`` and ``most``.

    Args:
        heads: Number of heads H.
        least: Shortest step.
        most: Longest step.
    """
    step = torch.empty(heads).uniform_(math.log(least), math.log(most)).exp()
    return step + (-torch.expm1(-step)).log()


def mamba2_block(width: int, *, state: int, head_width: int, chunk: int) -> nn.Module:
    """A Mamba-2 mixer in a residual branch, `[B, T, D]` -> `[B, T, D]`.

    Args:
        width: Width D.
        state: Size S of the state per channel.
        head_width: Channels P of a head.
        chunk: Positions in a chunk of the scan.
    """
    return Residual(width, Mamba2(width, state=state, head_width=head_width, chunk=chunk))
