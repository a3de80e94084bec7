"""A region of a bounded model as a module of its own, and the values inside a model that a call can ask for."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

from .credit.base import LocalCredit
from .interfaces import Interface
from .interfaces.lanes import LanesInterface
from .passes.insert import RegionPieces

# Name under which a run keeps the canvas and the other shared sources; no node of a graph has such a name.
SOURCES = "<sources>"


class Taps(NamedTuple):
    """Values inside the bounded model, for auxiliary losses and diagnostics.

    Attributes:
        h: Output of each region, ``K`` tensors of the canvas's shape.
        m: Latent that enters each region, ``K`` entries; ``None`` where none enters, a pair ``Latents`` where two do.
    """

    h: tuple[Tensor, ...]
    m: tuple[Any, ...]


class Region(nn.Module):
    """Region ``k`` as a module: ``(canvas, m_k) -> (m_{k+1}, h_k)``.

    It owns no parameters; it fetches them from the bounded model by their original names whenever it is called.
    """

    def __init__(self, k: int, interface: Interface) -> None:
        super().__init__()
        self.k = k
        self._interface = (interface,)  # in a tuple: parameters belong to the bounded model, not to each region

    def forward(
        self, canvas: Tensor, m: Any, values: dict[str, Any], pieces: RegionPieces
    ) -> tuple[Any, Tensor, Tensor]:
        """Run the region.

        Args:
            canvas: ``[B, D]`` or ``[B, T, D]``.
            m: Latent ``m_k``, ``None`` where none enters, ``Latents`` where two do.
            values: Prologue values by name; side outputs are added to it.
            pieces: The captured code of this region.

        Returns:
            ``m_{k+1}`` (or ``None``), ``h_k``, and the region's input (the canvas with the latent decoded into it).
        """
        (interface,), k = self._interface, self.k
        if isinstance(interface, LocalCredit):
            return interface.run_region(k, canvas, m, values, pieces)
        if isinstance(interface, LanesInterface):
            return self._run_lanes(interface, canvas, m, values, pieces)
        fold, unfold = interface.fold, interface.unfold
        x = values[pieces.entry] = unfold(interface.enter(k, fold(canvas), m), canvas.shape)
        pieces.body.run(values)
        a = values[pieces.anchor]
        if interface.splits:
            folded = fold(a)
            z = interface.encode(k, folded)
            # without nodes of the model's own the finish is the interface's, and what it gives is the region's end
            values[pieces.joint if pieces.finish else pieces.end] = unfold(interface.inject(k, folded, z, m), a.shape)
            if pieces.finish is not None:
                pieces.finish.run(values)
            h = values[pieces.end]
            return interface.leave(k, m=m, h=fold(h), z=z), h, x
        return interface.leave(k, m=m, h=fold(a), z=None), a, x

    def _run_lanes(
        self, interface: LanesInterface, canvas: Tensor, m: Tensor | None, values: dict[str, Any], pieces: RegionPieces
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        """Run the region between boundaries of several lanes, or of lanes in another shape than the canvas."""
        k, read = self.k, {}
        if k == 0:
            values[pieces.entry] = canvas
        else:
            assert m is not None
            # a lane's own tensor tells its sizes: they cross freely, its numbers do not
            shapes = {index: values[name].shape for index, name in pieces.crossing}
            read = interface.enter_lanes(k, m, shapes, values[SOURCES])
            for gap in pieces.gaps:
                values[gap.entry] = read[gap.index]
        pieces.body.run(values)
        new = {index: values[name] for index, name in pieces.new}
        h = values[pieces.end]
        return interface.leave_lanes(k, m, new, read), h, values.get(pieces.entry, h)
