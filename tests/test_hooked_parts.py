"""The parts cuts between child modules are made of, each by itself."""

from __future__ import annotations

import contextlib
import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lbi_compile import transform
from lbi_compile.capture import Inputs
from lbi_compile.hooked.blocks import cut, free_cuts
from lbi_compile.hooked.layout import canvas_layout
from lbi_compile.hooked.lend import lent
from lbi_compile.hooked.probe import positions, sees_later
from lbi_compile.hooked.state import Places, hidden_of, with_hidden
from lbi_compile.passes.layouts import Layout
from tests.hooked_models import Branching, Hidden

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
BTD = Layout(batch=0, width=2, rank=3)


@given(st.lists(st.integers(0, 9), min_size=2, max_size=8), st.data())
def test_cuts_are_the_best_there_are(weights, data):
    cuts = sorted(data.draw(st.sets(st.integers(1, len(weights) - 1))))
    regions = data.draw(st.integers(1, len(cuts) + 1))

    def sizes(starts: tuple[int, ...]) -> list[int]:
        return [sum(weights[a:b]) for a, b in itertools.pairwise((0, *starts, len(weights)))]

    def cost(starts: tuple[int, ...]) -> tuple[int, int]:
        return max(sizes(starts)), sum(size**2 for size in sizes(starts))

    best = min(itertools.combinations(cuts, regions - 1), key=cost)
    assert cost(tuple(cut(weights, cuts, regions))) == cost(best)
    assert set(cut(weights, cuts, regions)) <= set(cuts)


def test_free_cuts():
    chain = [frozenset(), frozenset({0}), frozenset({1}), frozenset({2})]
    assert free_cuts(3, [0, 1, 2], chain) == (1, 2)
    assert free_cuts(3, [0, 1, 2], [*chain[:2], frozenset({0, 1}), frozenset({2})]) == (2,)
    assert free_cuts(3, [0, 1, 2], [*chain[:3], frozenset({0, 2})]) == ()
    assert free_cuts(4, [0, 0, 2, 2], [frozenset(), frozenset({0}), frozenset({0, 1}), frozenset({2}), frozenset({3})])


def test_hidden_states_in_what_blocks_take_and_give():
    ints, floats, other = torch.ones(2, dtype=torch.long), torch.ones(2), torch.zeros(3)
    for value in ((ints, floats, other), [ints, [floats]], {"a": ints, "b": floats}, Hidden("x", floats, other)):
        assert hidden_of(value) is floats
        new = with_hidden(value, other)
        assert type(new) is type(value)
        assert hidden_of(new) is other
        assert hidden_of(value) is floats
    assert hidden_of((ints, "x", None)) is None
    assert with_hidden(((ints,), {"x": floats, "y": 1}), other) == ((ints,), {"x": other, "y": 1})


def test_places_of_shared_modules():
    a, b = nn.Identity(), nn.Identity()
    places = Places([a, b, a])
    assert [places.next(module) for module in (a, b, a, a, b)] == [0, 1, 2, 2, 1]


def test_positions_of_outputs():
    canvas = torch.zeros(2, 5, 4)
    logits = torch.zeros(2, 5, 7)
    assert positions({"loss": torch.zeros(()), "logits": logits}, canvas, BTD) is logits
    assert positions((torch.zeros(2, 5, dtype=torch.long), torch.zeros(2, 4)), canvas, BTD) is None
    assert positions(logits, torch.zeros(2, 4), Layout(0, 1, 2)) is None
    image = torch.zeros(2, 6, 5, 3)
    found = positions(image, torch.zeros(2, 4, 5, 3), Layout(0, 1, 4))
    assert found is not None
    assert found.shape == (2, 15, 6)


