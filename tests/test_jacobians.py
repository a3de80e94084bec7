"""Interface Jacobians on adjoint paths written by hand, against one run of the path per row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from lbi_compile.passes.alike import PART
from lbi_compile.passes.jacobians import AdjointPath, Jacobian, Jacobians, bias
from lbi_compile.passes.splicing import FORWARD, Splicer
from tests.joint_graphs import Graph, results, value

aten = torch.ops.aten
B, R = 3, 4
Build = Callable[[Graph, fx.Node, fx.Node], fx.Node]


def path(build: Build, lead: tuple[int, ...] = (B,), *, regions: int = 1) -> tuple[fx.GraphModule, list[AdjointPath]]:
    """A joint graph of ``lam`` and ``saved`` ``[*lead, R]`` with that many regions, one after another."""
    g = Graph(fake=True)
    source, saved = g.input("lam", *lead, R), g.input("saved", *lead, R)
    found = []
    for k in range(regions):
        before = len(g.graph.nodes)
        end = build(g, source, saved)
        made = tuple(node for node in list(g.graph.nodes)[before:] if node.op == "call_function")
        found.append(AdjointPath(k + 1, source, end, made, (), {"region": k + 1}))
        source = end
    return g.done(source), found


def jacobians(gm: fx.GraphModule, **options: Any) -> Jacobians:
    return Jacobians(gm, Splicer(gm, before=gm.graph.output_node(), decompositions=None), R, **options)


def by_hand(gm: fx.GraphModule, end: fx.Node, saved: Tensor) -> Tensor:
    """``[*lead, R, R]``: the graph run on the same unit cotangent at every index, one after another."""
    rows = [results(gm, end, row.expand(saved.shape).contiguous(), saved) for row in torch.eye(R).double()]
    return torch.stack(rows, -2)


W = torch.linspace(-1, 2, R * R, dtype=torch.double).view(R, R)

PATHS: dict[str, tuple[bool, Build]] = {
    "a slope": (False, lambda g, lam, saved: g.call(aten.mul.Tensor, lam, saved)),
    "a product": (True, lambda g, lam, saved: g.call(aten.mm.default, lam, g.constant("w", W))),
    "both": (
        False,
        lambda g, lam, saved: g.call(aten.mul.Tensor, g.call(aten.mm.default, lam, g.constant("w", W)), saved),
    ),
    "a sum": (
        True,
        lambda g, lam, saved: g.call(aten.expand.default, g.call(aten.sum.dim_IntList, lam, [1], True), [B, R]),
    ),
    "nothing of it": (False, lambda g, lam, saved: g.call(aten.zeros_like.default, lam)),
}


@pytest.mark.parametrize("name", PATHS)
def test_row_i_is_the_path_run_on_unit_cotangent_i(name: str):
    shared, build = PATHS[name]
    gm, (region,) = path(build)
    made = jacobians(gm)
    J = made.of(region)
    saved = value(B, R)
    expected = by_hand(gm, region.end, saved)
    found = results(gm, J.node, value(B, R), saved)
    assert J.shared == shared
    assert found.shape == ((1, R, R) if shared else (B, R, R))
    torch.testing.assert_close(found.expand(B, R, R), expected, rtol=0, atol=1e-15)
    assert J.node.meta["custom"] == {"region": 1, PART: "jacobian"}
    assert J.node.meta["partitioner_tag"] == "must_be_in_backward"
    assert not made.unrolled
    for rows in (1, 3):
        again = results(gm, made.by_rows(J, rows), value(B, R), saved)
        torch.testing.assert_close(again.expand(B, R, R), expected, rtol=0, atol=1e-15)


def test_latents_of_a_position_have_jacobians_of_their_own():
    gm, (region,) = path(PATHS["a slope"][1], lead=(2, 3))
    J, saved = jacobians(gm).of(region), value(2, 3, R)
    found = results(gm, J.node, value(2, 3, R), saved)
    assert torch.equal(found, torch.diag_embed(saved))


def test_a_region_that_only_passes_on_has_the_identity():
    g = Graph(fake=True)
    lam = g.input("lam", B, R)
    gm = g.done(lam)
    J = jacobians(gm).of(AdjointPath(1, lam, lam, (), (), {}))
    assert J.shared
    assert torch.equal(results(gm, J.node, value(B, R)), torch.eye(R).double().expand(1, R, R))


def test_a_detached_region_has_zeros():
    g = Graph(fake=True)
    lam, other = g.input("lam", B, R), g.input("other", B, R)
    on_the_side = g.call(aten.neg.default, lam)
    gm = g.done(on_the_side)
    J = jacobians(gm, tag=FORWARD).of(AdjointPath(1, lam, other, (on_the_side,), (), {}))
    assert (J.piece, J.module, J.like, J.shared) == (None, None, None, True)
    assert J.node.meta["partitioner_tag"] == FORWARD
    found = results(gm, J.node, value(B, R), value(B, R))
    assert torch.equal(found, torch.zeros(1, R, R).double())


def test_paths_that_are_alike_are_traced_once():
    gm, regions = path(PATHS["a slope"][1], regions=3)
    made = jacobians(gm)
    first, second, third = map(made.of, regions)
    assert first.like == second.like == third.like is not None
    assert first.module is second.module is third.module
    assert len(made.splicer.traced) == 1
    by_two = [made.by_rows(J, 2) for J in (first, second)]
    assert len(made.splicer.traced) == 2
    made.by_rows(first, 1)
    assert len(made.splicer.traced) == 3
    saved = value(B, R)
    for node in (first.node, second.node, third.node, *by_two):
        assert torch.equal(results(gm, node, value(B, R), saved), torch.diag_embed(saved))


def test_paths_with_constants_of_their_own_are_traced_each():
    def build(g: Graph, lam: fx.Node, saved: fx.Node) -> fx.Node:
        at = len(list(g.root.buffers()))
        return g.call(aten.mul.Tensor, lam, g.constant(f"own{at}", torch.full((R,), float(at + 2)).double()))

    gm, regions = path(build, regions=2)
    made = jacobians(gm)
    found = [made.of(region) for region in regions]
    assert [J.like for J in found] == [None, None]
    given = value(B, R), value(B, R)
    for J, factor in zip(found, (2.0, 3.0), strict=True):
        assert torch.equal(results(gm, J.node, *given), factor * torch.eye(R).double().expand(1, R, R))
        assert torch.equal(results(gm, made.by_rows(J, 3), *given), factor * torch.eye(R).double().expand(1, R, R))
        assert made.work(J).separable


def test_what_a_jacobian_takes():
    gm, (region,) = path(PATHS["both"][1], lead=(5,))
    made = jacobians(gm)
    work = made.work(made.of(region))
    # the Jacobian at 5 indices; the product and its multiple live at one time
    assert (work.result, work.most, work.separable) == (5 * R * R * 8, 2 * 5 * R * R * 8, True)
    assert made.inseparable == {}


def test_what_mixes_indices_is_told():
    gm, (region, other) = path(lambda g, lam, saved: g.call(aten.cumsum.default, lam, 0), regions=2)
    made = jacobians(gm)
    assert not made.work(made.of(region)).separable
    assert set(made.inseparable) == {1}
    assert not made.work(made.of(other)).separable
    assert set(made.inseparable) == {1, 2}


def part(made: Jacobians, J: Jacobian, count: int, low: int, high: int) -> fx.Node:
    """The Jacobian at the indices from ``low`` to ``high`` of ``count``."""
    read = [
        made.splicer(lambda whole, operand=operand: made.flat(J, operand, whole, count)[low:high], [node])
        if operand.lead
        else node
        for operand, node in made.reads(J)
    ]
    return made.part(J, read, high - low, high - low)


SEPARABLE: dict[str, tuple[tuple[int, ...], Build]] = {
    "a slope": ((5,), PATHS["a slope"][1]),
    "a product": ((5,), PATHS["both"][1]),
    "positions": ((2, 3), PATHS["a slope"][1]),
    "flattened positions": (
        (2, 3),
        lambda g, lam, saved: g.call(
            aten.mul.Tensor,
            g.call(
                aten.view.default,
                g.call(aten.mm.default, g.call(aten.view.default, lam, [6, R]), g.constant("w", W)),
                [2, 3, R],
            ),
            saved,
        ),
    ),
    "a sum of what was saved": (
        (5,),
        lambda g, lam, saved: g.call(
            aten.mul.Tensor, g.call(aten.mul.Tensor, lam, g.call(aten.cumsum.default, saved, 0)), saved
        ),
    ),
    "less axes": (
        (5,),
        lambda g, lam, saved: g.call(aten.mul.Tensor, lam, g.call(aten.sum.dim_IntList, saved, [0])),
    ),
}


@pytest.mark.parametrize("name", SEPARABLE)
def test_parts_of_the_indices_are_parts_of_the_jacobian(name: str):
    lead, build = SEPARABLE[name]
    gm, (region,) = path(build, lead)
    made, saved = jacobians(gm), value(*lead, R)
    J = made.of(region)
    assert made.work(J).separable
    count = saved[..., 0].numel()
    bounds = [(0, 2), (2, 4), (4, count)]
    nodes = [part(made, J, count, *ends) for ends in bounds]
    expected = by_hand(gm, region.end, saved).reshape(count, R, R)
    for node, (low, high) in zip(nodes, bounds, strict=True):
        found = results(gm, node, value(*lead, R), saved)
        torch.testing.assert_close(found, expected[low:high], rtol=0, atol=1e-14)


def test_parts_of_one_size_are_traced_once():
    gm, (region,) = path(PATHS["a slope"][1], (5,))
    made = jacobians(gm)
    J = made.of(region)
    for ends in ((0, 2), (2, 4), (4, 5)):
        part(made, J, 5, *ends)
    assert len(made.splicer.traced) == 3  # of all indices, of two and of one


# -- what the path gives for a cotangent of zero


def test_the_bias_is_the_path_without_the_latent():
    g = Graph(fake=True)
    lam, other, saved = g.input("lam", B, R), g.input("other", B, R), g.input("saved", R, R)
    a = g.call(aten.mul.Tensor, lam, 3.0)
    b = g.call(aten.add.Tensor, a, other)
    c = g.call(aten.mm.default, b, saved)
    d = g.call(aten.add.Tensor, c, other)
    gm = g.done(d)
    splicer = Splicer(gm, before=gm.graph.output_node(), decompositions=None)
    node = bias(gm, AdjointPath(2, lam, d, (a, b, c, d), (other,), {"region": 2}), splicer)
    assert node.meta["custom"] == {"region": 2, PART: "bias"}
    assert splicer.inserted == 2  # no multiple of zeros, no sum with them
    x, y, s = value(B, R), value(B, R), value(R, R)
    assert torch.equal(results(gm, node, x, y, s), y @ s + y)


def test_zeros_are_put_where_an_operator_needs_them():
    g = Graph(fake=True)
    lam, other = g.input("lam", B, R), g.input("other", B, R)
    a = g.call(aten.neg.default, lam)
    c = g.call(aten.where.self, g.constant("keep", torch.tensor([True, False, True, False])), a, other)
    gm = g.done(c)
    splicer = Splicer(gm, before=gm.graph.output_node(), decompositions=None)
    node = bias(gm, AdjointPath(1, lam, c, (a, c), (other,), {}), splicer)
    x, y = value(B, R), value(B, R)
    assert torch.equal(results(gm, node, x, y), y * torch.tensor([0.0, 1, 0, 1]).double())


def test_a_region_without_a_path_passes_on_what_joins_it():
    g = Graph(fake=True)
    lam, other = g.input("lam", B, R), g.input("other", B, R)
    gm = g.done(other)
    splicer = Splicer(gm, before=gm.graph.output_node(), decompositions=None)
    assert bias(gm, AdjointPath(1, lam, other, (), (other,), {}), splicer) is other
    assert splicer.inserted == 0


def test_nothing_joins_a_path_that_others_do_not_reach():
    g = Graph(fake=True)
    lam, other = g.input("lam", B, R), g.input("other", B, R)
    a, side = g.call(aten.neg.default, lam), g.call(aten.neg.default, other)
    gm = g.done(a, side)
    splicer = Splicer(gm, before=gm.graph.output_node(), decompositions=None)
    node = bias(gm, AdjointPath(1, lam, a, (a, side), (other,), {"region": 1}), splicer)
    assert node.meta["custom"] == {"region": 1, PART: "bias"}
    assert torch.equal(results(gm, node, value(B, R), value(B, R)), torch.zeros(B, R).double())
