"""Small real models that the tests share; all take ``dropout``."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lbi_compile.demo_model import CausalTransformer, TransformerBlock

__all__ = ["BatchNormMLP", "CausalTransformer", "PlainMLP", "PostNormMLP", "ResidualMLP", "VisionTransformer"]


def _branch(width: int, dropout: float) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Dropout(dropout), nn.Linear(2 * width, width))


class _PreNorm(nn.Module):
    def __init__(self, width: int, *, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.branch = _branch(width, dropout)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(self.norm(x))


class _PostNorm(nn.Module):
    def __init__(self, width: int, *, dropout: float) -> None:
        super().__init__()
        self.branch = _branch(width, dropout)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.branch(x))


class _BatchNorm(nn.Module):
    def __init__(self, width: int, *, dropout: float) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width)
        self.branch = _branch(width, dropout)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(self.norm(x))


class _Plain(nn.Sequential):
    def __init__(self, width: int, *, dropout: float) -> None:
        super().__init__(nn.Linear(width, width), nn.GELU(), nn.Dropout(dropout))


class _BlockMLP(nn.Module):
    """Features `[B, F]` (or `[B, T, F]`) -> logits: projection, blocks, norm, classifier."""

    block: type[nn.Module]

    def __init__(
        self, features: int = 64, *, width: int = 32, depth: int = 8, classes: int = 10, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.stem = nn.Linear(features, width)
        self.blocks = nn.ModuleList(self.block(width, dropout=dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class ResidualMLP(_BlockMLP):
    """Pre-norm residual MLP: `x + Linear-GELU-Dropout-Linear(norm(x))`."""

    block = _PreNorm


class PostNormMLP(_BlockMLP):
    """Post-norm residual MLP: no identity path through a block."""

    block = _PostNorm


class BatchNormMLP(_BlockMLP):
    """Residual MLP with BatchNorm, which couples samples in training."""

    block = _BatchNorm


class PlainMLP(_BlockMLP):
    """MLP without residual connections."""

    block = _Plain


class VisionTransformer(nn.Module):
    """Vision transformer for grey images `[B, 1, 8, 8]` (scikit-learn's digits) -> logits `[B, classes]`."""

    def __init__(
        self,
        *,
        size: int = 8,
        patch: int = 2,
        width: int = 32,
        depth: int = 8,
        heads: int = 4,
        classes: int = 10,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, kernel_size=patch, stride=patch)
        self.cls = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.position = nn.Parameter(0.02 * torch.randn(1, (size // patch) ** 2 + 1, width))
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            TransformerBlock(width, heads=heads, causal=False, dropout=dropout) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], dim=1)
        x = self.dropout(x + self.position)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])
