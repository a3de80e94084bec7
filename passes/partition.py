"""Partition: which separators become canvas, boundaries and the start of the head.

Contract: separators in program order and the cost of every node in, a frozen record of the chosen nodes out, each
with its reason. Deterministic: equal graphs give equal partitions.

Boundaries of one lane in the canvas's shape come first. Where there are too few, where they leave most of the work
outside, or regions of very different size, ``passes.windows`` finds boundaries of several lanes or other shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from statistics import median
from typing import Any

from torch import Tensor, fx

from lbi_compile.errors import LBIError, NoSeparatorError, RegionsError, TooManyRegionsError
from lbi_compile.passes.lanes import Cut, cut, form, main_path
from lbi_compile.passes.liveness import INPUT, Liveness
from lbi_compile.passes.names import module_path, operator_name
from lbi_compile.passes.separators import Separator
from lbi_compile.passes.windows import HEAVY, several_lanes
from lbi_compile.plan import Decision, Point

# how much worse the largest region may get for the sake of cuts that leave a position-wise finish
FINISH_SLACK = 1.5
# one-lane boundaries serve poorly where regions are more uneven than this (equal blocks never are), or where they leave
# more than this share of the work outside of all regions
POOR_BALANCE = 2.0
POOR_COVER = 0.2
# blocks so alike are the model's own: where there are fewer than regions asked for, none is cut in two
ALIKE = 1.25


@dataclass(frozen=True, slots=True)
class Partition:
    """Where the model is cut.

    Attributes:
        cut: Canvas, ends, lanes and the piece of every live node.
        candidates: Inner nodes a one-lane boundary could have used.
        why: Reasons.
    """

    cut: Cut
    candidates: tuple[fx.Node, ...]
    why: tuple[Decision, ...]

    @property
    def canvas(self) -> fx.Node:
        """The node every region may read; a live node, or an input that has the boundaries' shape."""
        return self.cut.canvas

    @property
    def ends(self) -> tuple[fx.Node, ...]:
        """The ``K`` nodes ``h_0 .. h_{K-1}`` where regions end; the last one starts the head."""
        return self.cut.ends


def point_of(node: fx.Node) -> Point:
    """A node by its module path and operator, for messages; ``naming.Naming`` gives names that last."""
    value = node.meta["val"]
    sizes = tuple(size if isinstance(size, int) else str(size) for size in value.shape)
    return Point(module_path(node), operator_name(node), 0, sizes, str(value.dtype).removeprefix("torch."))


def partition(
    live: Liveness,
    points: Sequence[Separator],
    *,
    regions: int | Sequence[fx.Node],
    cost: Mapping[fx.Node, int],
    flops: Mapping[fx.Node, int],
    leaves_finish: Callable[[fx.Node, fx.Node], bool] = lambda _source, _sink: False,
    describe: Callable[[fx.Node], Point] = point_of,
    starts: Sequence[fx.Node] = (),
    one_lane: bool = False,
) -> Partition:
    """Choose canvas, ``K - 1`` boundaries and the head.

    The candidates are separators of one shape and dtype: the shape whose separators span most of the cost. The canvas
    is the last of them before the first heavy step, the head starts at the first of them after the last heavy one.
    A model may end without a head, where its output has that shape and its last step does as much as the others.
    Between them, dynamic programming finds cuts whose largest region is as small as possible, then of those the most
    even; cuts that leave a finish are preferred while the largest region grows by no more than ``FINISH_SLACK``.
    Where that fails or serves poorly, minimum vertex cuts with several lanes (``windows.several_lanes``) are tried.

    Args:
        live: Liveness of the graph.
        points: Separators in program order, of the main path (``separators(live, main=main)``).
        regions: ``K``, or the separators to cut at.
        cost: Work of each node, for balance.
        flops: Matrix FLOPs of each node, to tell work from bookkeeping.
        leaves_finish: Whether the step between two neighbouring candidates is position-wise; by default none is.
        describe: Name and shape of a node, for messages; by default module path and operator.
        starts: With ``regions`` named: the first node of each region but the first, for boundaries of several lanes.
        one_lane: Take no boundaries of several lanes, or of another shape than the canvas.

    Raises:
        NoSeparatorError: A node asked for is no separator.
        RegionsError: A node is asked for twice.
        TooManyRegionsError: Fewer candidates than ``regions - 1``; the message names them.
    """
    sink, main = main_path(live, flops)
    total = max(sum(flops.get(node, 0) for node in main), 1)
    one: Partition | None = None
    refused: LBIError | None = None

    def attempt(wanted: int | Sequence[fx.Node]) -> Partition:
        return _one_lane(live, points, sink, main, wanted, cost, flops, leaves_finish, describe)

    try:
        one = attempt(regions)
    except (NoSeparatorError, RegionsError, TooManyRegionsError) as error:
        refused = error
        if one_lane or (isinstance(error, RegionsError) and len(set(starts)) < len(starts)):
            raise
        if isinstance(regions, int) and points:
            most = attempt(1)
            most = attempt(len(most.candidates) + 1)
            share, evenness = _merits(most, flops, cost, total)
            if most.candidates and share >= 1 - POOR_COVER and evenness <= ALIKE:
                raise
    wanted = regions if isinstance(regions, int) else len(regions) + 1
    if one is not None and (one_lane or wanted == 1 or not isinstance(regions, int)):
        return one
    if one is None and wanted == 1:
        assert refused is not None
        raise refused
    cover, balance = _merits(one, flops, cost, total) if one else (0.0, float("inf"))
    if one is not None and balance <= POOR_BALANCE and cover >= 1 - POOR_COVER:
        return one
    try:
        found = several_lanes(live, points, sink=sink, main=main, regions=wanted, cost=cost, flops=flops, starts=starts)
    except (NoSeparatorError, TooManyRegionsError) as error:
        if one is None:
            assert refused is not None
            refused.add_note(f"boundaries of several lanes: {error}")
            raise refused from error
        return one
    several = _several(found, one, points, cost, describe)
    more, better = _merits(several, flops, cost, total)
    if one is None or more > cover + POOR_COVER or (balance > POOR_BALANCE and 1.2 * better < balance):
        return several
    return one


