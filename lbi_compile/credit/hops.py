"""Small parts of HBLL: maps between latents, their norm, and the codes that stand for classes."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..interfaces.base import GELU_RMS, SMALLEST_NORM, Draw


class Hop(nn.Module):
    """A map between latents: ``norm(m + MLP(m))``, `[..., R]` -> `[..., R]`.

    Args:
        draw: Makes its layers.
        r: Latent width R.
        width: Width D of the canvas, for a map whose MLP reads the canvas too; ``None`` for one that does not.
    """

    def __init__(self, draw: Draw, r: int, width: int | None = None) -> None:
        super().__init__()
        self.hidden = draw.linear(r, 4 * r)
        self.beside = None if width is None else draw.linear(width, 4 * r, bias=False)
        self.out = draw.linear(4 * r, r, gain=0.5 / GELU_RMS)

    def forward(self, m: Tensor, canvas: Tensor | None = None) -> Tensor:
        """Map a latent.

        Args:
            m: Latent `[..., R]`.
            canvas: Pooled and normed canvas `[..., D]`, for a map that reads it.
        """
        hidden = self.hidden(m)
        if self.beside is not None:
            assert canvas is not None
            hidden = hidden + self.beside(canvas)
        return latent_norm(m + self.out(F.gelu(hidden)).to(m.dtype))


def latent_norm(m: Tensor) -> Tensor:
    """A latent at mean 0 and mean square 1; tanh where a norm would leave too little of it."""
    return F.layer_norm(m, m.shape[-1:]).to(m.dtype) if m.shape[-1] >= SMALLEST_NORM else m.tanh()


def label_codes(draw: Draw, classes: int, r: int) -> Tensor:
    """Fixed codes `[C, R]` of mean 0 and mean square 1: orthogonal where the width allows it, else random."""
    numbers = draw.normal(max(classes, r), r)
    numbers = numbers - numbers.mean(-1, keepdim=True)
    if classes < r:
        # r - 1 orthogonal directions have mean zero
        basis, _ = torch.linalg.qr(numbers[: r - 1].T)
        codes = basis.T[:classes] * math.sqrt(r)
    else:
        codes = numbers[:classes]
        if r > 1:
            codes = codes / codes.square().mean(-1, keepdim=True).sqrt()
    return codes.to(device=draw.device, dtype=draw.dtype)
