"""A region of a bounded model as a module of its own, and the values inside a model that a call can ask for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from .credit.base import LocalCredit
from .interfaces import Interface
from .interfaces.lanes import LanesInterface
from .passes.insert import Piece, Program, RegionPieces

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


class Opened(NamedTuple):
    """A region that has run up to a_k.

    Attributes:
        x: What it read: the canvas with the latent decoded into it.
        a: `a_k`, or `h_k` where the interface does not split regions.
        z: What it says to later regions, folded, as the interface has it; ``None`` where it does not split regions.
    """

    x: Tensor
    a: Tensor
    z: Any


class Values(dict[str, Any]):
    """The values of one run by name.

    A class of its own, so that hooks which take the arguments of a region apart (those of ``fully_shard``) leave it
    whole: what a region puts here is read by later ones.
    """


class Region(nn.Module):
    """Region ``k`` as a module: ``(canvas, m_k) -> (m_{k+1}, h_k)``.

    It fetches parameters from the bounded model by their original names whenever it is called. Those of modules that no
    other part of the model reads are also its own, in the same dictionaries: ``fully_shard(bounded.regions[k])`` and
    whatever else works on a module's parameters takes these.

    Args:
        k: Index of the region.
        interface: What it exchanges latents by.
        owners: Modules of the model that this region alone reads, by path.
    """

    def __init__(self, k: int, interface: Interface, owners: Mapping[str, nn.Module] | None = None) -> None:
        super().__init__()
        self.k = k
        self._interface = (interface,)  # in a tuple: parameters belong to the bounded model, not to each region
        for path, owner in (owners or {}).items():
            shelf: nn.Module = self
            for part in path.split("."):
                shelf = shelf._modules.setdefault(part, nn.Module())  # pyright: ignore[reportAssignmentType]
            shelf._parameters = owner._parameters

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
        opened = self.open(canvas, m, values, pieces)
        h = self.close(opened, m, values, pieces)
        return interface.leave(k, m=m, h=interface.fold(h), z=opened.z), h, opened.x

    def open(self, canvas: Tensor, m: Any, values: dict[str, Any], pieces: RegionPieces) -> Opened:
        """Run the region up to a_k, where a latent that enters the finish is first needed; else to its end.

        Args:
            canvas: As for ``forward``, like ``values`` and ``pieces``.
            m: Latent `m_k`; of no use to an interface that splits regions.
        """
        (interface,), k = self._interface, self.k
        x = values[pieces.entry] = interface.unfold(interface.enter(k, interface.fold(canvas), m), canvas.shape)
        pieces.body.run(values)
        a = values[pieces.anchor]
        return Opened(x, a, interface.encode(k, interface.fold(a)) if interface.splits else None)

    def close(self, opened: Opened, m: Any, values: dict[str, Any], pieces: RegionPieces) -> Tensor:
        """The rest of the region: `h_k`, from what ``open`` gave and the latent that enters the finish."""
        (interface,), k = self._interface, self.k
        a = opened.a
        if not interface.splits:
            return a
        # without nodes of the model's own the finish is the interface's, and what it gives is the region's end
        joint = pieces.joint if pieces.finish else pieces.end
        values[joint] = interface.unfold(interface.inject(k, interface.fold(a), opened.z, m), a.shape)
        if pieces.finish is not None:
            pieces.finish.run(values)
        return values[pieces.end]

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
                # what is decoded has a gradient: statistics that are kept of it would hold on to the graph of each step
                values[gap.entry] = read[gap.index].detach() if gap.detached else read[gap.index]
        pieces.body.run(values)
        new = {index: values[name] for index, name in pieces.new}
        h = values[pieces.end]
        return interface.leave_lanes(k, m, new, read), h, values.get(pieces.entry, h)


def owners_of(model: nn.Module, program: Program) -> list[dict[str, nn.Module]]:
    """For each region the modules, by path, that hold parameters which it alone reads.

    Args:
        model: The model that was captured.
        program: What it was cut into.
    """
    held = {path: module for path, module in model.named_modules() if path and _own(module)}

    def read(*pieces: Piece | None) -> set[int]:
        return {id(getattr(owner, name)) for piece in pieces if piece for owner, name in piece.attributes}

    regions = [read(pieces.body, pieces.finish) for pieces in program.regions]
    readers = Counter(key for keys in (read(program.prologue, program.stem, program.head), *regions) for key in keys)
    return [
        {
            path: module
            for path, module in held.items()
            if all(id(p) in keys and readers[id(p)] == 1 for p in _own(module))
        }
        for keys in regions
    ]


def _own(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module._parameters.values() if p is not None]
