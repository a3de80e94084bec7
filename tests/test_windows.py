"""Windows: where canvas and head lie, and which lanes are cut at around equal shares of the work, on graphs by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest
import torch
from torch import fx

from lbi_compile.errors import NoSeparatorError, TooManyRegionsError
from lbi_compile.passes.lanes import Cut, main_path
from lbi_compile.passes.separators import separators
from lbi_compile.passes.windows import several_lanes
from tests.by_hand import ByHand


def cut(
    by_hand: ByHand, work: Mapping[fx.Node, int], regions: int, *, starts: Sequence[fx.Node] = (), sinks: int = 1
) -> Cut:
    """Cut what was written, whose last calls are its outputs; FLOPs and cost are the same."""
    calls = [node for node in by_hand.graph.nodes if node.op == "call_function"]
    live = by_hand.live(*calls[-sinks:])
    sink, main = main_path(live, {**work, calls[-1]: work.get(calls[-1], 0)})
    points = separators(live, main=main)
    return several_lanes(live, points, sink=sink, main=main, regions=regions, cost=work, flops=work, starts=starts)


def chain(work: Sequence[int]) -> tuple[ByHand, dict[fx.Node, int], list[fx.Node]]:
    by_hand = ByHand()
    nodes = by_hand.chain(len(work), start=by_hand.input("x"))
    return by_hand, dict(zip(nodes, work, strict=True)), nodes


def of_chain(work: Sequence[int], regions: int) -> tuple[int, list[int]]:
    """Places of canvas and ends in a chain whose nodes do this work."""
    by_hand, flops, nodes = chain(work)
    found = cut(by_hand, flops, regions)
    assert all(lanes == (end,) for lanes, end in zip(found.lanes, found.ends, strict=False))
    return nodes.index(found.canvas), [nodes.index(end) for end in found.ends]


# --- canvas and head ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("work", "canvas", "end"),
    [
        ([0, 100, 100, 100, 0], 0, 3),
        ([0, 0, 100, 100, 100, 0, 0], 1, 4),
        ([0, 5, 100, 100, 100, 5, 0], 0, 5),  # a twentieth of a usual step is work
        ([0, 4, 100, 100, 100, 4, 0], 1, 4),
        ([50, 100, 100, 100, 0], 0, 3),
        ([900, 100, 100, 100, 0], 0, 3),  # nothing comes before the first value
        ([0, 100, 100, 100, 299], 0, 3),
        ([0, 100, 100, 100, 300], 0, 3),
        ([0, 100, 100, 100, 301], 0, 4),  # most of the work comes after the last separator
        ([0, 0, 0, 0], 0, 2),
    ],
)
def test_canvas_and_head_enclose_the_heavy_steps(work: list[int], canvas: int, end: int) -> None:
    assert of_chain(work, 1) == (canvas, [end])


@pytest.mark.parametrize(("stem", "canvas"), [(151, "a"), (150, "c")])
def test_most_of_the_work_before_the_first_separator_starts_at_the_first_value(stem: int, canvas: str) -> None:
    by_hand = ByHand()
    x = by_hand.input("x")
    ids = by_hand.call("ids", x, value=torch.empty(2, dtype=torch.int64))
    a, b = by_hand.call("a", ids), by_hand.call("b", ids)
    c = by_hand.call("c", a, b, target=torch.add)
    nodes = by_hand.chain(4, start=c)
    found = cut(by_hand, {a: stem, b: 150, **dict.fromkeys(nodes[:3], 100)}, 1)
    assert (found.canvas.name, found.ends[0].name) == (canvas, "n2")


def test_an_output_that_is_written_over_ends_no_region() -> None:
    by_hand, flops, nodes = chain([0, 100, 100, 100, 301])
    by_hand.overwritten.add(nodes[-1])
    assert cut(by_hand, flops, 1).ends == (nodes[3],)


@pytest.mark.parametrize(("size", "enters"), [((5, 5), True), ((4, 6), False), ((2, 3), False)])
def test_a_much_larger_input_that_enters_late_is_the_canvas(size: tuple[int, ...], enters: bool) -> None:
    """The first value is a condition of six numbers, which a larger one makes a separator no more."""
    by_hand = ByHand()
    condition = by_hand.chain(2, start=by_hand.input("t"))
    small = by_hand.call("small", by_hand.input("z"), value=(1, 2))
    entry = by_hand.call("entry", by_hand.input("x"), value=size)
    joined = by_hand.call("joined", condition[-1], entry, small, target=torch.where, value=size)
    nodes = [joined]
    for i in range(4):
        nodes.append(by_hand.call(f"m{i}", nodes[-1], value=size))
    found = cut(by_hand, {condition[1]: 10, **dict.fromkeys(nodes[:4], 10)}, 1)
    assert (found.canvas.name, found.ends[0].name) == ("entry" if enters else "n0", "m2")


def test_no_later_input_that_leads_elsewhere_or_is_of_integers_is_the_canvas() -> None:
    by_hand = ByHand()
    first = by_hand.chain(2, start=by_hand.input("x"))
    ids = by_hand.call("ids", by_hand.input("i"), value=torch.empty(50, 50, dtype=torch.int64))
    grown = by_hand.call("grown", first[-1], ids, target=torch.add, value=(50, 50))  # reads the main path
    nodes = by_hand.chain(3, start=grown)
    side = by_hand.call("side", by_hand.input("y"), value=(60, 60))
    work = {first[1]: 10, **dict.fromkeys(nodes[:2], 10), side: 1}
    live = by_hand.live(nodes[-1], side)
    sink, main = main_path(live, work)
    assert (sink, side in main) == (nodes[-1], False)
    found = several_lanes(live, separators(live, main=main), sink=sink, main=main, regions=1, cost=work, flops=work)
    assert found.canvas is first[0]


def test_without_separators_the_model_s_ends_are_taken() -> None:
    """Two branches from the input to the output: canvas is the first value; one is done before the other."""
    by_hand = ByHand()
    x = by_hand.input("x")
    left, right = by_hand.chain(4, start=x, name="l"), by_hand.chain(4, start=x, name="r")
    total = by_hand.call("total", left[-1], right[-1], target=torch.add)
    found = cut(by_hand, {**dict.fromkeys((*left, *right), 10), total: 1}, 2)
    assert (found.canvas, found.ends[-1], found.lanes) == (left[0], total, ((left[-1],),))
    assert [found.piece[node] for node in right] == [1] * 4


# --- equal shares -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("work", "regions", "ends"),
    [
        ([0, *[10] * 12, 0], 1, [12]),
        ([0, *[10] * 12, 0], 2, [6, 12]),
        ([0, *[10] * 12, 0], 3, [4, 8, 12]),
        ([0, *[10] * 12, 0], 4, [3, 6, 9, 12]),
        ([0, *[10] * 12, 0], 12, [*range(1, 13)]),
        ([0, 30, 10, 10, 10, 30, 30, 0], 4, [1, 4, 5, 6]),
        ([0, 10, 10, 100, 10, 10, 10, 0], 3, [2, 3, 6]),  # one node is worth two shares
        ([0, 10, 10, 100, 10, 10, 10, 0], 4, [2, 3, 4, 6]),
        ([0, 1, 1, 1000, 1, 1, 1, 0], 4, [3, 4, 5, 6]),
        ([0, 10, 10, 10, 10, 100, 0], 4, [2, 3, 4, 5]),  # a place is kept for every later region
        ([0, 1000, 100, 100, 100, 0], 4, [1, 2, 3, 4]),
    ],
)
def test_regions_of_equal_work_none_of_which_is_empty(work: list[int], regions: int, ends: list[int]) -> None:
    assert of_chain(work, regions) == (0, ends)


def test_memory_between_two_nodes_keeps_them_in_one_region() -> None:
    by_hand, work, nodes = chain([0, 10, 10, 100, 10, 10, 10, 0])
    by_hand.memory = {nodes[1]: (nodes[0],), nodes[4]: (nodes[3],)}
    assert cut(by_hand, work, 3).ends == (nodes[2], nodes[4], nodes[6])


def test_more_regions_than_operations_are_refused() -> None:
    work = [0, 0, 10, 10, 10, 0]
    assert of_chain(work, 3) == (1, [2, 3, 4])
    with pytest.raises(TooManyRegionsError) as caught:
        of_chain(work, 4)
    assert caught.value.found.startswith("4 regions asked for, 3 operations")
    assert caught.value.expected == "at most 3 regions"


@pytest.mark.parametrize(("off", "lanes"), [(0, 1), (3, 1), (5, 2)])
def test_a_lane_more_is_worth_a_fifth_of_a_region(off: int, lanes: int) -> None:
    """Of forty units of work in two regions; a value is read ten units later, ``off`` units after the middle."""
    by_hand = ByHand()
    nodes = by_hand.chain(11 + off, start=by_hand.input("x"))
    wide = by_hand.chain(9, start=nodes[-1], name="w")
    joined = by_hand.call("joined", wide[-1], nodes[-1], target=torch.add)
    rest = by_hand.chain(20 - off, start=joined, name="m")
    by_hand.call("out", rest[-1])
    found = cut(by_hand, dict.fromkeys([*nodes[1:], *wide, joined, *rest], 1), 2)
    assert len(found.lanes[0]) == lanes
    assert (joined in found.lanes[0]) == (lanes == 1)


@pytest.mark.parametrize("odd", [0, 1])
def test_of_two_lanes_at_one_place_the_one_of_the_canvas_s_shape_is_cut(odd: int) -> None:
    by_hand = ByHand()
    nodes = by_hand.chain(4, start=by_hand.input("x"))
    pair = []
    for i in range(2):
        before = pair[-1] if pair else nodes[-1]
        pair.append(by_hand.call(f"p{i}", before, value=(3, 2) if i == odd else (2, 3)))
    rest = by_hand.chain(4, start=pair[-1], name="m")
    work = {**dict.fromkeys((*nodes[1:], *rest[:3]), 10)}
    assert cut(by_hand, work, 2).lanes == ((pair[1 - odd],),) if odd else ((nodes[-1],),)


def test_a_lane_that_crosses_already_goes_on_crossing() -> None:
    """Of a value and what is made of it for nothing near the next share, the lane of the share before is kept."""
    by_hand = ByHand()
    nodes = by_hand.chain(9, start=by_hand.input("x"))
    middle = by_hand.chain(9, start=nodes[-1], name="m")
    made = by_hand.call("made", nodes[-1])
    rest = by_hand.chain(8, start=middle[-1], name="r")
    by_hand.call("out", by_hand.call("joined", rest[-1], made, target=torch.add))
    work = {**dict.fromkeys((*nodes[1:], *middle, *rest), 10), middle[-1]: 2}
    first, second = cut(by_hand, work, 3).lanes
    assert first == (nodes[-1],)
    assert second == (nodes[-1], middle[-1])


# --- what is refused ----------------------------------------------------------------------------------------------


def test_no_float_tensor_in_between_is_refused() -> None:
    by_hand = ByHand()
    nodes = by_hand.chain(2, start=by_hand.input("x"))
    ids = [by_hand.call("i0", nodes[-1], value=torch.empty(2, dtype=torch.int64))]
    ids.append(by_hand.call("i1", ids[-1], value=torch.empty(2, dtype=torch.int64)))
    rest = by_hand.chain(3, start=ids[-1], name="m")
    work = {ids[0]: 5, ids[1]: 5, rest[0]: 5, nodes[1]: 5}
    assert cut(by_hand, work, 2).lanes == ((nodes[1],),)
    with pytest.raises(NoSeparatorError, match="no set of float tensors"):
        cut(by_hand, work, 3)


def test_named_starts_are_cut_at() -> None:
    by_hand, work, nodes = chain([0, *[10] * 6, 0])
    assert cut(by_hand, work, 3, starts=[nodes[2], nodes[5]]).lanes == ((nodes[1],), (nodes[4],))


def test_a_start_at_the_canvas_or_beside_the_main_path_is_refused() -> None:
    by_hand, work, nodes = chain([0, *[10] * 6, 0])
    for start in (nodes[0], nodes[1], nodes[-1]):
        with pytest.raises(NoSeparatorError, match=f"a region that starts at {start.name}"):
            cut(by_hand, work, 2, starts=[start])


def test_what_program_order_carries_to_a_start_is_cut() -> None:
    by_hand = ByHand()
    nodes = by_hand.chain(3, start=by_hand.input("x"))
    skip = by_hand.call("skip", nodes[1])
    more = by_hand.chain(2, start=nodes[-1], name="m")
    joined = by_hand.call("joined", more[-1], skip, nodes[0], target=torch.where)
    rest = by_hand.chain(2, start=joined, name="r")
    work = dict.fromkeys((*nodes[1:], *more, joined, rest[0]), 10)
    found = cut(by_hand, work, 2, starts=[more[1]])
    assert found.canvas is nodes[0]  # crosses for nothing
    assert found.lanes == ((skip, more[0]),)
