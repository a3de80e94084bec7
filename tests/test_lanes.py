"""Boundaries of several lanes: nothing else crosses them, and the pieces in order are the model."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import networkx as nx
import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from lbi_compile import LBIError
from lbi_compile.passes.insert import Program, insert
from lbi_compile.passes.lanes import Cut, allocate, crossing, gathering_tail, main_path, shared_sources
from lbi_compile.passes.liveness import PARAMETER, PARAMETER_ONLY, is_random
from lbi_compile.passes.separators import separators
from lbi_compile.passes.windows import several_lanes
from tests.dags import Dag, Found, Step, find, recipes, run, trace
from tests.lane_models import Conditioned, EncoderDecoder, Recurrent, UNet

# no explanations: they trace every line of torch, for minutes
_PHASES = [phase for phase in Phase if phase is not Phase.explain]
_PROPERTY = {"deadline": None, "suppress_health_check": list(HealthCheck), "phases": _PHASES}


def cut_of(found: Found, regions: int, *, flops: Mapping[fx.Node, int] | None = None) -> Cut:
    """Lanes in windows; every operator counts as one unit of work unless ``flops`` says otherwise."""
    work = flops or dict.fromkeys(found.live.live, 1)
    sink, main = main_path(found.live, work)
    points = separators(found.live, main=main)
    return several_lanes(found.live, points, sink=sink, main=main, regions=regions, cost=work, flops=work)


def pieces(found: Found, cut: Cut) -> Program:
    def owner(target: str) -> tuple[nn.Module, str]:
        path, _, name = target.rpartition(".")
        return found.gm.get_submodule(path), name

    nothing = [None] * len(cut.ends)
    spec = found.capture.out_spec
    return insert(found.gm, live=found.live, cut=cut, finishes=nothing, owner=owner, out_spec=spec)


def crossings_by_paths(found: Found, cut: Cut) -> list[int]:
    """Boundaries that something passes beside their lanes, by paths in the raw graph without the lanes.

    Independent of how the cut was made: edges are arguments of the captured nodes, and the order of memory.
    """
    count = len(cut.ends)
    leaky = []
    for k, lanes in enumerate(cut.lanes, start=1):
        graph = nx.DiGraph()
        for node in found.gm.graph.nodes:
            piece = cut.piece.get(node)
            if piece is None or piece == count:  # not live, or of the head
                continue
            for before in (*node.all_input_nodes, *found.live.memory.get(node, ())):
                if before in cut.piece:
                    graph.add_edge(before, node)
        graph.remove_nodes_from({*lanes, *cut.shared, cut.canvas})
        graph.add_edges_from(("before", node) for node in list(graph) if cut.piece[node] < k)
        graph.add_edges_from((node, "after") for node in list(graph) if node != "before" and cut.piece[node] >= k)
        if "before" in graph and "after" in graph and nx.has_path(graph, "before", "after"):
            leaky.append(k)
    return leaky


def _check(model: nn.Module, inputs: tuple[Tensor, ...], regions: int) -> Cut | None:
    found = find(model, inputs)
    try:
        cut = cut_of(found, regions)
    except LBIError:
        return None
    assert crossings_by_paths(found, cut) == []
    draws = [cut.piece[node] for node in found.live.live if is_random(node)]
    assert draws == sorted(draws)
    program = pieces(found, cut)
    got, wanted = trace(model, lambda: run(program, list(inputs))), trace(model, lambda: model(*inputs))
    assert got.differences(wanted, reordered=True) == []
    return cut


MODELS = {
    "encoder-decoder": (lambda: EncoderDecoder(dropout=0.2), EncoderDecoder.inputs),
    "u-net": (UNet, lambda: (torch.randn(3, 3, 8, 8),)),
    "recurrent": (Recurrent, lambda: (torch.randn(3, 12, 5),)),
    "conditioned": (Conditioned, lambda: (torch.randn(3, 6), torch.randn(3, 1))),
}


@pytest.mark.parametrize("regions", [2, 4])
@pytest.mark.parametrize("name", MODELS)
def test_pieces_in_order_are_the_model(name: str, regions: int) -> None:
    make, inputs = MODELS[name]
    cut = _check(make().double().train(), tuple(x.double() if x.is_floating_point() else x for x in inputs()), regions)
    assert cut is not None
    assert len(cut.lanes) == regions - 1


def _random(steps: list[Step], tap: bool, regions: int) -> None:
    model = Dag(steps, tap=tap).double().train()
    cut = _check(model, (torch.randn(3, 4, dtype=torch.float64),), regions)
    assume(cut is not None)


@settings(max_examples=10, **_PROPERTY)
@given(recipes(longest=12), st.booleans(), st.integers(2, 4))
def test_random_graphs_are_cut_where_nothing_else_crosses(steps: list[Step], tap: bool, regions: int) -> None:
    _random(steps, tap, regions)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@settings(max_examples=300, **_PROPERTY)
@given(recipes(longest=20), st.booleans(), st.integers(2, 5))
def test_many_random_graphs_are_cut_where_nothing_else_crosses(steps: list[Step], tap: bool, regions: int) -> None:
    _random(steps, tap, regions)


def test_the_path_check_sees_a_lane_that_is_left_out() -> None:
    found = find(UNet(), (torch.randn(3, 3, 8, 8),))
    cut = cut_of(found, 2)
    fewer = Cut(cut.canvas, cut.ends, (cut.lanes[0][:-1],), cut.piece, cut.shared)
    assert crossings_by_paths(found, cut) == []
    assert crossings_by_paths(found, fewer) == [1]


# --- what is a lane, and what is not ---------------------------------------------------------------------------------


def test_a_cheap_condition_that_all_blocks_read_is_shared() -> None:
    model = Conditioned()
    found = find(model, (torch.randn(3, 6), torch.randn(3, 1)))
    flops = {node: 1000 if "linear" in node.name else 0 for node in found.live.live}
    flops[found.node("linear")] = 1  # the condition; the canvas is what the larger input makes
    cut = cut_of(found, 3, flops=flops)
    assert cut.canvas.name == "linear_1"
    assert [node.name for node in cut.shared] == ["tanh"]
    assert [len(lanes) for lanes in cut.lanes] == [1, 1]
    assert found.node("tanh") in shared_sources(found.live, flops)


class Sides(nn.Module):
    """Blocks, an output from the middle made there, and one made at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(6))
        self.early, self.late = nn.Linear(4, 2), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        early, middle = x, x
        for i, block in enumerate(self.blocks):
            x = torch.tanh(block(x))
            if i == 1:
                early, middle = self.early(x), x
        return x, early, self.late(middle)


