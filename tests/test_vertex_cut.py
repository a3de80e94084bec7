"""Minimum vertex cuts against all cuts there are."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import fx

from lbi_compile.passes.liveness import is_float_tensor, is_random
from lbi_compile.passes.vertex_cut import minimum_cut
from tests.by_hand import ByHand
from tests.dags import Dag, Found, Step, find, recipes

# no explanations: they trace every line of torch, for minutes
_PHASES = [phase for phase in Phase if phase is not Phase.explain]
_PROPERTY = {"deadline": None, "suppress_health_check": list(HealthCheck), "phases": _PHASES}
LONGEST = 15


def cheapest(found: Found, nodes: list[fx.Node], low: int, high: int, free: frozenset[fx.Node]) -> int | None:
    """Fewest lanes over all sets of nodes that may be computed before the cut; ``None`` where none will do or none is
    needed."""
    live, place = found.live, {node: i for i, node in enumerate(nodes)}
    best = None
    for chosen in itertools.product([False, True], repeat=high - low - 1):
        done = {*nodes[: low + 1], *itertools.compress(nodes[low + 1 : high], chosen)}
        window = [node for node in nodes[low + 1 : high] if node in done]
        if any(before in place and before not in done for node in window for before in live.waits[node]):
            continue
        together = ((node, before) for node in nodes[low + 1 :] for before in live.memory.get(node, ()))
        if any(before in place and (node in done) != (before in done) for node, before in together):
            continue
        draws = [node in done for node in nodes[low + 1 : high] if is_random(node)]
        if draws != sorted(draws, reverse=True):
            continue
        lanes = {
            before
            for node in nodes
            if node not in done
            for before in live.waits[node]
            if before in done and before not in free
        }
        if all(is_float_tensor(lane) and lane not in live.overwritten for lane in lanes):
            best = len(lanes) if best is None else min(best, len(lanes))
    return best or None


def _compare(steps: list[Step], window: tuple[int, int], freed: int) -> None:
    found = find(Dag(steps).train(), torch.randn(3, 4))
    nodes = list(found.live.live)[:LONGEST]
    low, high = sorted(min(at, len(nodes) - 1) for at in window)
    if low == high:
        return
    users: dict[fx.Node, list[fx.Node]] = {node: [] for node in nodes}
    for node in nodes:
        for before in found.live.waits[node]:
            if before in users:
                users[before].append(node)
    free = frozenset(nodes[:1]) if freed else frozenset()
    lanes = minimum_cut(found.live, nodes, users=users, window=(low, high), price=lambda _: 1, free=free)
    assert (None if lanes is None else len(lanes)) == cheapest(found, nodes, low, high, free)


@settings(max_examples=15, **_PROPERTY)
@given(recipes(longest=8), st.tuples(st.integers(0, LONGEST), st.integers(0, LONGEST)), st.integers(0, 1))
def test_no_cut_has_fewer_lanes(steps: list[Step], window: tuple[int, int], freed: int) -> None:
    _compare(steps, window, freed)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@settings(max_examples=300, **_PROPERTY)
@given(recipes(longest=10), st.tuples(st.integers(0, LONGEST), st.integers(0, LONGEST)), st.integers(0, 1))
def test_no_cut_of_many_graphs_has_fewer_lanes(steps: list[Step], window: tuple[int, int], freed: int) -> None:
    _compare(steps, window, freed)


# --- by hand ------------------------------------------------------------------------------------------------------


def lanes(
    by_hand: ByHand, window: tuple[int, int], *, free: tuple[fx.Node, ...] = (), **prices: int
) -> list[str] | None:
    """Names of the cheapest lanes; a node that is not named costs ten."""
    live = by_hand.live()
    users = {node: [user for user in live.live if node in live.waits[user]] for node in live.live}
    price = lambda node: prices.get(node.name, 10)  # noqa: E731
    found = minimum_cut(live, live.live, users=users, window=window, price=price, free=frozenset(free))
    return None if found is None else [node.name for node in found]


def of_chain(count: int) -> tuple[ByHand, list[fx.Node]]:
    by_hand = ByHand()
    return by_hand, by_hand.chain(count, start=by_hand.input("x"))


def test_the_cheapest_node_of_the_window_is_cut() -> None:
    by_hand, _ = of_chain(6)
    assert lanes(by_hand, (0, 5), n3=9) == ["n3"]
    assert lanes(by_hand, (1, 4), n0=1, n1=9, n4=1) == ["n1"]  # the last before the window may be read after it
    assert lanes(by_hand, (1, 4), n0=1, n3=9, n4=1) == ["n3"]
    assert lanes(by_hand, (2, 3), n1=1, n3=1) == ["n2"]


def test_free_and_integer_nodes_are_no_lanes() -> None:
    by_hand, nodes = of_chain(5)
    assert lanes(by_hand, (0, 4), free=(nodes[1],), n1=1, n3=9) is None  # nothing but it needs to cross
    assert lanes(by_hand, (1, 3), free=(nodes[0],), n2=9) == ["n2"]
    nodes[1].meta["val"] = torch.empty(2, dtype=torch.int64)
    by_hand.overwritten.add(nodes[2])
    assert lanes(by_hand, (0, 4), n1=1, n2=1, n3=9) == ["n3"]
    assert lanes(by_hand, (1, 3)) is None


def test_memory_within_the_window_is_not_parted() -> None:
    by_hand, nodes = of_chain(6)
    by_hand.memory[nodes[3]] = (nodes[1],)
    assert lanes(by_hand, (0, 5), n0=5, n1=1, n2=1, n3=6) == ["n0"]
    assert lanes(by_hand, (0, 5), n0=6, n1=1, n2=1, n3=5) == ["n3"]


def test_memory_that_is_used_after_the_window_is_made_after_the_cut() -> None:
    by_hand, nodes = of_chain(6)
    by_hand.memory[nodes[4]] = (nodes[2],)
    assert lanes(by_hand, (0, 4), n1=3, n2=1, n3=1) == ["n1"]
    by_hand.memory[nodes[4]] = (nodes[0],)  # which is made before it
    assert lanes(by_hand, (0, 4)) is None
    by_hand.memory = {nodes[5]: (nodes[4],), nodes[1]: (nodes[0],)}
    assert lanes(by_hand, (1, 4), n2=1) == ["n2"]


def test_random_draws_keep_their_order() -> None:
    """The second draw is done before the cut, or its input crosses; the first one waits for a chain of cheap lanes."""
    by_hand, nodes = of_chain(4)
    first = by_hand.call("first", nodes[-1], target=torch.ops.aten.bernoulli.default)
    second = by_hand.call("second", nodes[0], target=torch.ops.aten.bernoulli.default)
    by_hand.call("end", first, by_hand.call("small", second), target=torch.add)
    prices = {"n0": 100, "n1": 1, "second": 1, "small": 2}
    assert lanes(by_hand, (0, 7), **prices) == ["first", "second"]
    second.target = torch.relu
    assert lanes(by_hand, (0, 7), **prices) == ["n1", "second"]
