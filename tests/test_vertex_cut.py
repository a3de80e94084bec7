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