def test_what_leads_to_other_outputs_is_a_tap() -> None:
    model, x = Sides(), torch.randn(3, 4)
    found = find(model, x)
    cut = cut_of(found, 3)
    by_weight = {node.args[1].name: node for node in found.named("linear")}  # type: ignore[union-attr]
    early, late = by_weight["early_weight"], by_weight["late_weight"]
    assert cut.piece[early] == cut.piece[early.args[0]] == 0  # type: ignore[index]
    assert cut.piece[late] == 3  # runs at the end: the head reads the middle's value
    assert [len(lanes) for lanes in cut.lanes] == [1, 1]


def test_steps_that_a_final_stack_gathers_are_taps() -> None:
    found = find(Recurrent(), (torch.randn(3, 12, 5),))
    cut = cut_of(found, 4)
    assert [len(lanes) for lanes in cut.lanes] == [1, 1, 1]
    assert cut.gather is found.named("stack")[0]
    assert {node.name for node in gathering_tail(found.live, cut.gather)} == {"stack"}
    steps = [cut.piece[node] for node in found.live.live if node.name.startswith("linear")]
    assert steps == sorted(steps)
    assert set(steps) == {0, 1, 2, 3}


def test_a_sum_at_the_end_gathers_nothing() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + self.a(torch.tanh(self.a(x)))

    found = find(Sum(), torch.randn(3, 4))
    assert gathering_tail(found.live, found.live.live[-1]) == frozenset()


def test_the_main_output_is_the_one_with_most_work_and_logits_come_before_their_loss() -> None:
    class Losses(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            early = self.a(x)
            logits = self.b(torch.tanh(early))
            return logits.square().mean(), logits, early.mean()

    found = find(Losses(), torch.randn(3, 4))
    flops = {node: int("linear" in node.name) for node in found.live.live}
    sink, main = main_path(found.live, flops)
    assert sink.name == "linear_1"
    assert {node.name for node in main} == {"linear", "tanh", "linear_1"}


def test_lanes_that_cross_one_boundary_have_slots_of_their_own() -> None:
    found = find(UNet(), (torch.randn(3, 3, 8, 8),))
    cut = cut_of(found, 4)
    for causal in (frozenset(), frozenset(cut.crossers[:1])):
        slots = allocate(cut, causal)
        assert sorted(set(slots.values())) == list(range(max(slots.values()) + 1))
        for lanes in cut.lanes:
            assert len({slots[lane] for lane in lanes}) == len(lanes)
        for a, b in itertools.combinations(cut.crossers, 2):
            assert slots[a] != slots[b] or (a in causal) == (b in causal)
    assert max(allocate(cut, frozenset()).values()) + 1 == max(map(len, cut.lanes))


def test_crossings_count_from_the_boundary_after_the_value_to_its_last_reader() -> None:
    found = find(UNet(), (torch.randn(3, 3, 8, 8),))
    cut = cut_of(found, 3)
    lanes, shared = crossing(found.live, cut.piece, canvas=cut.canvas, regions=3, shared=frozenset(cut.shared))
    assert lanes == cut.lanes
    assert shared == cut.shared
    parameters = {n for n, kind in found.live.kind.items() if kind in (PARAMETER, PARAMETER_ONLY)}
    assert not parameters & set(cut.piece)