def _merits(
    made: Partition, flops: Mapping[fx.Node, int], cost: Mapping[fx.Node, int], total: int
) -> tuple[float, float]:
    """Share of the main path's FLOPs that lies in regions, and largest over mean region cost."""
    count = len(made.ends)
    sizes, inside = [0] * count, 0
    for node, k in made.cut.piece.items():
        if 0 <= k < count:
            sizes[k] += cost.get(node, 0)
            inside += flops.get(node, 0)
    return inside / total, max(sizes) * count / max(sum(sizes), 1)


def _several(
    found: Cut,
    one: Partition | None,
    points: Sequence[Separator],
    cost: Mapping[fx.Node, int],
    describe: Callable[[fx.Node], Point],
) -> Partition:
    """The partition of a cut with lanes of several shapes or numbers, with its reasons."""
    if one is None:
        why_several = "one-lane boundaries of one shape are too few"
    else:
        why_several = "one-lane boundaries of one shape leave too much work outside, or too uneven regions"
    counts = ", ".join(f"{k}: {len(lanes)}" for k, lanes in enumerate(found.lanes, start=1))
    made = Partition(found, tuple(point.node for point in points), ())
    _, balance = _merits(made, {}, cost, 1)
    names = " | ".join(" + ".join(describe(node).name for node in lanes) for lanes in found.lanes)
    why = (
        Decision("lanes", f"per boundary {counts}", f"minimum vertex cuts; {why_several}"),
        Decision("canvas", describe(found.canvas).name, "the last separator before the first heavy step"),
        Decision("head", f"after {describe(found.ends[-1]).name}", "the first separator after the last heavy step"),
        Decision(
            "boundaries",
            names or "none",
            f"the fewest lanes in windows around equal shares; largest over mean region {balance:.2f}",
        ),
        *(
            Decision("shared source", describe(node).name, "next to no work leads to it: every region may read it")
            for node in found.shared
        ),
    )
    return Partition(found, made.candidates, why)


