"""One call of a region-parallel model: its values, what its regions share, and its thread."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..credit.site import written
from ..passes.insert import Program
from ..region import SOURCES
from . import links
from .draws import Draws

if TYPE_CHECKING:
    from .module import RegionParallel

AUTO, CANVAS, STEM = "auto", "canvas", "stem"
CANVAS_COTANGENT, STEM_GRADIENT, SHARED_GRADIENT = "canvas cotangent", "stem gradient", "shared parameters' gradient"


class Call:
    """What all ranks compute alike before the regions, and how regions read it.

    Args:
        model: The model.
        program: What runs.
        leaves: The call's inputs.

    Attributes:
        leaves: The call's inputs.
        values: By name; for uses outside of regions.
        regional: By name; for regions. Cotangents of what they share are added up over ranks.
        key: The program and the shapes of the inputs: what is found out for them is kept by the model.
        thread: See ``links``.
        draws: Random numbers of the regions.
        reduce: ``"canvas"`` or ``"stem"``: which cotangents are added up.
        head_on_last: The head runs on the last rank alone.
    """

    def __init__(self, model: RegionParallel, program: Program, leaves: list[Any]) -> None:
        self.model, self.program, self.ranks = model, program, model.ranks
        self.values: dict[str, Any] = dict(zip(program.inputs, leaves, strict=True))
        self.key = id(program), tuple(leaf.shape for leaf in leaves if isinstance(leaf, Tensor))
        self.leaves, self.reduce = leaves, model.reduce
        self._lent: dict[int, Tensor] = {}
        self._run_stem(leaves)
        self.head_on_last = model.placement.head_on_last
        self.draws = Draws(program, self.canvas.device, head=self.head_on_last)
        self.regional[SOURCES] = [self.regional[program.canvas], *(self.regional.get(name) for name in program.shared)]

    @property
    def canvas(self) -> Tensor:
        return self.values[self.program.canvas]

    def _run_stem(self, leaves: list[Any]) -> None:
        model = self.model
        lent = [p for p in model.parameters_of(model.placement.lent) if p.requires_grad]
        if self.ranks.size == 1 or not torch.is_grad_enabled():
            self._prepare()
            self.thread = links.new_thread(self.canvas)
            self.regional = dict(self.values)
            return
        if self.reduce == AUTO:
            self.reduce = self._cheaper(leaves)
        if self.reduce == STEM:
            self._share_stem(leaves, lent)
        else:
            self._prepare()
            self.thread = links.new_thread(self.canvas)
            names = self._read_by_regions()
            self._share([*(self.values[name] for name in names), *lent], len(names), CANVAS_COTANGENT, lent)
            self.regional = {**self.values, **dict(zip(names, self._shared, strict=True))}

    def _prepare(self) -> None:
        self.program.prologue.run(self.values)
        self.program.stem.run(self.values)

    def _cheaper(self, leaves: list[Any]) -> str:
        """Which takes fewer numbers to add up: canvas cotangents or the stem's gradients; once for every size.

        The stem is run once more for it, and nothing is left of that: a run that is resumed decides alike.
        """
        model, program, key = self.model, self.program, self.key
        if key not in model.cheaper:
            buffers = [
                getattr(owner, name) for piece in (program.prologue, program.stem) for owner, name in written(piece)
            ]
            before = [(buffer, buffer.clone()) for buffer in buffers if not isinstance(buffer, nn.Parameter)]
            outside = dict(self.values)
            with torch.random.fork_rng(devices=[x.device for x in leaves if isinstance(x, Tensor) and x.is_cuda]):
                self._prepare()
                canvas = sum(self.values[name].numel() for name in self._read_by_regions())
            with torch.no_grad():
                for buffer, value in before:
                    buffer.copy_(value)
            self.values = outside
            stem = [p for p in model.parameters_of(model.placement.stem) if p.requires_grad]
            inputs = [x for x in leaves if isinstance(x, Tensor) and x.requires_grad]
            model.cheaper[key] = STEM if sum(x.numel() for x in (*stem, *inputs)) < canvas else CANVAS
        return model.cheaper[key]

    def _share(self, values: list[Tensor], count: int, kind: str, lent: list[nn.Parameter]) -> None:
        kinds = [kind] * count + [SHARED_GRADIENT] * (len(values) - count)
        self.thread, self._shared = links.share(self.ranks, self.thread, values, kinds) if values else (self.thread, [])
        self._lent = {id(p): alias for p, alias in zip(lent, self._shared[count:], strict=True)}
        self._shared = self._shared[:count]

    def _share_stem(self, leaves: list[Any], lent: list[nn.Parameter]) -> None:
        model = self.model
        own = [p for p in model.parameters_of(model.placement.stem) if p.requires_grad]
        known = {id(p) for p in own}
        inputs = [x for x in leaves if isinstance(x, Tensor) and x.requires_grad]
        others = [p for p in lent if id(p) not in known]
        self.thread = links.new_thread(next(iter(own), leaves[0]))
        self._share([*own, *inputs, *others], len(own) + len(inputs), STEM_GRADIENT, others)
        aliases = dict(zip([*map(id, own), *map(id, inputs)], self._shared, strict=True))
        self._lent |= {key: aliases[key] for key in map(id, lent) if key in aliases}
        self.values = {name: aliases.get(id(value), value) for name, value in self.values.items()}
        with model.standing_in(aliases):
            self._prepare()
        self.regional = dict(self.values)
        # whatever is read outside of regions, every rank reads alike: the sum over ranks is to count it once
        self.values = {
            name: links.once(self.ranks, value) if isinstance(value, Tensor) and value.requires_grad else value
            for name, value in self.values.items()
        }

    def _read_by_regions(self) -> list[str]:
        """Names of values with a gradient that some region reads, the same on all ranks."""
        read = {self.program.canvas: None}
        for region in self.program.regions:
            for piece in (region.body, region.finish):
                read.update(dict.fromkeys(piece.inputs if piece is not None else ()))
        if self.model.placement.head_on_last:  # one rank says what the head says, like a region's words
            read.update(dict.fromkeys(self.program.head.inputs))
        values = ((name, self.values.get(name)) for name in read)
        return [name for name, value in values if isinstance(value, Tensor) and value.requires_grad]

    @contextlib.contextmanager
    def region(self, k: int) -> Iterator[None]:
        """Inside, region ``k`` runs: with random numbers of its own, and with its reading of shared parameters."""
        with self.draws.region(k), self.model.standing_in(self._lent):
            yield

    def lent(self, value: Any) -> Any:
        """A parameter as regions read it."""
        return self._lent.get(id(value), value)

    def head(self, entry: Tensor) -> None:
        """Run the head on what the readout gives; on the last rank alone, it is run as region K."""
        name, head = self.program.head_entry, self.program.head
        self.values[name] = entry
        if not self.head_on_last:
            head.run(self.values)
            return
        values = {**self.regional, name: entry}
        with self.region(len(self.program.regions)):
            head.run(values)
        self.values.update({output: values[output] for output in head.outputs})
