"""Separators: the sweep against networkx on random graphs, against gradients, and on graphs made by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import networkx as nx
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lbi_compile.passes.liveness import Liveness, is_float_tensor
from lbi_compile.passes.separators import separators
from tests.dags import QUIET, Dag, Found, Step, find, recipes, run, split
from tests.models import CausalTransformer

_PROPERTY: dict[str, Any] = {
    "deadline": None,
    "database": None,
    "derandomize": True,
    "suppress_health_check": list(HealthCheck),
}


def dag(steps: list[Step], *, tap: bool = False) -> Found:
    return find(Dag(steps, tap=tap).double().train(), torch.randn(3, 4, dtype=torch.float64))


def names(found: Found) -> list[str]:
    return [point.node.name for point in found.points]


# --- against networkx ---------------------------------------------------------------------------------------------


def by_removal(found: Found) -> list[str]:
    """Nodes without which nothing made before them reaches anything after them, edge by edge and by reachability.

    A memory edge does not pass through its node's value: it gets a node of its own between the two it joins, so that
    removing the node leaves the edge where it was.
    """
    live = found.live
    position = {node: i for i, node in enumerate(live.live)}
    graph: nx.DiGraph[Any] = nx.DiGraph()
    graph.add_nodes_from(live.live)
    for node in live.live:
        graph.add_edges_from((before, node) for before in node.all_input_nodes if before in position)
        for before in live.memory.get(node, ()):
            if before in position:
                graph.add_edges_from([(("memory", before, node), node)])
                graph.nodes[("memory", before, node)]["at"] = position[before]
    good = []
    for node, i in position.items():
        early = [n for n in graph if graph.nodes[n].get("at", position.get(n, 0)) <= i and n is not node]
        late = {n for n in live.live if position[n] > i}
        rest = graph.subgraph([n for n in graph if n is not node])
        reached = {target for n in early for target in nx.descendants(rest, n)}
        read = any(user in late for user in node.users)
        if read and not reached & late and is_float_tensor(node) and node not in live.overwritten:
            good.append(node.name)
    return good


def by_dominators(live: Liveness) -> list[str]:
    """Nodes on every path from the first live node to the last: immediate dominators of the end, followed upwards."""
    graph: nx.DiGraph[Any] = nx.DiGraph()
    inside = set(live.live)
    graph.add_edges_from((before, node) for node in inside for before in node.all_input_nodes if before in inside)
    start, node = live.live[0], live.live[-1]
    above = nx.immediate_dominators(graph, start)
    chain = []
    while node is not start:
        node = above[node]
        chain.append(node)
    return [node.name for node in reversed(chain) if is_float_tensor(node)]


def needed(live: Liveness) -> Liveness:
    """The record without the live nodes that no output needs."""
    graph: nx.DiGraph[Any] = nx.DiGraph((before, node) for node in live.live for before in node.all_input_nodes)
    (sink,) = live.sinks
    wanted = nx.ancestors(graph, sink) | {sink}
    return replace(live, live=tuple(node for node in live.live if node in wanted))


def _same_as_networkx(steps: list[Step], tap: bool) -> None:
    found = dag(steps, tap=tap)
    assert names(found) == by_removal(found)


@settings(max_examples=10, **_PROPERTY)
@given(recipes(), st.booleans())
def test_sweep_equals_node_removal(steps: list[Step], tap: bool) -> None:
    _same_as_networkx(steps, tap)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@settings(max_examples=400, **_PROPERTY)
@given(recipes(longest=20), st.booleans())
def test_sweep_equals_node_removal_on_many_graphs(steps: list[Step], tap: bool) -> None:
    _same_as_networkx(steps, tap)


def _same_as_dominators(steps: list[Step]) -> None:
    live = needed(dag(steps).live)
    assert [point.node.name for point in separators(live)] == by_dominators(live)


@settings(max_examples=10, **_PROPERTY)
@given(recipes(QUIET))
def test_sweep_equals_dominators_where_nothing_is_written(steps: list[Step]) -> None:
    _same_as_dominators(steps)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@settings(max_examples=300, **_PROPERTY)
@given(recipes(QUIET, longest=20))
def test_sweep_equals_dominators_on_many_graphs(steps: list[Step]) -> None:
    _same_as_dominators(steps)


# --- against gradients --------------------------------------------------------------------------------------------


def _leaks(found: Found, at: int) -> list[str]:
    """Parameters read before a separator alone that still get a gradient when the lane is detached."""
    node = found.points[at].node
    program = split(found, found.points[0].node, [node, found.points[-1].node])
    late = {
        f"{id(owner)}.{name}" for piece in (program.regions[1].body, program.head) for owner, name in piece.attributes
    }
    early = {
        name: getattr(owner, name)
        for piece in (program.stem, program.regions[0].body)
        for owner, name in piece.attributes
        if f"{id(owner)}.{name}" not in late and isinstance(getattr(owner, name), nn.Parameter)
    }
    outputs = run(program, found.capture.inputs.leaves, gap=lambda name, x: x.detach() if name == "entry 1" else x)
    loss = outputs[0].sum()
    if not early or not loss.requires_grad:
        return []
    found_gradients = torch.autograd.grad(loss, list(early.values()), allow_unused=True)
    return [name for name, g in zip(early, found_gradients, strict=True) if g is not None and bool(g.any())]


@settings(max_examples=10, **_PROPERTY)
@given(recipes(), st.data())
def test_nothing_reaches_past_a_separator(steps: list[Step], data: st.DataObject) -> None:
    found = dag(steps)
    if len(found.points) > 2:
        assert _leaks(found, data.draw(st.integers(1, len(found.points) - 2))) == []


def test_a_leak_past_a_cut_is_seen_by_the_test_above() -> None:
    """The write into the memory of ``a`` reaches the output by another name, so its value alone is no separator."""
    found = dag([Step("write", 1, 2), Step("linear", 1, 1), Step("skip", 1, 1)])
    (write,) = found.named("copy_")
    assert write.name not in names(found)
    assert found.live.memory[next(n for n in found.named("tanh"))] == (write,)


# --- made by hand -------------------------------------------------------------------------------------------------


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        h = torch.tanh(self.b(h)) + torch.relu(h)
        return self.c(h)


def test_only_the_ends_of_a_branching_part_are_separators() -> None:
    assert names(find(Branches(), torch.randn(3, 4))) == ["linear", "add"]


class LateSource(Branches):
    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.tanh(self.a(x))) + self.b(x)


def test_an_input_read_again_after_a_cut_does_not_spoil_it() -> None:
    found = find(LateSource(), torch.randn(3, 4))
    assert names(found) == ["linear", "tanh", "linear_1"]


class InPlace(Branches):
    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        h = torch.relu_(self.b(h))
        return self.c(h)


def test_a_value_that_is_written_over_is_no_separator() -> None:
    """A region that reads the canvas may not find it changed by another region."""
    assert names(find(InPlace(), torch.randn(3, 4))) == ["linear", "relu_"]


class Accumulated(Branches):
    """Memory that starts as a constant collects a value in each half."""

    def forward(self, x: Tensor) -> Tensor:
        memory = torch.zeros_like(x)
        h = self.a(x)
        memory[:, :2] = h[:, :2]
        h = torch.tanh(self.b(h))
        h = torch.sin(h)
        memory[:, 2:] = h[:, 2:]
        return self.c(memory)


def test_memory_that_spans_a_cut_makes_it_none() -> None:
    """``tanh`` and ``sin`` carry everything by value but what was written before them."""
    found = find(Accumulated(), torch.randn(3, 4))
    assert not {"tanh", "sin"} & set(names(found))
    assert "linear" in names(found)


class Early(Branches):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.a(x)
        g = torch.tanh(h)
        return self.c(torch.sin(self.b(h))), g


def test_a_value_that_is_only_returned_spans_no_cut() -> None:
    assert names(find(Early(), torch.randn(3, 4))) == ["linear", "linear_1", "sin"]


class Integer(Branches):
    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        chosen = h.argmax(-1)
        return self.c(nn.functional.embedding(chosen, self.b.weight))


def test_an_integer_is_no_separator_but_carries_what_crosses() -> None:
    found = find(Integer(), torch.randn(3, 4))
    assert names(found) == ["linear", "embedding"]


def test_every_residual_sum_of_a_transformer_is_one() -> None:
    model = CausalTransformer(vocabulary=16, length=8, width=8, depth=3, heads=2, dropout=0.1)
    found = find(model, torch.randint(0, 16, (2, 6)))
    sums = [n.name for n in found.named("aten.add.Tensor")]
    assert len(sums) == 7  # position, then two for each block
    assert set(sums) <= set(names(found))
    assert [point.position for point in found.points] == sorted(point.position for point in found.points)
