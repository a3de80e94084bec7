"""Layered layouts: nothing overlaps, edges lead downwards, crossings are undone."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lbi_compile.render.layout import Layout, Spacing, layered


def overlaps(made: Layout, sizes: list[tuple[float, float]]) -> list[tuple[int, int]]:
    def spans(t: int) -> tuple[float, float]:
        half = sizes[t][0] / 2 if t < len(sizes) else 0.0
        return made.x[t] - half, made.x[t] + half

    return [(a, b) for row in made.rows for a, b in itertools.pairwise(row) if spans(a)[1] > spans(b)[0] - 0.2]


@st.composite
def graphs(draw: st.DrawFn) -> tuple[list[tuple[float, float]], list[tuple[int, int]], list[int] | None]:
    boxes = draw(st.integers(1, 14))
    box = st.integers(0, boxes - 1)
    edges = draw(st.lists(st.tuples(box, box), max_size=30))
    edges = sorted({(u, v) for u, v in edges if u != v})
    bands = draw(st.none() | st.lists(st.integers(0, 3), min_size=boxes, max_size=boxes))
    sizes = draw(st.lists(st.tuples(st.integers(1, 90), st.integers(1, 40)), min_size=boxes, max_size=boxes))
    return [(float(w), float(h)) for w, h in sizes], edges, bands


@settings(max_examples=150, deadline=None)
@given(graphs())
def test_layout_of_any_graph(graph):
    sizes, edges, bands = graph
    made = layered(sizes, edges, bands=bands)
    assert layered(sizes, edges, bands=bands) == made
    assert sorted(t for row in made.rows for t in row) == list(range(len(made.x)))
    assert not overlaps(made, sizes)
    assert min(made.x[t] - sizes[t][0] / 2 for t in range(len(sizes))) >= 0
    for (u, v), bends in zip(edges, made.bends, strict=True):
        rows = [made.row[t] for t in (u, *bends, v)]
        step = 1 if rows[0] < rows[-1] else -1
        assert rows == list(range(rows[0], rows[-1] + step, step))
        assert all(t >= len(sizes) for t in bends)
    for r, (above, below) in enumerate(itertools.pairwise(made.tops)):
        assert below >= above + made.heights[r]
    for (a, one), (b, other) in itertools.combinations(enumerate(bands or []), 2):
        if one != other:
            assert (made.row[a] < made.row[b]) == (one < other)


@pytest.mark.parametrize("seed", range(8))
def test_layout_of_a_tangle(seed):
    """Many crossings that cannot be undone: straight lines that cross must not tie boxes into knots."""
    draw = random.Random(seed)
    sizes = [(float(draw.randint(20, 90)), 20.0) for _ in range(60)]
    edges = sorted({(u, draw.randint(u + 1, min(59, u + 15))) for u in range(59) for _ in range(3)})
    made = layered(sizes, edges, bands=[i // 20 for i in range(60)])
    assert not overlaps(made, sizes)


@settings(max_examples=100, deadline=None)
@given(graphs())
def test_edges_without_cycles_lead_downwards(graph):
    sizes, edges, _ = graph
    made = layered(sizes, [(u, v) for u, v in edges if u < v])
    assert all(made.row[u] < made.row[v] for u, v in edges if u < v)


def test_chain_is_straight_and_its_skips_stand_beside_it():
    chain = [(i, i + 1) for i in range(9)]
    skips = [(0, 9), (1, 8), (2, 7)]
    sizes = [(40.0 + 10 * (i % 3), 20.0) for i in range(10)]
    made = layered(sizes, [*chain, *skips], bands=[0] * 5 + [1] * 5)
    assert len({made.x[i] for i in range(10)}) == 1
    for bends in made.bends[-3:]:
        (column,) = {made.x[t] for t in bends}
        assert abs(column - made.x[0]) >= 30
    assert not overlaps(made, sizes)


def test_long_edges_of_one_box_share_their_bends():
    made = layered([(20.0, 10.0)] * 6, [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5), (0, 3), (0, 5)])
    assert made.bends[5] == made.bends[6][:2]


def test_crossings_are_undone():
    """Two ladders whose rungs are given in turns come apart."""
    edges = [(0, 3), (1, 2), (2, 5), (3, 4)]
    made = layered([(20.0, 10.0)] * 6, edges)
    order = [[made.rows[r].index(t) for r, t in enumerate(some)] for some in [(0, 3, 4), (1, 2, 5)]]
    assert order in ([[0, 0, 0], [1, 1, 1]], [[1, 1, 1], [0, 0, 0]])


def test_border_is_crossed_at_one_point():
    spacing = Spacing(row=20, band=60)
    made = layered([(20.0, 10.0)] * 4, [(0, 1), (1, 2), (2, 3), (0, 3)], bands=[0, 0, 1, 1], spacing=spacing)
    assert made.bands == ((0, 1), (3, 4))
    assert made.borders == (2, None)
    assert made.tops[2] == made.tops[1] + 10 + 30
    crossing = [t for t in made.rows[2] if t in made.bends[3]]
    assert len(crossing) == 1


def test_heavy_box_gets_the_straight_line():
    sizes = [(20.0, 10.0)] * 4
    edges = [(0, 1), (0, 2), (1, 3), (2, 3)]
    for heavy in (1, 2):
        weights = [1.0, 1.0, 1.0, 1.0]
        weights[heavy] = 100.0
        made = layered(sizes, edges, weights=weights)
        assert made.x[heavy] == made.x[0] == made.x[3]
