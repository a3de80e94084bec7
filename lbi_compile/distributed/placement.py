"""Which rank holds which regions and parameters, and the model's tree on one rank, with its own parameters."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate

from ..credit.base import LocalCredit
from ..interfaces import Interface
from ..passes.insert import Piece, Program

if TYPE_CHECKING:
    from ..bounded import BoundedModule

# Places beside regions that read parameters; what they compute, every rank computes.
STEM, HEAD, BETWEEN = "stem", "head", "between"
# Name under which a model holds the interface.
INTERFACE = "lbi"


def balanced(costs: Sequence[int], ranks: int) -> tuple[int, ...]:
    """How many neighbouring regions each rank gets, so that the most expensive rank costs least.

    Args:
        costs: Of each region.
        ranks: How many ranks; no more than regions.

    Returns:
        ``ranks`` positive numbers; of several answers the one whose earlier ranks have less to do.

    Example:
        >>> balanced([1, 1, 1, 1, 1], 2), balanced([4, 1, 1, 1, 1], 2)
        ((2, 3), (1, 4))
    """
    sums = [0, *itertools.accumulate(costs)]
    # best[j]: the least bound with which the first j regions go to the ranks so far, and how they do
    best: list[tuple[int, tuple[int, ...]] | None] = [(0, ()), *[None] * len(costs)]
    for _ in range(ranks):
        step: list[tuple[int, tuple[int, ...]] | None] = [None] * (len(costs) + 1)
        for end in range(1, len(costs) + 1):
            found = [
                (max(known[0], sums[end] - sums[start]), (*known[1], end - start))
                for start, known in enumerate(best[:end])
                if known is not None
            ]
            step[end] = min(found, default=None)
        best = step
    assert best[-1] is not None
    return best[-1][1]


@dataclass(frozen=True, slots=True)
class Placement:
    """Where regions and parameters are.

    Attributes:
        counts: Regions of each rank.
        home: By name of a parameter or buffer the rank that holds it; ``None`` where every rank does.
        lent: Names of parameters that every rank holds and regions read: their gradients are added up.
        stem: Names of parameters the stem reads.
        head_on_last: The head is on the last rank alone, as if it were a part of its last region.
    """

    counts: tuple[int, ...]
    home: dict[str, int | None]
    lent: tuple[str, ...]
    stem: tuple[str, ...]
    head_on_last: bool = False

    def regions(self, rank: int) -> range:
        """The regions of a rank."""
        start = sum(self.counts[:rank])
        return range(start, start + self.counts[rank])

    def holds(self, rank: int, name: str) -> bool:
        """Whether a rank holds a parameter or buffer."""
        return self.home[name] in (None, rank)


def place(
    bounded: BoundedModule, programs: Iterable[Program], counts: Sequence[int], *, head_on_last: bool = False
) -> Placement:
    """Find out who reads what.

    Args:
        bounded: The bounded model.
        programs: Its programs.
        counts: How many regions each rank has.
        head_on_last: Put the head on the last rank alone.
    """
    rank_of = [rank for rank, number in enumerate(counts) for _ in range(number)]
    regions = range(len(rank_of))
    readers: dict[int, set[int | str]] = {}
    interface = bounded.interface
    for program in programs:
        for where, piece in _pieces(program, interface, head_on_last):
            for owner, name in piece.attributes:
                readers.setdefault(id(getattr(owner, name)), set()).update(where)
    for name, value in _tensors(interface):
        k = interface.region_of(name)
        where = {k} if k is not None else {BETWEEN} if interface.combines(name) else {BETWEEN, *regions}
        readers.setdefault(id(value), set()).update(where)
    table = interface.embedding if isinstance(interface, LocalCredit) else None
    named = list(_tensors(bounded))
    home: dict[str, int | None] = {}
    lent: dict[int, str] = {}
    stem: dict[int, str] = {}
    for name, value in named:
        where = readers.get(id(value), set())
        if name == table:
            where |= {BETWEEN, *regions}
        ranks = {rank_of[k] if isinstance(k, int) else None for k in where}
        home[name] = ranks.pop() if len(ranks) == 1 else None
        if isinstance(value, nn.Parameter) and home[name] is None:
            if any(isinstance(k, int) for k in where):
                lent.setdefault(id(value), name)
            if STEM in where:
                stem.setdefault(id(value), name)
    return Placement(tuple(counts), home, tuple(lent.values()), tuple(stem.values()), head_on_last)


def _pieces(program: Program, interface: Interface, head_on_last: bool) -> list[tuple[set[int | str], Piece]]:
    head: set[int | str] = {len(program.regions) - 1 if head_on_last else HEAD}
    if isinstance(interface, LocalCredit):
        head = set(interface.read_out)
    stem: set[int | str] = {STEM}
    found = [(stem, program.prologue), (stem, program.stem), (head, program.head)]
    for k, region in enumerate(program.regions):
        own: set[int | str] = {k}
        found += [(own, piece) for piece in (region.body, region.finish) if piece is not None]
    return found


def _tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Parameters and buffers under all of their names."""
    return [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]


