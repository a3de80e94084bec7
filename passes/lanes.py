"""Lanes: which values cross the boundaries of a cut model, and which piece every live node belongs to.

Contract: a captured graph's liveness and the lanes to cut at in, a frozen record out; the graph is left alone.

Three kinds of values are read across boundaries without being lanes: *shared sources*, which cost next to nothing to
compute from the inputs (the canvas, a decoder's embedding, a time embedding), *taps*, which only the head or the output
reads (secondary outputs, auxiliary losses, the steps that a final stack gathers), and numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from torch import fx

from lbi_compile.errors import NoSeparatorError
from lbi_compile.passes.liveness import PARAMETER, PARAMETER_ONLY, Liveness, is_random
from lbi_compile.passes.names import operator_name

# a live value may be read everywhere if what it is computed by takes no more than this share of the model's FLOPs
SHARED_WORK = 0.01
STEM = -1
# operators that put values side by side or view them, and do nothing else
_GATHERS = frozenset(
    f"aten.{name}"
    for name in (
        *("cat", "stack", "view", "reshape", "_unsafe_view", "flatten", "unflatten", "unsqueeze", "squeeze"),
        *("transpose", "permute", "t", "contiguous", "clone"),
    )
)


@dataclass(frozen=True, slots=True)
class Cut:
    """A model cut into a stem, ``K`` regions and a head.

    Attributes:
        canvas: The node every region may read; a live node, or an input.
        ends: The ``K`` main nodes where regions end; the last one starts the head.
        lanes: Per boundary ``1 .. K-1`` the nodes that cross it, in program order.
        piece: For every live node -1 (stem), the index of its region, or ``K`` (head).
        shared: Live values that later regions read without being lanes, in program order; the canvas is not listed.
        gather: Where a final stack or concatenation ends whose reads are taps, or ``None``.
    """

    canvas: fx.Node
    ends: tuple[fx.Node, ...]
    lanes: tuple[tuple[fx.Node, ...], ...]
    piece: Mapping[fx.Node, int]
    shared: tuple[fx.Node, ...]
    gather: fx.Node | None = None

    @property
    def crossers(self) -> tuple[fx.Node, ...]:
        """All lanes, in the order in which they first cross."""
        return tuple(dict.fromkeys(node for lanes in self.lanes for node in lanes))

    def first(self, lane: fx.Node) -> int:
        """The boundary a lane crosses first."""
        return next(k for k, lanes in enumerate(self.lanes, start=1) if lane in lanes)

    def last(self, lane: fx.Node) -> int:
        """The boundary a lane crosses last."""
        return max(k for k, lanes in enumerate(self.lanes, start=1) if lane in lanes)

    @property
    def uniform(self) -> bool:
        """Every boundary has one lane of the canvas's shape and dtype, which no other boundary has."""
        return all(len(lanes) == 1 and lanes[0] is end for lanes, end in zip(self.lanes, self.ends, strict=False)) and (
            len({form(node) for node in (self.canvas, *self.ends[:-1])}) == 1 and len(set(self.ends)) == len(self.ends)
        )


def form(node: fx.Node) -> tuple[tuple[str, ...], str]:
    """Shape (sizes as text, so that symbols compare) and dtype of a node's tensor."""
    value = node.meta["val"]
    return tuple(str(size) for size in value.shape), str(value.dtype)


def main_path(live: Liveness, flops: Mapping[fx.Node, int]) -> tuple[fx.Node, frozenset[fx.Node]]:
    """The output that most of the work leads to, and all live nodes that lead to it.

    Of outputs with equal work the first in program order counts: logits come before a loss that is made of them. What
    leads to other outputs only (an auxiliary loss, an exit in the middle) is a tap of the region it reads.
    """
    position = {node: i for i, node in enumerate(live.live)}
    reach = {sink: ancestors(live, [sink]) for sink in sorted(live.sinks, key=position.__getitem__)}
    work = {sink: sum(flops.get(node, 0) for node in nodes) for sink, nodes in reach.items()}
    best = max(work.values())
    sink = next(sink for sink, amount in work.items() if amount == best)
    return sink, frozenset(reach[sink])


