"""Windows: boundaries of several lanes, by minimum vertex cuts around equal shares of the work.

Contract: liveness and costs in, a ``Cut`` out; the graph is left alone. Deterministic.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from math import prod
from statistics import median

import torch
from torch import fx

from lbi_compile.errors import NoSeparatorError, TooManyRegionsError
from lbi_compile.passes.lanes import Cut, cut, form, gathering_tail, shared_sources
from lbi_compile.passes.liveness import Liveness, is_float_tensor
from lbi_compile.passes.separators import Separator
from lbi_compile.passes.vertex_cut import minimum_cut

# a step between two separators counts as work from this share of the median step with FLOPs on
HEAVY = 0.05
# half widths of the window around each equal share, in mean regions
WINDOWS = (0.03, 0.07, 0.14, 0.24, 0.4)
# how much evenness (largest over mean region) one lane more at every boundary must bring to be worth it
LANE_WORTH = 0.2
# an input that makes so many times the numbers of the first separator is what the model works on, not that separator
MUCH_LARGER = 4
# what a lane costs beside its distance from the equal share: new ones, and ones of another shape than the canvas, more
_LANE, _HELD, _OTHER_SHAPE, _DISTANCE = 10_000, -1_000, 500, 1_000


def several_lanes(
    live: Liveness,
    points: Sequence[Separator],
    *,
    sink: fx.Node,
    main: frozenset[fx.Node],
    regions: int,
    cost: Mapping[fx.Node, int],
    flops: Mapping[fx.Node, int],
    starts: Sequence[fx.Node] = (),
) -> Cut:
    """Cut with as few lanes as even regions allow.

    The canvas is the last one-lane separator before the first heavy step, whatever its shape; the head starts at the
    first one after the last heavy step. In a window around each equal share of the work a minimum vertex cut finds the
    fewest lanes. Of several window widths the best compromise of few lanes and even regions is taken.

    Args:
        live: Liveness of the graph.
        points: One-lane separators of the main path, in program order.
        sink: The main output.
        main: Nodes that lead to it.
        regions: ``K``.
        cost: Work of each node, for balance.
        flops: Matrix FLOPs of each node.
        starts: First node of every region but the first, to cut there instead.

    Raises:
        TooManyRegionsError: Some region would be empty.
        NoSeparatorError: A window holds no cut of float tensors.
    """
    canvas, end = _frame(live, points, sink, main, flops)
    tail = gathering_tail(live, end)
    gather = end if tail else None
    position = {node: i for i, node in enumerate(live.live)}
    if tail:
        gathered = {before for node in tail for before in live.waits[node] if before not in tail}
        end = max((n for n in gathered if n in main), key=position.__getitem__)
    shared = shared_sources(live, flops) - {canvas}
    inner = [node for node in live.live[position[canvas] + 1 : position[end] + 1] if node in main and node not in tail]
    if len(inner) < regions:
        raise TooManyRegionsError(
            f"{regions} regions asked for, {len(inner)} operations between canvas and head",
            expected=f"at most {max(len(inner), 1)} regions",
            do="ask for fewer",
        )
    stem = [node for node in live.live[: position[canvas]] if node in main]
    nodes = [*stem, canvas, *inner]
    place = {node: i for i, node in enumerate(nodes)}
    users: dict[fx.Node, list[fx.Node]] = {node: [] for node in nodes}
    for node in nodes:
        for before in live.waits.get(node, ()):
            if before in users:
                users[before].append(node)
    weight = [
        *[0] * len(stem),
        *accumulate((cost.get(node, 0) for node in inner), initial=0),
    ]  # up to and with nodes[i]
    free = shared | {canvas}

    def made(lanes: Sequence[Sequence[fx.Node]]) -> Cut:
        ends = [*(max(some, key=place.__getitem__) for some in lanes), end]
        return cut(live, main=main, canvas=canvas, lanes=lanes, ends=ends, gather=gather, shared=shared)

    if starts:
        return made([_crossing_at(node, nodes, place, users, free, first=len(stem)) for node in starts])
    best: tuple[float, Cut] | None = None
    refused: NoSeparatorError | TooManyRegionsError | None = None
    for half in WINDOWS:
        try:
            found = made(_in_windows(live, nodes, users, weight, regions, half, free, canvas, first=len(stem)))
        except (NoSeparatorError, TooManyRegionsError) as error:
            refused = error
            continue
        sizes = [0] * regions
        for node in inner:
            sizes[min(max(found.piece[node], 0), regions - 1)] += cost.get(node, 0)
        balance = max(sizes) * regions / max(sum(sizes), 1)
        more = sum(map(len, found.lanes)) / max(regions - 1, 1) - 1
        merit = balance * (1 + LANE_WORTH * more)
        if best is None or merit < best[0]:
            best = merit, found
    if best is None:
        assert refused is not None
        raise refused
    return best[1]


def _frame(
    live: Liveness, points: Sequence[Separator], sink: fx.Node, main: frozenset[fx.Node], flops: Mapping[fx.Node, int]
) -> tuple[fx.Node, fx.Node]:
    """Canvas, and the node that starts the head."""
    work = list(accumulate((flops.get(n, 0) if n in main else 0 for n in live.live), initial=0))
    chain = list(points)
    last = Separator(sink, live.live.index(sink))
    start = next(i for i, node in enumerate(live.live) if node in main and is_float_tensor(node))
    half = max(work[-1], 1) / 2
    entry = _late_entry(live, chain, main)
    if entry is not None:
        chain = [Separator(entry, live.live.index(entry)), *(p for p in chain if p.position > live.live.index(entry))]
    # most of the work lies before the first separator, or after the last one: nothing better than the model's ends
    if not chain or (work[chain[0].position + 1] > half and chain[0].position > start):
        chain.insert(0, Separator(live.live[start], start))
    if work[last.position + 1] - work[chain[-1].position + 1] > half and sink not in live.overwritten:
        chain.append(last)
    steps = [work[b.position + 1] - work[a.position + 1] for a, b in pairwise(chain)]
    if not any(steps):
        return chain[0].node, chain[-1].node
    floor = HEAVY * median(step for step in steps if step)
    heavy = [i for i, step in enumerate(steps) if step >= floor]
    return chain[heavy[0]].node, chain[heavy[-1] + 1].node


def _late_entry(live: Liveness, chain: Sequence[Separator], main: frozenset[fx.Node]) -> fx.Node | None:
    """Where a much larger input enters after the first separator: that one carried a condition only (a time step)."""
    if not chain:
        return None
    entries = [
        node
        for node in live.live[chain[0].position + 1 :]
        if node in main and is_float_tensor(node) and not any(before in main for before in live.waits[node])
    ]
    largest = max(entries, key=_numbers, default=None)
    return largest if largest is not None and _numbers(largest) > MUCH_LARGER * _numbers(chain[0].node) else None


def _numbers(node: fx.Node) -> int:
    """How many numbers a value has at the example inputs."""
    return prod(size.node.hint if isinstance(size, torch.SymInt) else size for size in node.meta["val"].shape)


def _in_windows(
    live: Liveness,
    nodes: Sequence[fx.Node],
    users: Mapping[fx.Node, Sequence[fx.Node]],
    weight: Sequence[int],
    regions: int,
    half: float,
    free: frozenset[fx.Node],
    canvas: fx.Node,
    *,
    first: int,
) -> list[tuple[fx.Node, ...]]:
    """Lanes of the boundaries, each a minimum cut within ``half`` a mean region of its equal share."""
    mean = weight[-1] / regions
    place = {node: i for i, node in enumerate(nodes)}
    found: list[tuple[fx.Node, ...]] = []
    held: set[fx.Node] = set()
    for k in range(1, regions):
        target = k * mean
        previous = max(first, *(place[node] for node in found[-1])) if found else first
        low = max(bisect_right(weight, target - half * mean) - 1, previous)
        last = len(nodes) - regions + k  # every later region has an operation of its own
        high = min(bisect_left(weight, target + half * mean) + 1, last)

        def price(node: fx.Node, target: float = target) -> int:
            distance = min(abs(weight[place[node]] - target) / mean, 1.0)
            fitting = _HELD if node in held else 0 if form(node) == form(canvas) else _OTHER_SHAPE
            return _LANE + fitting + int(_DISTANCE * distance)

        lanes = None
        if low + 1 < high:
            lanes = minimum_cut(live, nodes, users=users, window=(low, high), price=price, free=free)
        before = found[-1] if found else nodes[:first]
        # there is no cut, the region would be empty, or no gradient comes back through it
        if lanes is None or set(lanes) <= set(before) or live.detached.issuperset(lanes):
            lanes = _nearest(live, nodes, users, weight, target, range(previous + 1, last), free)
        found.append(lanes)
        held.update(lanes)
    return found


def _nearest(
    live: Liveness,
    nodes: Sequence[fx.Node],
    users: Mapping[fx.Node, Sequence[fx.Node]],
    weight: Sequence[int],
    target: float,
    among: range,
    free: frozenset[fx.Node],
) -> tuple[fx.Node, ...]:
    """Where one node outweighs the window: the fewest lanes ``among`` places of program order, the nearest of those.

    A gradient comes back through one of them at least.
    """
    place = {node: i for i, node in enumerate(nodes)}
    last = [max((place[user] for user in users[node]), default=i) for i, node in enumerate(nodes)]
    spans = [0] * (len(nodes) + 1)
    for i, node in enumerate(nodes):
        if node not in free and last[i] > i:
            spans[i] += 1 if is_float_tensor(node) and node not in live.overwritten else len(nodes)
            spans[last[i]] -= 1 if is_float_tensor(node) and node not in live.overwritten else len(nodes)
        for before in live.memory.get(node, ()):
            if before in place:
                spans[place[before]] += len(nodes)
                spans[i] -= len(nodes)
    counts = list(accumulate(spans))
    inside = [i for i in among if 0 < counts[i] < len(nodes)]
    for at in sorted(inside, key=lambda i: (counts[i], abs(weight[i] - target))):
        lanes = tuple(n for i, n in enumerate(nodes[: at + 1]) if n not in free and last[i] > at)
        if not live.detached.issuperset(lanes):
            return lanes
    raise NoSeparatorError(
        "a region between whose operations no set of float tensors carries everything",
        expected="places to cut",
        do="ask for fewer regions",
    )


def _crossing_at(
    start: fx.Node,
    nodes: Sequence[fx.Node],
    place: Mapping[fx.Node, int],
    users: Mapping[fx.Node, Sequence[fx.Node]],
    free: frozenset[fx.Node],
    *,
    first: int,
) -> tuple[fx.Node, ...]:
    """What program order carries from before ``start`` to it and what follows."""
    if start not in place or place[start] < first + 2:
        raise NoSeparatorError(
            f"a region that starts at {start.name}",
            expected="a region that starts behind the canvas, at work that leads to the main output",
            do="name other modules, or give a number of regions",
        )
    at = place[start]
    lanes = tuple(n for n in nodes[:at] if n not in free and any(place[user] >= at for user in users[n]))
    if not lanes:
        raise NoSeparatorError(
            f"nothing crosses to {start.name}", expected="a value that does", do="name other modules"
        )
    return lanes