@pytest.mark.parametrize(
    ("shape", "module", "layout"),
    [
        ((2, 8), nn.Linear(8, 8), Layout(0, 1, 2)),
        ((2, 5, 8), nn.Linear(8, 8), BTD),
        ((5, 2, 8), nn.LayerNorm(8), Layout(1, 2, 3)),
        ((2, 8, 5), nn.Conv1d(8, 8, 1), Layout(0, 1, 3)),
        ((2, 8, 5, 5), nn.Sequential(nn.ReLU(), nn.BatchNorm2d(8)), Layout(0, 1, 4)),
        ((2, 5, 5, 8), nn.Sequential(nn.LayerNorm(8), nn.Conv2d(8, 8, 1)), Layout(0, 3, 4)),
        ((2, 8, 5, 5), nn.Identity(), Layout(0, 1, 4)),
        ((7, 5, 8), nn.Identity(), Layout(0, 2, 3)),
    ],
    ids=str,
)
def test_layouts(shape, module, layout):
    assert canvas_layout(shape, Inputs((torch.zeros(2, 3),), {}), [module]) == layout


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x: x.cumsum(1), False),
        (lambda x: x.mean(1, keepdim=True) + x, True),
        (lambda x: x.flip(1).cumsum(1).flip(1), True),
        (lambda x: x + torch.rand(()), False),  # the same random numbers in every run
        (lambda x: x + x[:, -1:].detach().round(), True),
    ],
)
@pytest.mark.parametrize("by", ["input", "canvas"])
def test_dependence_on_later_positions(function, expected, by):
    x = torch.randn(2, 6, 3, dtype=torch.float64)

    def call(leaves: list[Any], canvas: Tensor | None) -> tuple[Any, list[int]]:
        return function((x if canvas is None else canvas) if by == "canvas" else leaves[0]), [0]

    assert sees_later(nn.Identity(), call, [x], x, BTD) is expected


def test_runs_that_take_another_branch_say_nothing():
    x = torch.randn(2, 6, 3).abs()

    def call(leaves: list[Any], canvas: Tensor | None, told: bool = True) -> tuple[Any, list[int]]:
        value = leaves[0] if canvas is None else canvas
        large = bool(value.max() > x.max())
        return value.cumsum(1) + large, [int(large and told)]

    assert sees_later(nn.Identity(), call, [x], x, BTD) is False
    assert sees_later(nn.Identity(), lambda leaves, canvas: call(leaves, canvas, False), [x], x, BTD) is True


def test_runs_that_differ_by_themselves_say_nothing():
    count = itertools.count()
    x = torch.randn(2, 6, 3)
    assert sees_later(nn.Identity(), lambda leaves, canvas: (leaves[0] + next(count), [0]), [x], x, BTD) is None


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("in_place", [False, True])
def test_blocks_compiled_by_the_user_stay_compiled(in_place):
    model, ran = Branching(), []

    def backend(graph: Any, _: Any) -> Any:
        ran.append(len(graph.graph.find_nodes(op="output")))
        return graph.forward

    if in_place:
        for block in model.blocks:
            block.compile(backend=backend)
    else:
        model.blocks = nn.ModuleList(torch.compile(block, backend=backend) for block in model.blocks)
    bounded = transform(model, X, regions=3, interface="identity")
    assert ran == []
    out = bounded(X)
    assert 1 <= len(ran) <= len(model.blocks)  # nothing of ours among the graphs
    torch.testing.assert_close(out, model(X))
    out.sum().backward()


def test_attributes_are_lent_until_the_last_one_gives_them_back():
    block = nn.Identity()
    own = block.forward
    with lent(block, "forward", 1), lent(block, "training", False):
        with lent(block, "forward", 2):
            assert block.forward == 1
        assert (block.forward, block.training) == (1, False)
        block.forward = 3  # somebody else's, on top of what was lent
    assert (block.forward, block.training) == (3, True)
    del block.forward
    assert block.forward == own
    with contextlib.suppress(KeyError), lent(block, "forward", 1):
        raise KeyError
    assert "forward" not in vars(block)