def ancestors(live: Liveness, nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """Live nodes that ``nodes`` wait for, by value or through memory, and themselves."""
    found: set[fx.Node] = set()
    pending = [node for node in nodes if live.kind.get(node) == "live"]
    while pending:
        node = pending.pop()
        if node not in found:
            found.add(node)
            pending += [before for before in live.waits[node] if live.kind.get(before) == "live"]
    return found


def shared_sources(live: Liveness, flops: Mapping[fx.Node, int]) -> frozenset[fx.Node]:
    """Live values that are nearly free to compute from the inputs, so that every region may read them.

    A bound is used that counts work twice where paths meet again: some cheap values are missed, none is wrongly taken.
    Operators whose FLOPs nobody knows (those of other libraries) count as work.
    """
    limit = int(SHARED_WORK * sum(flops.get(node, 0) for node in live.live))
    tangled = {*live.overwritten, *live.memory, *(before for some in live.memory.values() for before in some)}
    bound: dict[fx.Node, int] = {}
    for node in live.live:
        known = getattr(node.target, "namespace", "aten") in ("aten", "prims", "_operator")
        own = flops.get(node, 0) if known and node not in tangled else limit + 1
        bound[node] = min(limit + 1, own + sum(bound[before] for before in live.waits[node] if before in bound))
    return frozenset(node for node, work in bound.items() if work <= limit)


def gathering_tail(live: Liveness, end: fx.Node) -> frozenset[fx.Node]:
    """``end`` and the views, stacks and concatenations before it that nothing else reads: what they read are taps.

    Without it the outputs of all steps of an unrolled recurrent net, stacked at its end, would cross every boundary.
    Empty where ``end`` is made in another way.
    """
    users = readers(live)
    tail: set[fx.Node] = set()
    pending = [end]
    while pending:
        node = pending.pop()
        free = operator_name(node) in _GATHERS and not any(
            live.kind.get(before) in (PARAMETER, PARAMETER_ONLY) for before in live.waits[node]
        )
        if free and node not in live.memory and (node is end or all(user in tail for user in users[node])):
            tail.add(node)
            pending += [before for before in live.waits[node] if live.kind.get(before) == "live"]
    several = any(sum(live.kind.get(a) == "live" for a in live.waits[node]) > 1 for node in tail)
    return frozenset(tail) if several else frozenset()


def readers(live: Liveness) -> dict[fx.Node, list[fx.Node]]:
    """For every live node the live nodes that wait for it, in program order."""
    users: dict[fx.Node, list[fx.Node]] = {node: [] for node in live.live}
    for node in live.live:
        for before in live.waits[node]:
            if before in users:
                users[before].append(node)
    return users


def assign(
    live: Liveness,
    *,
    main: frozenset[fx.Node],
    canvas: fx.Node,
    lanes: Sequence[Sequence[fx.Node]],
    ends: Sequence[fx.Node],
    tail: frozenset[fx.Node] = frozenset(),
) -> dict[fx.Node, int]:
    """The piece of every live node: -1 for the stem, ``k`` for region k, ``K`` for the head.

    A node of the main path lies before a boundary iff a lane of the boundary waits for it. Another node, and one that
    only a gathering tail reads, goes with the region whose values it reads, if it runs there; else to the head, for
    which what it reads is a tap.

    Args:
        live: Liveness of the graph.
        main: Nodes that lead to the main output.
        canvas: Where the stem ends.
        lanes: Nodes to cut at, per boundary.
        ends: Where regions end; the last one starts the head.
        tail: Gathering nodes that belong to the head.
    """
    late: frozenset[fx.Node] = frozenset()
    while True:
        piece, side = _assign(live, main, canvas, lanes, ends, tail, late)
        apart = {a for node, some in live.memory.items() for a in (node, *some) if _apart(piece, node, some)}
        if apart & side <= late:
            return piece
        # memory beside the main path is written to by several regions: all of that is done at the end
        late |= apart & side


def _apart(piece: Mapping[fx.Node, int], node: fx.Node, some: Iterable[fx.Node]) -> bool:
    """The node uses memory that others use in another piece."""
    return node in piece and any(before in piece and piece[before] != piece[node] for before in some)


def _assign(
    live: Liveness,
    main: frozenset[fx.Node],
    canvas: fx.Node,
    lanes: Sequence[Sequence[fx.Node]],
    ends: Sequence[fx.Node],
    tail: frozenset[fx.Node],
    late: frozenset[fx.Node],
) -> tuple[dict[fx.Node, int], set[fx.Node]]:
    """As ``assign``, with ``late`` in the head; the pieces, and the nodes beside the main path."""
    position = {node: i for i, node in enumerate(live.live)}
    first = position.get(canvas, -1)
    piece: dict[fx.Node, int] = {}
    for k, some in enumerate((*lanes, [ends[-1]])):
        for node in ancestors(live, some):
            piece.setdefault(node, STEM if position[node] <= first else k)
    head = len(ends)
    gathered = ancestors(live, [before for node in tail for before in live.waits[node] if before not in tail])
    side: set[fx.Node] = set()
    here = STEM  # the piece that program order has come to
    for i, node in enumerate(live.live):
        if node in piece or (node in main and node not in gathered):
            piece.setdefault(node, STEM if i <= first else head)
            here = max(here, piece[node])
            continue
        reads = [before for before in live.waits[node] if before in piece]
        at = {piece[before] for before in reads if before is not canvas and piece[before] != STEM}
        if i <= first:
            piece[node] = STEM
            continue
        side.add(node)
        if node in late:
            piece[node] = head
        elif not at:
            piece[node] = max(here, 0)
        else:
            # not earlier than program order has it: gradients would be summed in another order
            piece[node] = here if at == {here} and ends[-1] not in reads else head
    return piece, side


def crossing(
    live: Liveness, piece: Mapping[fx.Node, int], *, canvas: fx.Node, regions: int, shared: frozenset[fx.Node]
) -> tuple[tuple[tuple[fx.Node, ...], ...], tuple[fx.Node, ...]]:
    """What crosses the boundaries ``1 .. K-1``: lanes per boundary, and the shared sources that are read across.

    Args:
        live: Liveness of the graph.
        piece: Piece of every live node.
        canvas: Where the stem ends; it may be read everywhere.
        regions: ``K``.
        shared: Values that may be read everywhere.
    """
    reach: dict[fx.Node, int] = {}
    for node in live.live:
        if piece[node] < regions:
            for before in live.waits[node]:
                if before in piece and before is not canvas and piece[before] < piece[node]:
                    reach[before] = max(reach.get(before, 0), piece[node])
    lanes = [
        tuple(n for n in live.live if n not in shared and max(piece[n], 0) < k <= reach.get(n, 0))
        for k in range(1, regions)
    ]
    read = (n for n, last in reach.items() if n in shared and last > max(piece[n], 0))
    return tuple(lanes), tuple(sorted(read, key=live.live.index))


def cut(
    live: Liveness,
    *,
    main: frozenset[fx.Node],
    canvas: fx.Node,
    lanes: Sequence[Sequence[fx.Node]],
    ends: Sequence[fx.Node],
    gather: fx.Node | None = None,
    shared: frozenset[fx.Node] = frozenset(),
    bases: Sequence[fx.Node] = (),
) -> Cut:
    """Cut at ``lanes``; arguments as for ``assign`` and ``crossing``.

    Args:
        gather: End of a gathering tail, if the model has one.
        bases: Shared sources to list first, even if no later region reads them.

    Raises:
        NoSeparatorError: Other values than ``lanes`` cross a boundary, memory is used on both sides of one, or random
            draws would change their order.
    """
    tail = gathering_tail(live, gather) if gather is not None else frozenset()
    piece = assign(live, main=main, canvas=canvas, lanes=lanes, ends=ends, tail=tail)
    found, read = crossing(live, piece, canvas=canvas, regions=len(ends), shared=shared)
    for k, (wanted, got) in enumerate(zip(lanes, found, strict=True), start=1):
        stray = [node.name for node in got if node not in wanted]
        if stray:
            raise NoSeparatorError(
                f"{', '.join(stray)} crosses boundary {k} beside {', '.join(node.name for node in wanted)}",
                expected="lanes that carry everything across each boundary",
                do="choose other boundaries, or give a number of regions and let the compiler choose",
            )
    shared_memory = [
        before.name
        for node, some in live.memory.items()
        for before in some
        if before in piece and node in piece and piece[before] != piece[node] and len(ends) > 1
    ]
    if shared_memory:
        raise NoSeparatorError(
            f"the memory of {', '.join(dict.fromkeys(shared_memory))} is used across a boundary",
            expected="values that carry everything across each boundary",
            do="choose other boundaries, or give a number of regions and let the compiler choose",
        )
    draws = [piece[node] for node in live.live if is_random(node)]
    if draws != sorted(draws):
        raise NoSeparatorError(
            "a cut that changes the order of random draws",
            expected="regions that draw in program order",
            do="give another number of regions, or boundaries between modules",
        )
    kept = tuple(dict.fromkeys((*bases, *read)))
    return Cut(canvas, tuple(ends), found, MappingProxyType(piece), kept, gather)


def allocate(cut: Cut, causal: frozenset[fx.Node]) -> dict[fx.Node, int]:
    """A slot for every lane, so that lanes that cross one boundary have slots of their own.

    A lane takes a slot that is free, of its kind (causal or not), first one that held a lane of its shape: what a slot
    held before is still heard in it. Few slots, because the latent's numbers are shared out among them.
    """
    slots: list[tuple[bool, fx.Node]] = []  # kind, and the lane it holds or held last
    found: dict[fx.Node, int] = {}
    for k, lanes in enumerate(cut.lanes, start=1):
        for lane in lanes:
            if lane in found:
                continue
            kind = lane in causal
            free = [i for i, (of, held) in enumerate(slots) if of == kind and cut.last(held) < k]
            free.sort(key=lambda i: (form(slots[i][1]) != form(lane), -cut.last(slots[i][1]), i))
            if free:
                found[lane] = free[0]
                slots[free[0]] = (kind, lane)
            else:
                found[lane] = len(slots)
                slots.append((kind, lane))
    return found