def _one_lane(
    live: Liveness,
    points: Sequence[Separator],
    sink: fx.Node,
    main: frozenset[fx.Node],
    regions: int | Sequence[fx.Node],
    cost: Mapping[fx.Node, int],
    flops: Mapping[fx.Node, int],
    leaves_finish: Callable[[fx.Node, fx.Node], bool],
    describe: Callable[[fx.Node], Point],
) -> Partition:
    """Boundaries of one lane in the canvas's shape."""

    def made(
        canvas: fx.Node, ends: Sequence[fx.Node], candidates: Sequence[fx.Node], why: Sequence[Decision]
    ) -> Partition:
        lanes = [(end,) for end in ends[:-1]]
        return Partition(cut(live, main=main, canvas=canvas, lanes=lanes, ends=ends), tuple(candidates), tuple(why))

    weight = list(accumulate((cost.get(node, 0) for node in live.live), initial=0))
    work = list(accumulate((flops.get(node, 0) for node in live.live), initial=0))
    group = _group(points, weight)
    wanted = regions if isinstance(regions, int) else len(regions) + 1
    source = _input_canvas(live, group, work)
    if source is None:
        chain = group
    else:  # what is made of the input without work is no further from it than the input, which may skip it
        chain = [Separator(source, -1), *([point for point in group if work[point.position + 1]] or group)]
    output = Separator(sink, live.live.index(sink))
    if chain and _is_layer(live, output, chain, work):
        chain.append(output)
    if len(chain) < 2:
        if wanted == 1 and points:
            return made(points[0].node, (points[-1].node,), (), ())
        raise _too_many(wanted, (), describe)

    steps = [work[b.position + 1] - work[a.position + 1] for a, b in pairwise(chain)]
    if not any(steps):  # nothing but elementwise work: count that
        steps = [weight[b.position + 1] - weight[a.position + 1] for a, b in pairwise(chain)]
    floor = HEAVY * median(step for step in steps if step)
    heavy = [i for i, step in enumerate(steps) if step >= floor]
    first, last = heavy[0], heavy[-1] + 1
    # between two heavy steps any separator would do: the last one leaves activations and norms with their layer
    inner = [chain[i] for i in heavy if first < i < last]
    canvas, end = chain[first], chain[last]
    steps_why = f"{len(heavy)} of {len(steps)} steps between its {len(chain)} separators do at least {floor:.3g} FLOPs"
    why = [
        Decision("lane", _shape(describe(canvas.node)), "the shape whose separators span most of the work"),
        Decision("canvas", describe(canvas.node).name, f"the last separator before the first heavy step; {steps_why}"),
        Decision("head", f"after {describe(end.node).name}", "the first separator after the last heavy step"),
    ]
    if isinstance(regions, int):
        if regions - 1 > len(inner):
            raise _too_many(regions, [p.node for p in inner], describe)
        cuts, reason = _balanced(canvas, inner, end, weight, regions, leaves_finish)
    else:
        cuts, reason = _named(inner, regions, describe), "asked for by name"
    sizes = [weight[b.position + 1] - weight[a.position + 1] for a, b in pairwise([canvas, *cuts, end])]
    balance = max(sizes) * len(sizes) / max(sum(sizes), 1)
    why.append(
        Decision(
            "boundaries",
            ", ".join(describe(c.node).name for c in cuts) or "none",
            f"{reason}; largest over mean region {balance:.2f}, chosen among {len(inner)} places",
        )
    )
    return made(canvas.node, [c.node for c in [*cuts, end]], [p.node for p in inner], why)


def _is_layer(live: Liveness, output: Separator, chain: Sequence[Separator], work: Sequence[int]) -> bool:
    """The model's output goes on with the chain: of its shape, last, and at least half the median step away."""
    node = output.node
    if (
        len(live.sinks) > 1
        or node is not live.live[-1]
        or node in live.overwritten
        or form(node) != form(chain[-1].node)
    ):
        return False
    steps = [work[b.position + 1] - work[a.position + 1] for a, b in pairwise([*chain, output])]
    return steps[-1] > 0 and 2 * steps[-1] >= median(step for step in steps if step)


def _shape(point: Point) -> str:
    return f"[{', '.join(map(str, point.shape))}] {point.dtype}"


def _group(points: Sequence[Separator], weight: Sequence[int]) -> list[Separator]:
    groups: dict[Any, list[Separator]] = {}
    for point in points:
        groups.setdefault(form(point.node), []).append(point)
    spans = {key: weight[members[-1].position + 1] - weight[members[0].position + 1] for key, members in groups.items()}
    # a lone separator of another shape in between is a stage of its own width: it ends no group, its work counts
    return max(groups.values(), key=lambda members: (spans[form(members[0].node)], len(members)), default=[])


