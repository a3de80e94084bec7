"""A bounded model in small, for the tests of interfaces."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lbi_compile.interfaces import (
    Interface,
    build_interface,
)

B, T, D = 3, 11, 8
# (kind, cell) of every interface, and those that cross something.
ALL = [
    ("pooled", None),
    ("chunked", None),
    ("token", "gru"),
    ("token", "linear"),
    ("identity", None),
    ("zero", None),
    ("self", None),
    ("self", "gru"),
    ("self", "linear"),
]
CROSSING = ALL[:5]
LEARNED = ALL[:4]


def build(kind: str, cell: str | None = None, *, regions: int = 4, r: int = 16, canvas: Tensor | None = None, **more):
    canvas = torch.randn(B, T, D) if canvas is None else canvas
    return build_interface(kind, regions=regions, width=canvas.shape[-1], r=r, canvas=canvas, cell=cell, **more)


class Chain(nn.Module):
    """A bounded model in small: position-wise bodies and finishes, joined by an interface."""

    def __init__(
        self, lbi: Interface, *, part: Callable[[], nn.Module] = lambda: nn.Linear(D, D), readout: str | None = None
    ) -> None:
        super().__init__()
        self.lbi = lbi
        self.readout = readout or lbi.readouts[0]
        self.bodies = nn.ModuleList(part() for _ in range(lbi.regions))
        self.finishes = nn.ModuleList(part() for _ in range(lbi.regions))

    def trace(self, canvas: Tensor) -> tuple[list[Tensor], list[Tensor], list[Tensor | None]]:
        """Region inputs x, outputs h and latents m."""
        lbi, m = self.lbi, self.lbi.initial(canvas)
        xs, hs, ms = [], [], [m]
        for k, (body, finish) in enumerate(zip(self.bodies, self.finishes, strict=True)):
            x, z = lbi.enter(k, canvas, m), None
            a = body(x)
            if lbi.splits:
                z = lbi.encode(k, a)
                a = lbi.inject(k, a, z, m)
            h = finish(a)
            m = lbi.leave(k, m=m, h=h, z=z)
            xs.append(x)
            hs.append(h)
            ms.append(m)
        return xs, hs, ms

    def forward(self, canvas: Tensor) -> Tensor:
        xs, hs, _ = self.trace(canvas)
        if self.readout == "last":
            return hs[-1]
        for x, h in zip(xs, hs, strict=True):
            canvas = canvas + (h - x)
        return canvas


class Pointwise(nn.Module):
    """A part without matrix products, whose bits cannot depend on how many positions there are."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.randn(D)), nn.Parameter(torch.randn(D))

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(x * self.scale + self.shift)
