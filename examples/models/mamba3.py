"""Mamba-3 blocks: trapezoidal steps instead of a convolution, a state that turns, one or several ranks."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .common import Residual, RMSNorm, chunked_scan
from .mamba2 import initial_step_bias

SLOWEST = -1e-4


class Mamba3(nn.Module):
    """State-space mixer with a trapezoidal rule, a data-dependent rotation and M ranks, `[B, T, D]` -> `[B, T, D]`.

    With `dt = softplus(. + step_bias)`, `a = -softplus(.)`, `l = sigmoid(.)` and `alpha = exp(a dt)` of each head,
    `h_t = alpha_t h_{t-1} + (1 - l_t) dt_t alpha_t k_{t-1} v_{t-1}^T + l_t dt_t k_t v_t^T` and
    `y_t = h_t^T q_t + d v_t`. k and q are normed, biased per head and turned by
    `theta_t = theta_{t-1} + pi tanh(.) dt_t`, which equals a complex state. More than one rank (MIMO) sums the outer
    products over ranks, each with keys and queries of its own; values and gates of a rank are scaled copies.

    Args:
        width: Width D.
        state: Size S of the state per channel, a multiple of 4.
        head_width: Channels P of a head; a divisor of ``expand * width``.
        expand: Inner width over D.
        ranks: M; 1 is the single-input, single-output form.
        chunk: Positions in a chunk of the scan.

    Example:
        >>> Mamba3(32, state=8, head_width=16, ranks=2)(torch.randn(2, 7, 32)).shape
        torch.Size([2, 7, 32])

    Lahoti et al., "Mamba-3: Improved Sequence Modeling using State Space Principles", 2026.
    """

    def __init__(
        self, width: int, *, state: int, head_width: int, expand: int = 2, ranks: int = 1, chunk: int = 64
    ) -> None:
        super().__init__()
        inner = expand * width
        heads = inner // head_width
        self.heads, self.ranks, self.chunk = heads, ranks, chunk
        self.sizes = (inner, inner, ranks * state, ranks * state, heads, heads, heads, state // 4)
        self.input = nn.Linear(width, sum(self.sizes), bias=False)
        self.key_norm, self.query_norm = RMSNorm(state), RMSNorm(state)
        self.key_bias = nn.Parameter(torch.ones(heads, ranks, state))
        self.query_bias = nn.Parameter(torch.ones(heads, ranks, state))
        self.step_bias = nn.Parameter(initial_step_bias(heads))
        self.skip = nn.Parameter(torch.ones(heads))
        if ranks > 1:
            self.value_scale = nn.Parameter(torch.full((heads, ranks, head_width), 1 / ranks))
            self.gate_scale = nn.Parameter(torch.ones(heads, ranks, head_width))
            self.output_scale = nn.Parameter(torch.full((heads, ranks, head_width), 1 / ranks))
        self.output = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        z, value, key, query, step, mix, rate, turn = self.input(x).split(self.sizes, -1)
        value, z = (part.unflatten(-1, (self.heads, 1, -1)) for part in (value, z))  # [B, T, H, 1, P]
        if self.ranks > 1:
            value, z = value * self.value_scale, z * self.gate_scale  # [B, T, H, M, P]

        step = F.softplus(step + self.step_bias)  # [B, T, H]
        rate, mix = (-F.softplus(rate)).clamp(max=SLOWEST), mix.sigmoid()
        angle = (math.pi * turn.tanh()[:, :, None] * step[..., None]).cumsum(1)[:, :, :, None]  # [B, T, H, 1, S / 4]
        cos, sin = angle.cos(), angle.sin()
        key = self._turned(self.key_norm(key.unflatten(-1, (1, self.ranks, -1))) + self.key_bias, cos, sin)
        query = self._turned(self.query_norm(query.unflatten(-1, (1, self.ranks, -1))) + self.query_bias, cos, sin)

        # what a position adds at the step after it is decided by that step
        later = F.pad(((1 - mix) * step)[:, 1:], (0, 0, 0, 1))
        y = chunked_scan(query, key, value, log_decay=rate * step, weight=mix * step, later=later, chunk=self.chunk)
        y = (y + value * self.skip[:, None, None]) * F.silu(z)
        if self.ranks > 1:
            y = (y * self.output_scale).sum(3)
        return self.output(y.flatten(2))

    def _turned(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Turn neighbouring pairs of the first half of the state, `[B, T, H, M, S]`; the second half stands."""
        turning, still = x.chunk(2, -1)
        first, second = turning.unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack((first * cos - second * sin, first * sin + second * cos), -1).flatten(-2)
        return torch.cat((turned, still), -1)


def mamba3_block(width: int, *, state: int, head_width: int, chunk: int, ranks: int = 1) -> nn.Module:
    """A Mamba-3 mixer in a residual branch, `[B, T, D]` -> `[B, T, D]`.

    Args:
        width: Width D.
        state: Size S of the state per channel.
        head_width: Channels P of a head.
        chunk: Positions in a chunk of the scan.
        ranks: Number of ranks M.
    """
    return Residual(width, Mamba3(width, state=state, head_width=head_width, chunk=chunk, ranks=ranks))