class Shelf(nn.Module):
    """Holds parameters under the names they have in the model; it computes nothing."""


class Tree:
    """The model's parameters and buffers on one rank.

    Args:
        bounded: The bounded model, which is left as it is; its tensors are shared.
        placement: Where they are.
        rank: The rank.

    Attributes:
        root: What stands for the model itself.
        interface: The interface, without what other ranks hold.
    """

    def __init__(self, bounded: BoundedModule, placement: Placement, rank: int) -> None:
        self.root = Shelf()
        self._paths = {id(bounded): "", id(bounded.source): ""}
        self._paths |= {id(module): path for path, module in bounded.source.named_modules() if path}
        shared: dict[int, Any] = {id(p): p for p in bounded.interface.parameters()}
        self.interface = copy.deepcopy(bounded.interface, shared)
        self.root._modules[INTERFACE] = self.interface

        def kept(path: str, tensors: Mapping[str, Tensor | None]) -> dict[str, Any]:
            names = {name: ".".join(filter(None, (path, name))) for name in tensors}
            return {
                name: value if value is not None and placement.holds(rank, names[name]) else None
                for name, value in tensors.items()
            }

        for path, module in bounded.source.named_modules(remove_duplicate=False):
            shelf = self._shelf(path)
            shelf._parameters.update(kept(path, module._parameters))
            shelf._buffers.update(kept(path, module._buffers))
            shelf._non_persistent_buffers_set |= module._non_persistent_buffers_set
        for path, module in self.interface.named_modules():
            module._parameters.update(kept(".".join(filter(None, (INTERFACE, path))), module._parameters))

    def _shelf(self, path: str) -> nn.Module:
        shelf: nn.Module = self.root
        for part in path.split(".") if path else ():
            shelf = shelf._modules.setdefault(part, Shelf())  # pyright: ignore[reportAssignmentType]
        return shelf

    def rebind(self, program: Program, device: torch.device | None) -> Program:
        """The program, reading from this tree instead of from the model.

        Args:
            program: The program.
            device: Where values are to be made that were captured on the meta device.
        """

        def moved(piece: Piece) -> Piece:
            attributes = [
                (self._shelf(self._paths[id(owner)]) if id(owner) in self._paths else owner, name)
                for owner, name in piece.attributes
            ]
            code = piece.code if device is None else _on_device(piece.code, device)
            return Piece(code, tuple(attributes), piece.inputs, piece.outputs)

        regions = tuple(
            dataclasses.replace(
                region, body=moved(region.body), finish=None if region.finish is None else moved(region.finish)
            )
            for region in program.regions
        )
        return dataclasses.replace(
            program,
            prologue=moved(program.prologue),
            stem=moved(program.stem),
            regions=regions,
            head=moved(program.head),
            pieces={},  # nodes of the captured graph, which holds the whole model
        )

    def materialize(self, device: torch.device) -> None:
        """Give memory to what is on the meta device; what is tied stays tied."""
        made: dict[int, Any] = {}
        for module in self.root.modules():
            for tensors in (module._parameters, module._buffers):
                for name, value in tensors.items():
                    if value is None or not value.is_meta:
                        continue
                    if id(value) not in made:
                        empty = torch.empty_like(value, device=device)
                        own = isinstance(value, nn.Parameter)
                        made[id(value)] = value, nn.Parameter(empty, value.requires_grad) if own else empty
                    tensors[name] = made[id(value)][1]


def _on_device(code: fx.GraphModule, device: torch.device) -> fx.GraphModule:
    """The same code, which makes values on ``device`` where it made them on the meta device."""

    def swap(value: Any) -> Any:
        return device if isinstance(value, torch.device) and value.type == "meta" else value

    graph = fx.Graph()
    graph.output(graph.graph_copy(code.graph, {}))
    for node in graph.nodes:
        node.args, node.kwargs = map_aggregate(node.args, swap), map_aggregate(node.kwargs, swap)
    graph.lint()
    return fx.GraphModule(code, graph)
