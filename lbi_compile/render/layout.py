"""Layout: boxes of a directed graph in rows from top to bottom, edges bent around the boxes between them.

Rows by longest paths, order in a row by barycentres: Sugiyama, Tagawa and Toda, "Methods for Visual Understanding of
Hierarchical System Structures", 1981. Columns by blocks that stay straight: Brandes and Köpf, "Fast and Simple
Horizontal Coordinate Assignment", 2001, with pulls between blocks in place of four alignments. Deterministic.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import inf

# classes of segments, least to most important to be straight: where a long edge leaves or enters a box; inside a long
# edge; between two boxes
_BRANCH, _LONG, _NEXT = 0, 1, 2
_PULL = {_BRANCH: 1.0, _LONG: 4.0, _NEXT: 8.0}
_ROUNDS = 12
_SWEEPS = 24
_PATIENCE = 6


@dataclass(frozen=True, slots=True)
class Spacing:
    """Distances in pixels.

    Attributes:
        row: Between two rows.
        band: Between the last row of a band and the first of the next.
        column: Between two boxes of a row.
        bend: Between a bend and its neighbour.
    """

    row: float = 24
    band: float = 24
    column: float = 20
    bend: float = 12


@dataclass(frozen=True, slots=True)
class Layout:
    """Where everything is. A *thing* is a box, or a bend of an edge that passes a row; bends follow boxes in number.

    Attributes:
        rows: Things of each row from left to right.
        x: Centre of each thing.
        row: Row of each thing.
        tops: Top of each row.
        heights: Height of each row.
        bends: For every edge the bends it passes from its source to its target.
        bands: First and last row of each band; ``None`` for a band without boxes.
        borders: After each band the row of bends where edges cross its lower border; ``None`` where there is none.
        width, height: Of everything.
    """

    rows: tuple[tuple[int, ...], ...]
    x: tuple[float, ...]
    row: tuple[int, ...]
    tops: tuple[float, ...]
    heights: tuple[float, ...]
    bends: tuple[tuple[int, ...], ...]
    bands: tuple[tuple[int, int] | None, ...]
    borders: tuple[int | None, ...]
    width: float
    height: float


def layered(
    sizes: Sequence[tuple[float, float]],
    edges: Sequence[tuple[int, int]],
    *,
    bands: Sequence[int] | None = None,
    weights: Sequence[float] | None = None,
    spacing: Spacing | None = None,
) -> Layout:
    """Lay a graph out from top to bottom.

    Args:
        sizes: Width and height of every box.
        edges: Source and target of every edge, by box; cycles are allowed, one edge of each then leads upwards.
        bands: For every box the band it lies in: all rows of a band are above those of the next. Between two bands runs
            a border, which all edges of one box cross at one point.
        weights: For every box how much it counts: where a line could go straight to several boxes, it goes to a heavy
            one.
        spacing: Distances.

    Returns:
        The layout. Boxes of a row do not overlap, and no edge passes through a box.

    Example:
        >>> made = layered([(40, 20), (40, 20)], [(0, 1)])
        >>> made.rows, made.tops
        (((0,), (1,)), (0.0, 44.0))
    """
    distance = spacing or Spacing()
    band = list(bands) if bands is not None else [0] * len(sizes)
    order = _order(len(sizes), edges, band)
    place = {box: i for i, box in enumerate(order)}
    down = [(u, v) if place[u] < place[v] else (v, u) for u, v in edges]
    row, ranges, borders = _rows(order, [edge for edge in down if edge[0] != edge[1]], band)
    width = [size[0] for size in sizes]
    bends, segments = _bend(down, row, width, frozenset(borders))
    rows: list[list[int]] = [[] for _ in range(max(row, default=-1) + 1)]
    for thing in sorted(range(len(row)), key=lambda t: (place.get(t, len(order)), t)):
        rows[row[thing]].append(thing)
    rows = _uncross(rows, list(segments), row)
    heavy = [*(weights or [1.0] * len(sizes)), *([0.0] * (len(row) - len(sizes)))]
    x = _columns(rows, segments, row, width, heavy, len(sizes), distance)
    heights = [max((sizes[t][1] for t in some if t < len(sizes)), default=0.0) for some in rows]
    tops = _tops(heights, borders, distance)
    routes = [
        tuple(reversed(some)) if edge != wanted else some for some, edge, wanted in zip(bends, down, edges, strict=True)
    ]
    right = max((x[t] + width[t] / 2 for t in range(len(x))), default=0.0)
    return Layout(
        rows=tuple(tuple(some) for some in rows),
        x=tuple(x),
        row=tuple(row),
        tops=tuple(tops),
        heights=tuple(map(float, heights)),
        bends=tuple(routes),
        bands=tuple(ranges),
        borders=tuple(borders),
        width=right,
        height=tops[-1] + heights[-1] if tops else 0.0,
    )


def _order(boxes: int, edges: Sequence[tuple[int, int]], band: Sequence[int]) -> list[int]:
    """A topological order near the given one, band after band; where there is a cycle its first box goes first."""
    after: list[list[int]] = [[] for _ in range(boxes)]
    waits = [0] * boxes
    for u, v in edges:
        if band[u] == band[v] and u != v:
            after[u].append(v)
            waits[v] += 1
    ready = [(band[v], v) for v in range(boxes) if not waits[v]]
    stuck = sorted((band[v], v) for v in range(boxes) if waits[v])
    heapq.heapify(ready)
    order: list[int] = []
    done = [False] * boxes
    at = 0
    while len(order) < boxes:
        if ready:
            _, box = heapq.heappop(ready)
        else:
            while done[stuck[at][1]]:
                at += 1
            box = stuck[at][1]
        if done[box]:
            continue
        done[box] = True
        order.append(box)
        for v in after[box]:
            waits[v] -= 1
            if not waits[v] and not done[v]:
                heapq.heappush(ready, (band[v], v))
    return sorted(order, key=band.__getitem__)


def _rows(
    order: Sequence[int], down: Sequence[tuple[int, int]], band: Sequence[int]
) -> tuple[list[int], list[tuple[int, int] | None], list[int | None]]:
    """The row of every box, the rows of every band, and the rows between bands."""
    before: dict[int, list[int]] = {box: [] for box in order}
    after: dict[int, list[int]] = {box: [] for box in order}
    for u, v in down:
        if band[u] == band[v]:
            before[v].append(u)
            after[u].append(v)
    rank = [0] * len(order)
    for box in order:
        rank[box] = max((rank[u] + 1 for u in before[box]), default=0)
    for box in reversed(order):
        # a box that many read and that reads little goes down to its first reader: its edges get shorter
        if len(after[box]) > len(before[box]):
            rank[box] = min(rank[v] for v in after[box]) - 1
    ranges: list[tuple[int, int] | None] = []
    borders: list[int | None] = []
    start, last = 0, max(band, default=-1)
    for b in range(last + 1):
        inside = [box for box in order if band[box] == b]
        rows = max((rank[box] + 1 for box in inside), default=0)
        ranges.append((start, start + rows - 1) if inside else None)
        for box in inside:
            rank[box] += start
        start += rows
        borders.append(start if inside and b < last else None)
        start += borders[-1] is not None
    return rank, ranges, borders


def _bend(
    down: Sequence[tuple[int, int]], row: list[int], width: list[float], borders: frozenset[int | None]
) -> tuple[list[tuple[int, ...]], dict[tuple[int, int], int]]:
    """Bends of all edges, shared by edges of one source, and segments between rows with their class."""
    known: dict[tuple[int, int], int] = {}
    bends: list[tuple[int, ...]] = []
    segments: dict[tuple[int, int], int] = {}
    for u, v in down:
        passed = []
        for r in range(row[u] + 1, row[v]):
            if (u, r) not in known:
                known[u, r] = len(row)
                row.append(r)
                width.append(0.0)
            passed.append(known[u, r])
        bends.append(tuple(passed))
        # an edge to the next row of boxes, across a border, is as short as one inside a band
        short = len(passed) == 0 or (len(passed) == 1 and row[passed[0]] in borders)
        for a, b in pairwise((u, *passed, v)) if u != v else ():
            how = _NEXT if short else _LONG if a != u and b != v else _BRANCH
            segments[a, b] = max(how, segments.get((a, b), how))
    return bends, segments


def _neighbours(segments: Sequence[tuple[int, int]], things: int) -> tuple[list[list[int]], list[list[int]]]:
    above: list[list[int]] = [[] for _ in range(things)]
    below: list[list[int]] = [[] for _ in range(things)]
    for u, v in segments:
        above[v].append(u)
        below[u].append(v)
    return above, below


def _uncross(rows: list[list[int]], segments: Sequence[tuple[int, int]], row: Sequence[int]) -> list[list[int]]:
    """Order every row by the mean place of its neighbours, downwards and upwards in turn; the best order seen wins."""
    above, below = _neighbours(segments, len(row))
    rows = [list(some) for some in rows]
    place = [0] * len(row)
    for some in rows:
        for i, thing in enumerate(some):
            place[thing] = i
    best, fewest, since = [list(some) for some in rows], _crossings(rows, below, place), 0
    for sweep in range(_SWEEPS):
        if not fewest or since >= _PATIENCE:
            break
        downwards = sweep % 2 == 0
        near = above if downwards else below
        for r in range(len(rows)) if downwards else reversed(range(len(rows))):
            mean = {t: sum(place[n] for n in near[t]) / len(near[t]) if near[t] else float(place[t]) for t in rows[r]}
            # every other pair of sweeps turns ties around: some crossings only go away so
            tie = -1 if sweep % 4 >= 2 else 1
            rows[r].sort(key=lambda t: (mean[t], tie * place[t]))
            for i, thing in enumerate(rows[r]):
                place[thing] = i
        crossings = _crossings(rows, below, place)
        since += 1
        if crossings < fewest:
            best, fewest, since = [list(some) for some in rows], crossings, 0
    return best


def _crossings(rows: Sequence[Sequence[int]], below: Sequence[Sequence[int]], place: Sequence[int]) -> int:
    """Pairs of segments that cross: Barth, Jünger and Mutzel, "Simple and Efficient Bilayer Cross Counting", 2002."""
    total = 0
    for r in range(len(rows) - 1):
        size = len(rows[r + 1])
        tree = [0] * (size + 1)
        seen = 0
        for thing in rows[r]:
            ends = sorted(place[v] for v in below[thing])
            for end in ends:
                i, at_most = end + 1, 0
                while i:
                    at_most += tree[i]
                    i &= i - 1
                total += seen - at_most
            for end in ends:
                i = end + 1
                while i <= size:
                    tree[i] += 1
                    i += i & -i
                seen += 1
    return total


def _columns(
    rows: Sequence[Sequence[int]],
    segments: Mapping[tuple[int, int], int],
    row: Sequence[int],
    width: Sequence[float],
    heavy: Sequence[float],
    boxes: int,
    distance: Spacing,
) -> list[float]:
    """Centres of all things."""
    block = _blocks(rows, segments, row, heavy)
    left: list[list[tuple[int, float]]] = [[] for _ in block]
    right: list[list[tuple[int, float]]] = [[] for _ in block]
    for some in rows:
        for a, b in pairwise(some):
            gap = (width[a] + width[b]) / 2 + (distance.column if a < boxes and b < boxes else distance.bend)
            left[block[b]].append((block[a], gap))
            right[block[a]].append((block[b], gap))
    order = _across(sorted(set(block)), left, right)
    x = _pushed(order, left)
    wide = max(x.values(), default=0.0)
    mirrored = _pushed(order[::-1], right)
    # both are feasible, so their mean is
    x = {b: (x[b] + wide - mirrored[b]) / 2 for b in order}
    pulls: dict[int, list[tuple[int, float]]] = {b: [] for b in order}
    for (u, v), how in segments.items():
        if block[u] != block[v]:
            pulls[block[u]].append((block[v], _PULL[how]))
            pulls[block[v]].append((block[u], _PULL[how]))
    for turn in range(_ROUNDS):
        for b in order if turn % 2 else order[::-1]:
            if pulls[b]:
                wanted = sum(pull * x[other] for other, pull in pulls[b]) / sum(pull for _, pull in pulls[b])
                lowest = max((x[other] + gap for other, gap in left[b]), default=-inf)
                highest = min((x[other] - gap for other, gap in right[b]), default=inf)
                x[b] = min(max(wanted, lowest), highest)
    start = min((x[block[t]] - width[t] / 2 for t in range(len(block))), default=0.0)
    return [round(x[b] - start, 1) for b in block]


def _blocks(
    rows: Sequence[Sequence[int]],
    segments: Mapping[tuple[int, int], int],
    row: Sequence[int],
    heavy: Sequence[float],
) -> list[int]:
    """For every thing the first thing of its block: things below each other that share one centre.

    Of a thing's heavy neighbours the middle one goes with it. Links do not cross, so blocks can stand side by side.
    """
    place = {thing: i for some in rows for i, thing in enumerate(some)}
    above, below = _neighbours(list(segments), len(row))

    def middle(near: Sequence[int], how: Callable[[int], int]) -> int:
        best = max(map(how, near))
        found = sorted((n for n in near if how(n) == best), key=place.__getitem__)
        least = max(heavy[n] for n in found) / 2
        found = [n for n in found if heavy[n] >= least]
        return found[(len(found) - 1) // 2]

    wanted = []
    for v in range(len(row)):
        if above[v]:
            u = middle(above[v], lambda n, v=v: segments[n, v])
            chosen = middle(below[u], lambda n, u=u: segments[u, n])
            # links that both ends want come first
            wanted.append((-segments[u, v], chosen != v, row[v], place[v], u, v))
    up: dict[int, int] = {}
    taken: set[int] = set()
    links: dict[int, list[tuple[int, int]]] = {}
    for *_, u, v in sorted(wanted):
        there, link = links.setdefault(row[v], []), (place[u], place[v])
        at = bisect_left(there, link)
        crosses = (at and there[at - 1][1] > link[1]) or (at < len(there) and there[at][1] < link[1])
        if u not in taken and not crosses:
            taken.add(u)
            up[v] = u
            there.insert(at, link)
    block = list(range(len(row)))
    for v in sorted(up, key=row.__getitem__):
        block[v] = block[up[v]]
    return block


def _across(
    blocks: Sequence[int], left: Sequence[Sequence[tuple[int, float]]], right: Sequence[Sequence[tuple[int, float]]]
) -> list[int]:
    """Blocks from left to right: each after all that stand to its left in some row."""
    waits = {b: len(left[b]) for b in blocks}
    order = [b for b in blocks if not waits[b]]
    for b in order:  # grows while it is read
        for other, _ in right[b]:
            waits[other] -= 1
            if not waits[other]:
                order.append(other)
    return order


def _pushed(order: Sequence[int], before: Sequence[Sequence[tuple[int, float]]]) -> dict[int, float]:
    """Every block as near to the start as those before it let it be."""
    at: dict[int, float] = {}
    for b in order:
        at[b] = max((at[other] + gap for other, gap in before[b]), default=0.0)
    return at


def _tops(heights: Sequence[float], borders: Sequence[int | None], distance: Spacing) -> list[float]:
    tops, top = [], 0.0
    for r, height in enumerate(heights):
        tops.append(top)
        top += height + (distance.band / 2 if r in borders or r + 1 in borders else distance.row)
    return tops
