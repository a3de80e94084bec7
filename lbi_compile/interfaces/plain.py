"""Interfaces without parameters: the separator itself, and nothing at all."""

from __future__ import annotations

import math
from typing import ClassVar

from torch import Tensor

from .base import Interface


class IdentityInterface(Interface):
    """The separator itself crosses, `[B, R]` with R all its numbers per sample: the model as it was, for checking.

    Every separator has the shape of the canvas; region k reads `m_k` in place of its separator, and no canvas.
    """

    kind: ClassVar[str] = "identity"
    first_latent: ClassVar[int | None] = 0
    readouts: tuple[str, ...] = ("last",)

    def initial(self, canvas: Tensor) -> Tensor:
        return canvas.flatten(1)

    def enter(self, k: int, canvas: Tensor, m: Tensor) -> Tensor:
        return m.reshape(canvas.shape)

    def leave(self, k: int, *, m: Tensor | None = None, h: Tensor, z: Tensor | None = None) -> Tensor | None:
        return h.flatten(1) if k < self.regions - 1 else None

    def latent_shape(self, canvas_shape: tuple[int, ...]) -> tuple[int, ...]:
        return canvas_shape[0], math.prod(canvas_shape[1:])


class ZeroInterface(Interface):
    """Control: nothing crosses, every region reads the canvas alone, and no parameter is added."""

    kind: ClassVar[str] = "zero"
    parallel: ClassVar[bool] = True
    readouts: tuple[str, ...] = ("sum",)
