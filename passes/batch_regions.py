"""Run regions that are alike as one graph: what they do alike becomes one operator with a leading axis over regions."""

from __future__ import annotations

import math
import operator
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from lbi_compile._torch import pytree
from lbi_compile.passes.alike import VIEWS, BatchRecord, Group, draws, groups, is_forward, producer, quotient, signature
from lbi_compile.passes.batch_cotangents import Batched
from lbi_compile.passes.jacobian_slices import simplified
from lbi_compile.passes.ordering import sort
from lbi_compile.passes.region_rules import POINTWISE, RegionInterpreter
from lbi_compile.passes.region_sums import item_of, sum_over_regions
from lbi_compile.passes.splicing import BACKWARD, FORWARD, Splicer

aten = torch.ops.aten

_GETITEM = operator.getitem


def batch_regions(
    gm: fx.GraphModule, *, record: BatchRecord, decompositions: Mapping[Any, Callable[..., Any]] | None = None
) -> fx.GraphModule:
    """Batch over regions whatever they do alike and independently of each other.

    Contract: ``gm`` is a joint graph of AOTAutograd whose regions are labelled (``alike.region_label``), after
    ``scan_backward``. Afterwards it computes the same values, up to the rounding of batched products and sums. Random
    numbers are drawn by the same operators in the same order. The graph is rewritten in place.

    Args:
        gm: The joint graph.
        record: Filled in.
        decompositions: What to trace inserted nodes with (Inductor's table under Inductor).

    Returns:
        ``gm``.

    Example:
        >>> from torch import fx, nn
        >>> record = BatchRecord()
        >>> _ = batch_regions(fx.symbolic_trace(nn.ReLU()), record=record)  # no regions, nothing to do
        >>> record.groups
        0
    """
    started = time.perf_counter()
    found = groups(gm.graph)
    if found:
        emitter = _Emitter(gm, decompositions, record)
        for wave in _waves(gm.graph, found):
            emitter.emit(wave)
        emitter.replace()
        record.nodes = len(emitter.done)
        record.sums = sum_over_regions(gm.graph)
        sort(gm.graph, forward=is_forward, in_order=draws)
        gm.graph.eliminate_dead_code()
        gm.graph.lint()
        gm.recompile()
    record.seconds = time.perf_counter() - started
    return gm


def _waves(graph: fx.Graph, found: Sequence[Group]) -> list[list[Group]]:
    """Groups in the order in which they can run; those of one wave read each other's values as they come.

    A wave holds groups of the same regions and one direction. A group that reads an earlier one through a node that is
    in no group, or of other regions, belongs to a later wave.
    """
    of = {node: group for group in found for node in group.members.values()}
    level: dict[Any, int] = {}
    waves: dict[Any, list[Group]] = defaultdict(list)
    for here in quotient(graph, found):
        members = here.members if isinstance(here, Group) else {None: here}
        least = 0
        for k, node in members.items():
            for source in map(producer, node.all_input_nodes):
                group = of.get(source)
                if group is None:
                    least = max(least, level[source])
                else:
                    direct = isinstance(here, Group) and _reads_along(here, group, k, source)
                    least = max(least, level[group] + (not direct))
        level[here] = least
        if isinstance(here, Group):
            waves[least, not here.forward, here.regions].append(here)
    return [waves[key] for key in sorted(waves)]


def _reads_along(reader: Group, read: Group, k: int | None, source: fx.Node) -> bool:
    """Region k of ``reader`` reads region k of ``read``, and the two are of the same regions and direction."""
    alike = reader.forward == read.forward and reader.regions == read.regions
    return alike and k is not None and read.members[k] is source


