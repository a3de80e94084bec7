"""A residual MLP, the trunk on which ways of teaching regions are compared."""

from __future__ import annotations

from torch import Tensor, nn


class Block(nn.Module):
    """``x + Linear(GELU(Linear(norm(x))))``, `[B, D]` -> `[B, D]`.

    Args:
        width: Width D.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.branch = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(self.norm(x))


class ResidualMLP(nn.Module):
    """A classifier of features, `[B, F]` -> `[B, C]`: linear stem, blocks, norm, linear head.

    Args:
        features: Features F.
        width: Width D.
        depth: Blocks; with 0 of them stem and head are all there is, and it is linear but for the norm.
        classes: Classes C.

    Example:
        >>> ResidualMLP(100, width=8, depth=3, classes=10)(torch.zeros(2, 100)).shape
        torch.Size([2, 10])
    """

    def __init__(self, features: int, *, width: int, depth: int, classes: int) -> None:
        super().__init__()
        self.stem = nn.Linear(features, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))
