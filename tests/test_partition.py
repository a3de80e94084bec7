"""Partition: optimal cuts against brute force, and where real models are cut."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from transformers import GPT2Config, GPT2LMHeadModel

import lbi_compile
from lbi_compile.analysis import analyse
from lbi_compile.capture import Capture, as_inputs, capture
from lbi_compile.errors import NoSeparatorError, RegionsError, TooManyRegionsError
from lbi_compile.options import Options
from lbi_compile.passes.liveness import INPUT, Liveness
from lbi_compile.passes.partition import FINISH_SLACK, Partition, partition
from lbi_compile.passes.separators import Separator
from lbi_compile.plan import Plan, Point
from tests import models

_PROPERTY: dict[str, Any] = {"deadline": None, "database": None, "derandomize": True}


# --- optimality ---------------------------------------------------------------------------------------------------


@dataclass
class Chain:
    """A chain of equal-shaped nodes ``n0 .. n_s``; ``work[i]`` is done between ``n_i`` and ``n_{i+1}``."""

    work: Sequence[int]
    finishing: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        graph = fx.Graph()
        node = graph.placeholder("x")
        nodes = []
        for i in range(len(self.work) + 1):
            node = graph.call_function(torch.relu, (node,), name=f"n{i}")
            node.meta["val"] = torch.empty(2, 3, device="meta")
            nodes.append(node)
        graph.output(node)
        self.nodes = nodes
        self.gm = fx.GraphModule(nn.Module(), graph)
        waits: dict[fx.Node, tuple[fx.Node, ...]] = {n: tuple(n.all_input_nodes) for n in graph.nodes}
        # as if an integer were computed from the last node and returned beside the first one
        self.live = Liveness(dict.fromkeys(nodes, "live"), waits, {}, frozenset(), tuple(nodes), (nodes[0],))
        self.points = tuple(Separator(n, i) for i, n in enumerate(nodes))

    def cut(self, regions: int | list[int]) -> Partition:
        cost = dict(zip(self.nodes[1:], self.work, strict=True))
        wanted = regions if isinstance(regions, int) else [self.nodes[i] for i in regions]
        return partition(
            self.live,
            self.points,
            regions=wanted,
            cost=cost,
            flops=cost,
            leaves_finish=lambda _, sink: self.nodes.index(sink) in self.finishing,
            describe=lambda node: Point("", node.name, 0, (2, 3), "float32"),
        )

    def indices(self, nodes: Sequence[fx.Node]) -> list[int]:
        return [self.nodes.index(node) for node in nodes]

    def sizes(self, cuts: Sequence[int]) -> list[int]:
        edges = [0, *cuts, len(self.work)]
        return [sum(self.work[a:b]) for a, b in itertools.pairwise(edges)]

    def best(self, regions: int, among: Sequence[int]) -> tuple[int, int] | None:
        """Smallest largest region, then smallest sum of squares, over all choices."""
        choices = itertools.combinations(sorted(among), regions - 1)
        return min(((max(s), sum(x * x for x in s)) for s in map(self.sizes, choices)), default=None)


@pytest.mark.parametrize(("first", "canvas"), [(0, "n0"), (7, "x")])
def test_an_input_is_the_canvas_only_where_work_comes_before_the_first_separator(first: int, canvas: str) -> None:
    chain = Chain([1, 2, 3])
    x = chain.nodes[0].all_input_nodes[0]
    x.meta["val"] = chain.nodes[0].meta["val"]
    chain.live = replace(chain.live, kind={**chain.live.kind, x: INPUT})
    cost = dict(zip(chain.nodes, (first, *chain.work), strict=True))
    found = partition(
        chain.live,
        chain.points,
        regions=2,
        cost=cost,
        flops=cost,
        leaves_finish=lambda *_: True,
        describe=lambda node: Point("", node.name, 0, (2, 3), "float32"),
    )
    assert found.canvas.name == canvas


weights = st.lists(st.integers(1, 20), min_size=2, max_size=9)


@settings(max_examples=150, **_PROPERTY)
@given(weights, st.integers(1, 9))
def test_largest_region_is_as_small_as_brute_force_finds(work: list[int], regions: int) -> None:
    chain = Chain(work)
    regions = min(regions, len(work))
    cuts = chain.indices(chain.cut(regions).ends[:-1])
    assert len(cuts) == regions - 1
    assert cuts == sorted(set(cuts))
    sizes = chain.sizes(cuts)
    assert (max(sizes), sum(x * x for x in sizes)) == chain.best(regions, range(1, len(work)))


@settings(max_examples=150, **_PROPERTY)
@given(weights, st.integers(2, 5), st.sets(st.integers(1, 8)))
def test_cuts_that_leave_a_finish_are_preferred_up_to_a_slack(work: list[int], regions: int, some: set[int]) -> None:
    places = range(1, len(work))
    finishing = frozenset(some & set(places))
    regions = min(regions, len(work))
    chain = Chain(work, finishing)
    found = chain.cut(regions)
    cuts = chain.indices(found.ends[:-1])
    sizes = chain.sizes(cuts)
    free, kept = chain.best(regions, places), chain.best(regions, finishing)
    assert free is not None
    allowed = finishing and kept is not None and kept[0] <= FINISH_SLACK * free[0]
    assert (max(sizes), sum(x * x for x in sizes)) == (kept if allowed else free)
    (boundaries,) = [decision for decision in found.why if decision.about == "boundaries"]
    assert ("position-wise finish" in boundaries.why) == bool(allowed)
    assert not allowed or set(cuts) <= finishing


@settings(max_examples=30, **_PROPERTY)
@given(weights, st.integers(1, 5))
def test_equal_graphs_give_equal_partitions(work: list[int], regions: int) -> None:
    first, second = Chain(work), Chain(work)
    regions = min(regions, len(work))
    found = [(c.cut(regions), c) for c in (first, second, first)]
    assert len({(tuple(n.name for n in p.ends), p.canvas.name, p.why) for p, _ in found}) == 1


def test_steps_without_work_end_no_region() -> None:
    """Bookkeeping between layers: the cut comes after it, so that activations stay with their layer."""
    chain = Chain([0, 1000, 0, 1, 1000, 2000, 1])
    found = chain.cut(2)
    assert chain.indices([found.canvas, *found.ends]) == [1, 5, 6]
    assert chain.indices(found.candidates) == [4, 5]


def test_named_cuts_are_taken_in_program_order() -> None:
    chain = Chain([5] * 6)
    assert chain.indices(chain.cut([4, 1]).ends) == [1, 4, 6]


def test_a_named_cut_at_no_separator_is_refused_with_the_places() -> None:
    chain = Chain([5] * 3)
    with pytest.raises(NoSeparatorError, match=r"asked for at <model>:n0\[0\]") as caught:
        chain.cut([0])
    assert caught.value.expected.endswith("<model>:n1[0], <model>:n2[0]")


def test_a_cut_named_twice_is_refused() -> None:
    with pytest.raises(RegionsError, match="two regions asked for that start at <model>:n2"):
        Chain([5] * 4).cut([2, 2])


def test_too_many_regions_names_the_places() -> None:
    chain = Chain([5] * 3)
    with pytest.raises(TooManyRegionsError) as caught:
        chain.cut(4)
    assert caught.value.found == "4 regions asked for, 2 places to cut: <model>:n1[0], <model>:n2[0]"
    assert caught.value.expected == "at most 3 regions"
    chain.cut(3)


def test_no_places_at_all() -> None:
    chain = Chain([5])
    chain.points = ()
    with pytest.raises(TooManyRegionsError, match="0 places to cut: none"):
        chain.cut(2)


def test_the_widest_group_of_shapes_is_cut() -> None:
    """Two stages of different width: the boundaries are in the one that does most of the work."""
    chain = Chain([9, 9, 9, 1, 4, 4, 4])
    for node in chain.nodes[4:]:
        node.meta["val"] = torch.empty(2, 5, device="meta")
    assert chain.indices(chain.cut(3).ends) == [1, 2, 3]
    assert chain.cut(3).why[0].choice == "[2, 3] float32"


def test_a_last_output_as_heavy_as_a_layer_ends_the_last_region() -> None:
    for last, end in ((5, 4), (1, 3)):
        chain = Chain([5, 5, 5, last])
        chain.live = replace(chain.live, sinks=(chain.nodes[-1],))
        chain.points = chain.points[:-1]  # nobody reads the output
        assert chain.indices(chain.cut(2).ends)[-1] == end


# --- models -------------------------------------------------------------------------------------------------------


class NoProjection(nn.Module):
    """Blocks on the input itself, `[B, D]`, then norm and classifier."""

    def __init__(self, block: type[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(block(8, dropout=0.1) for _ in range(4))  # type: ignore[call-arg]
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class NoHead(NoProjection):
    """The residual stream is the output."""

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def mlp(kind: type[models._BlockMLP]) -> tuple[nn.Module, Any]:
    return kind(6, width=8, depth=4, classes=3, dropout=0.1), torch.randn(3, 6)


def transformer() -> tuple[nn.Module, Any]:
    model = models.CausalTransformer(vocabulary=16, length=8, width=8, depth=4, heads=2, dropout=0.1)
    return model, torch.randint(0, 16, (2, 6))


def vit() -> tuple[nn.Module, Any]:
    return models.VisionTransformer(width=8, depth=4, heads=2, dropout=0.1), torch.randn(3, 1, 8, 8)


def gpt2() -> tuple[nn.Module, Any]:
    config = GPT2Config(n_layer=4, n_embd=8, n_head=2, vocab_size=16, n_positions=8, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config), {"input_ids": torch.randint(0, 16, (2, 6))}


CASES: dict[str, tuple[Callable[[], tuple[nn.Module, Any]], str, tuple[int | str, ...], list[str], str]] = {
    # model, canvas, its shape, boundary for two regions, end of the last region
    "transformer": (transformer, "dropout:dropout[0]", ("B", "T", 8), ["blocks.1:add[1]"], "blocks.3:add[1]"),
    "gpt2": (gpt2, "transformer.drop:dropout[0]", ("B", "T", 8), ["transformer.h.1:add[1]"], "transformer.h.3:add[1]"),
    "vit": (vit, "dropout:dropout[0]", ("B", 17, 8), ["blocks.1:add[1]"], "blocks.3:add[1]"),
    "pre-norm": (lambda: mlp(models.ResidualMLP), "stem:linear[0]", ("B", 8), ["blocks.1:add[0]"], "blocks.3:add[0]"),
    "post-norm": (
        lambda: mlp(models.PostNormMLP),
        "stem:linear[0]",
        ("B", 8),
        ["blocks.1.norm:layer_norm[0]"],
        "blocks.3:add[0]",
    ),
    "plain": (
        lambda: mlp(models.PlainMLP),
        "stem:linear[0]",
        ("B", 8),
        ["blocks.1.2:dropout[0]"],
        "blocks.3.0:linear[0]",
    ),
    "pre-norm on the input": (
        lambda: (NoProjection(models._PreNorm), torch.randn(3, 8)),
        "<model>:input[0]",
        ("B", 8),
        ["blocks.1:add[0]"],
        "blocks.3:add[0]",
    ),
    "post-norm on the input": (
        lambda: (NoProjection(models._PostNorm), torch.randn(3, 8)),
        "<model>:input[0]",
        ("B", 8),
        ["blocks.1.norm:layer_norm[0]"],
        "blocks.3:add[0]",
    ),
    "plain on the input": (
        lambda: (NoProjection(models._Plain), torch.randn(3, 8)),
        "<model>:input[0]",
        ("B", 8),
        ["blocks.1.2:dropout[0]"],
        "blocks.3.0:linear[0]",
    ),
    "no head": (
        lambda: (NoHead(models._PreNorm), torch.randn(3, 8)),
        "<model>:input[0]",
        ("B", 8),
        ["blocks.1:add[0]"],
        "blocks.3:add[0]",
    ),
}


@functools.cache
def captured(name: str) -> tuple[nn.Module, Capture]:
    model, inputs = CASES[name][0]()
    return model, capture(model, as_inputs(model, inputs))


def planned(name: str, regions: int | tuple[str, ...]) -> Plan:
    return analyse(*captured(name), Options(regions, 2, "auto", "auto", "auto", "auto", False, 0)).plan


@pytest.mark.parametrize(("first", "canvas"), [([], "input"), ([nn.ReLU()], "aten.relu.default")])
def test_the_input_is_the_canvas_where_work_follows_it(first: list[nn.Module], canvas: str) -> None:
    layers = (nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(4))
    assert lbi_compile.plan(nn.Sequential(*first, *layers), torch.randn(3, 8), regions=2).canvas.op == canvas


@pytest.mark.parametrize("name", CASES)
def test_canvas_boundaries_and_head(name: str) -> None:
    """The canvas lies after embedding, position and dropout; the head begins before the final norm."""
    _, canvas, shape, cuts, end = CASES[name]
    plan = planned(name, 2)
    assert (plan.canvas.name, plan.canvas.shape) == (canvas, shape)
    assert [point.name for point in plan.boundaries] == cuts
    assert plan.regions[-1].end.name == end
    (lane,) = [decision.choice for decision in plan.why if decision.about == "lane"]
    assert lane == f"[{', '.join(map(str, shape))}] float32"


def names(plan: Plan) -> list[str]:
    return [point.name for point in plan.boundaries]


def test_modules_name_the_regions_they_start() -> None:
    named = planned("transformer", ("blocks.3", "blocks.1"))
    assert names(named) == ["blocks.0:add[1]", "blocks.2:add[1]"]
    inside = planned("transformer", ("blocks.2.norm_mlp",))
    assert names(inside) == ["blocks.2:add[0]"]
    assert named.canvas == inside.canvas


@pytest.mark.parametrize(
    ("path", "error", "says"),
    [
        ("blocks.9", RegionsError, "regions names the module 'blocks.9'"),
        ("stem", RegionsError, "a module that runs after the first separator, for example blocks.0"),
        ("head", NoSeparatorError, "boundaries asked for at norm:layer_norm"),
    ],
)
def test_a_module_that_starts_no_region_is_refused(path: str, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says.replace("[", r"\[")):
        planned("pre-norm", (path,))


def test_every_place_of_a_model_can_be_used() -> None:
    """As many regions as there are places, one more is refused with all of them named."""
    plan = planned("pre-norm", 4)
    with pytest.raises(TooManyRegionsError) as caught:
        planned("pre-norm", 5)
    assert caught.value.found == f"5 regions asked for, 3 places to cut: {', '.join(names(plan))}"