class _Emitter:
    """Puts the batched operators into the graph, wave by wave.

    Attributes:
        items: For a value that was batched, the batched node and its index there.
        done: Operators that were batched.
    """

    def __init__(self, gm: fx.GraphModule, decompositions: Any, record: BatchRecord) -> None:
        self.gm, self.graph, self.record = gm, gm.graph, record
        self.end = gm.graph.output_node()
        self.inductor = decompositions is not None  # which has no stack and no unbind of its own
        self.splicer = Splicer(gm, before=self.end, decompositions=decompositions)
        self.items: dict[fx.Node, tuple[fx.Node, int]] = {}
        self.done: set[fx.Node] = set()
        self.unbound: dict[fx.Node, list[fx.Node]] = {}
        self.gathered: dict[tuple[tuple[fx.Node, ...], str], fx.Node] = {}

    def emit(self, wave: Sequence[Group]) -> None:
        """Insert one wave; one that cannot be traced for several regions at once stays as it is."""
        piece = _Piece(wave, self.items)
        tag = FORWARD if wave[0].forward else BACKWARD
        try:
            results = self._trace(piece, len(wave[0].members), tag)
        except Exception as error:
            why = f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"
            self.record.unbatched.update((str(group.first.target), why) for group in wave)
            return
        for members, batched in zip(piece.results, results, strict=True):
            self.items.update((node, (batched, at)) for at, node in enumerate(members))
        self.record.groups += len(wave)
        self.done.update(node for group in wave for node in group.members.values())

    def _trace(self, piece: _Piece, count: int, tag: str) -> list[fx.Node]:
        """Insert what the piece does for ``count`` regions at once; nodes of its results, ``[count, ...]`` each."""
        shared = [len(set(nodes)) == 1 for nodes in piece.operands]
        operands = [
            self._item(nodes[0]) if same else self._gather(nodes, tag)
            for nodes, same in zip(piece.operands, shared, strict=True)
        ]
        shapes = [tuple(nodes[0].meta["val"].shape) for nodes in piece.operands]
        module = piece.module(self.gm)
        with self.splicer.tracing():
            values = [node.meta["val"] for node in (*(nodes[0] for nodes in piece.operands), *piece.constants)]
            module = simplified(module, values, keep=POINTWISE)
        unrolled: dict[str, str] = {}

        def run(*values: Any) -> list[Tensor]:
            batched = [
                value if same else Batched(value, shape)
                for value, same, shape in zip(values, shared, shapes, strict=False)
            ]
            interpreter = RegionInterpreter(module, count)
            results = interpreter.run(*batched, *values[len(batched) :])
            unrolled.update(interpreter.unrolled)
            return [
                result.full() if isinstance(result, Batched) else result.expand(count, *result.shape)
                for result in results
            ]

        results = self.splicer(run, [*operands, *piece.constants], tag=tag)
        self.record.unbatched.update(unrolled)
        return results

    def replace(self) -> None:
        """Let what still reads a node that was batched read its item."""
        for node in list(self.items):
            if any(user not in self.done for user in node.users):
                node.replace_all_uses_with(self._item(node), delete_user_cb=lambda user: user not in self.done)

    def _item(self, node: fx.Node) -> fx.Node:
        """The node's own value, taken out of the batched one."""
        if node not in self.items:
            return node
        batched, at = self.items[node]
        if batched not in self.unbound:
            tag, count = batched.meta["partitioner_tag"], batched.meta["val"].shape[0]
            if self.inductor:
                self.unbound[batched] = [self._call(aten.select.int, (batched, 0, i), tag) for i in range(count)]
            else:
                whole = self._call(aten.unbind.int, (batched,), tag)
                self.unbound[batched] = [self._call(_GETITEM, (whole, i), tag) for i in range(count)]
        return self.unbound[batched][at]

    def _gather(self, nodes: tuple[fx.Node, ...], tag: str) -> fx.Node:
        """Values of several regions as one, ``[regions, ...]``; not copied where they are parts of one value."""
        for known in (FORWARD, tag):
            if (nodes, known) in self.gathered:
                return self.gathered[nodes, known]
        places = [self._place(node) for node in nodes]
        base = places[0][0] if places[0] is not None else None
        at = [place[1] for place in places if place is not None and place[0] is base]
        if base is not None and at == list(range(at[0], at[0] + len(nodes))):
            made = base
            if len(nodes) != base.meta["val"].shape[0]:
                made = self._call(aten.slice.Tensor, (base, 0, at[0], at[0] + len(nodes)), tag)
        else:
            self.record.stacks += 1
            if all(node.op == "placeholder" for node in nodes):
                self.record.stacked_numbers += sum(node.meta["val"].numel() for node in nodes)
            parts = [self._item(node) for node in nodes]
            made = self._stack(parts, tag)
        self.gathered[nodes, made.meta["partitioner_tag"]] = made
        return made

    def _stack(self, parts: list[fx.Node], tag: str) -> fx.Node:
        """Stack the regions' values, `[...]` each, to `[n, ...]`."""
        if not self.inductor:
            return self._call(aten.stack.default, (parts,), tag)
        # Inductor would decompose a stack and then spend more time on a view for each part than one call takes. That
        # call copies as many numbers as the first dimension's stride says: too many where its size is 1 and its stride
        # is that of a larger tensor it is a part of, as torch takes such a part for contiguous.
        shape = parts[0].meta["val"].shape
        first = shape[0] if len(shape) else 1
        if isinstance(first, int) and first > 1:
            return self._call(aten._stack.default, (parts,), tag)
        if all(isinstance(size, int) for size in shape) and math.prod(shape) > 1:
            flat = [self._call(aten.reshape.default, (part, [-1]), tag) for part in parts]
            return self._call(aten.reshape.default, (self._call(aten._stack.default, (flat,), tag), [-1, *shape]), tag)
        rows = [self._call(aten.unsqueeze.default, (part, 0), tag) for part in parts]
        return self._call(aten.cat.default, (rows,), tag)

    def _place(self, node: fx.Node) -> tuple[fx.Node, int] | None:
        return self.items.get(node) or item_of(node)

    def _call(self, target: Any, args: tuple[Any, ...], tag: str) -> fx.Node:
        """Insert an operator.

        What can run in the forward does, for then one tensor is saved and not one a region; parameters are put together
        where they are needed, for such a copy would live until the backward.
        """
        with self.graph.inserting_before(self.end):
            node = self.graph.call_function(target, args)
        if all(map(is_forward, node.all_input_nodes)) and any(a.op != "placeholder" for a in node.all_input_nodes):
            tag = FORWARD
        with self.splicer.tracing():
            node.meta["val"] = target(*map_arg(args, lambda a: a.meta["val"]))
        node.meta["partitioner_tag"] = tag
        return node