def _input_canvas(live: Liveness, group: Sequence[Separator], work: Sequence[int]) -> fx.Node | None:
    """An input of the boundaries' shape, where no separator comes before the work or all that do are skipped by it."""
    if not group:
        return None
    stem = live.live[: group[0].position + 1]
    reads = {
        before
        for node in stem
        for before in live.waits[node]
        if live.kind.get(before) == INPUT and isinstance(before.meta.get("val"), Tensor)
    }
    fitting = [node for node in reads if form(node) == form(group[0].node) and node not in live.overwritten]
    if len(fitting) != 1 or len(reads) != 1:
        return None
    late = any(fitting[0] in live.waits[node] for node in live.live[group[0].position + 1 :])
    return fitting[0] if work[group[0].position + 1] or late else None


def _balanced(
    canvas: Separator,
    inner: Sequence[Separator],
    end: Separator,
    weight: Sequence[int],
    regions: int,
    leaves_finish: Callable[[fx.Node, fx.Node], bool],
) -> tuple[list[Separator], str]:
    def largest(cuts: Sequence[Separator]) -> int:
        return max(weight[b.position + 1] - weight[a.position + 1] for a, b in pairwise([canvas, *cuts, end]))

    best = _min_max(canvas, inner, end, weight, regions)
    before = dict(zip((p.node for p in inner), (p.node for p in [canvas, *inner]), strict=False))
    finishing = [p for p in inner if leaves_finish(before[p.node], p.node)]
    if len(finishing) >= regions - 1 and finishing:
        cuts = _min_max(canvas, finishing, end, weight, regions)
        if largest(cuts) <= FINISH_SLACK * largest(best):
            return cuts, "the most even cuts among those that leave a position-wise finish"
    return best, "the most even cuts"


def _min_max(
    canvas: Separator, inner: Sequence[Separator], end: Separator, weight: Sequence[int], regions: int
) -> list[Separator]:
    """Cuts that minimise the largest region, then the sum of squares (the most even of the optimal ones)."""
    places = [canvas, *inner, end]
    at = [weight[p.position + 1] for p in places]
    count = len(places)
    limit = _least_largest(at, regions)
    infinite = float("inf")
    best = [0.0] + [infinite] * (count - 1)
    back: list[list[int]] = []
    for _ in range(regions):
        reached, origin = [infinite] * count, [-1] * count
        for j in range(1, count):
            for i in range(j - 1, -1, -1):
                size = at[j] - at[i]
                if size > limit:
                    break
                if best[i] + float(size) ** 2 < reached[j]:
                    reached[j], origin[j] = best[i] + float(size) ** 2, i
        best = reached
        back.append(origin)
    cuts: list[Separator] = []
    j = count - 1
    for origin in reversed(back):
        j = origin[j]
        cuts.append(places[j])
    return cuts[-2::-1] if regions > 1 else []


def _least_largest(at: Sequence[int], regions: int) -> int:
    """The smallest size such that ``regions`` non-empty regions of at most that size cover everything (bisection)."""
    low = max(b - a for a, b in pairwise(at))
    high = at[-1] - at[0]

    def parts(limit: int) -> int:
        needed, start = 1, at[0]
        for here, after in pairwise(at[1:]):
            if after - start > limit:
                needed, start = needed + 1, here
        return needed

    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if parts(middle) <= regions else (middle + 1, high)
    return low


def _named(
    inner: Sequence[Separator], wanted: Sequence[fx.Node], describe: Callable[[fx.Node], Point]
) -> list[Separator]:
    by_node = {p.node: p for p in inner}
    missing = [node for node in wanted if node not in by_node]
    if missing:
        raise NoSeparatorError(
            f"boundaries asked for at {', '.join(describe(n).name for n in missing)}",
            expected=f"places where one tensor carries everything: {', '.join(describe(p.node).name for p in inner)}",
            do="name modules that start at such a place, or give a number of regions",
        )
    twice = [node for i, node in enumerate(wanted) if node in wanted[:i]]
    if twice:
        raise RegionsError(
            f"two regions asked for that start at {describe(twice[0]).name}",
            expected="another place for each region",
            do="name each module once, and of modules that start together only one",
        )
    return sorted((by_node[node] for node in wanted), key=lambda p: p.position)


def _too_many(wanted: int, inner: Sequence[fx.Node], describe: Callable[[fx.Node], Point]) -> TooManyRegionsError:
    places = ", ".join(describe(node).name for node in inner) or "none"
    return TooManyRegionsError(
        f"{wanted} regions asked for, {len(inner)} places to cut: {places}",
        expected=f"at most {len(inner) + 1} regions",
        do=f"pass regions={len(inner) + 1} or fewer; more need a deeper model or boundaries with several lanes",
    )