class _Piece:
    """The operators of one wave as a graph of its own, written with the first region's nodes.

    Attributes:
        operands: For each tensor the piece reads, that tensor in each region.
        constants: Sizes the piece reads, the same in every region.
        results: For each tensor the piece gives, the nodes it stands for, by region.
    """

    def __init__(self, wave: Sequence[Group], batched: Collection[fx.Node]) -> None:
        self.graph = fx.Graph()
        self.batched = batched
        self.places: dict[tuple[fx.Node, ...], fx.Node] = {}
        self.sizes: dict[str, tuple[fx.Node, fx.Node]] = {}
        outputs: list[fx.Node] = []
        self.results: list[tuple[fx.Node, ...]] = []
        calls = []
        for group in wave:
            nodes = tuple(group.members.values())
            self.places[nodes] = self._call(nodes)
            calls.append(nodes)
        inside = {node for nodes in calls for node in nodes}
        for nodes in calls:
            for picked in _outputs(nodes):
                if any(user not in inside for node in picked for user in node.users if user.target is not _GETITEM):
                    self.results.append(picked)
                    outputs.append(self._value(picked))
        self.graph.output(tuple(outputs))

    @property
    def operands(self) -> list[tuple[fx.Node, ...]]:
        return [nodes for nodes, place in self.places.items() if place.op == "placeholder"]

    @property
    def constants(self) -> list[fx.Node]:
        return [node for node, _ in self.sizes.values()]

    def module(self, root: fx.GraphModule) -> fx.GraphModule:
        """The piece as a module: operands first, then constants."""
        first = self.graph._root
        for place in [*(self.places[nodes] for nodes in self.operands), *(place for _, place in self.sizes.values())]:
            first.append(place)
            first = place
        self.graph.lint()
        return fx.GraphModule(root, self.graph)

    def _call(self, nodes: tuple[fx.Node, ...]) -> fx.Node:
        flat = [pytree.tree_flatten((node.args, node.kwargs)) for node in nodes]
        first, spec = flat[0]
        leaves = [
            self._read(tuple(leaves[at] for leaves, _ in flat)) if isinstance(leaf, fx.Node) else leaf
            for at, leaf in enumerate(first)
        ]
        args, kwargs = pytree.tree_unflatten(leaves, spec)
        call = self.graph.call_function(nodes[0].target, args, kwargs)  # pyright: ignore[reportArgumentType]
        call.meta = dict(nodes[0].meta)
        return call

    def _read(self, nodes: tuple[fx.Node, ...]) -> fx.Node:
        """What stands for an operand."""
        value = nodes[0].meta["val"]
        if not isinstance(value, Tensor):
            if str(value) not in self.sizes:
                self.sizes[str(value)] = nodes[0], self._placeholder(nodes[0])
            return self.sizes[str(value)][1]
        return self._value(nodes)

    def _value(self, nodes: tuple[fx.Node, ...]) -> fx.Node:
        if nodes not in self.places:
            if nodes[0].target is _GETITEM and tuple(map(producer, nodes)) in self.places:
                whole = self.places[tuple(map(producer, nodes))]
                self.places[nodes] = self.graph.call_function(_GETITEM, (whole, nodes[0].args[1]))
                self.places[nodes].meta = dict(nodes[0].meta)
            elif self._is_view(nodes):
                # a view of parameters, say, of which a batched view is as good and its copy is read in order
                self.places[nodes] = self._call(nodes)
            else:
                self.places[nodes] = self._placeholder(nodes[0])
        return self.places[nodes]

    def _is_view(self, nodes: tuple[fx.Node, ...]) -> bool:
        if len(set(nodes)) < len(nodes) or any(n.target not in VIEWS or n in self.batched for n in nodes):
            return False
        return len({signature(node) for node in nodes}) == 1

    def _placeholder(self, node: fx.Node) -> fx.Node:
        place = self.graph.placeholder(f"value_{len(self.graph.nodes)}")
        place.meta = dict(node.meta)
        return place


def _outputs(nodes: tuple[fx.Node, ...]) -> list[tuple[fx.Node, ...]]:
    """The tensors that a group gives: itself, or its outputs that are picked in every region."""
    if isinstance(nodes[0].meta["val"], Tensor):
        return [nodes]
    picks: dict[Any, dict[fx.Node, fx.Node]] = defaultdict(dict)
    for node in nodes:
        for user in node.users:
            picks[user.args[1]][node] = user
    return [tuple(by[node] for node in nodes) for by in picks.values() if len(by) == len(nodes)]
