"""What a spliced function leaves in a joint graph: its nodes, their tags, and one trace for all that are alike."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from lbi_compile.passes.splicing import BACKWARD, FORWARD, Splicer
from tests.joint_graphs import Graph, results, value

aten = torch.ops.aten


def graph() -> tuple[fx.GraphModule, list[fx.Node], Splicer]:
    """``-x`` and ``y``: the joint graph, its two inputs, and what splices before its output."""
    g = Graph(fake=True)
    x, y = g.input("x", 2, 3), g.input("y", 3)
    gm = g.done(g.call(aten.neg.default, x), y)
    return gm, [x, y], Splicer(gm, before=gm.graph.output_node(), decompositions=None)


def test_nodes_are_inserted_with_tag_and_label():
    gm, (x, y), splicer = graph()
    node = splicer(lambda x, y: (x * y).tanh(), [x, y], tag=FORWARD, label={"region": 3})
    product, tanh = list(gm.graph.nodes)[-3:-1]
    assert node is tanh
    assert (product.target, tanh.target) == (aten.mul.Tensor, aten.tanh.default)
    assert product.args == (x, y)
    assert splicer.inserted == 2
    for one in (product, tanh):
        assert (one.meta["custom"], one.meta["partitioner_tag"]) == ({"region": 3}, FORWARD)
        assert one.meta["val"].shape == (2, 3)
    a, b = value(2, 3), value(3)
    assert torch.equal(results(gm, node, a, b), (a * b).tanh())


def test_results_keep_their_structure_and_what_is_unused_stays_out():
    gm, (x, y), splicer = graph()

    def function(x: Tensor, y: Tensor) -> list[Tensor]:
        torch.cumsum(x, 0)  # nobody reads it
        return [y, x + 1]

    same, more = splicer(function, [x, y])
    assert same is y
    assert splicer.inserted == 1
    assert more.meta["custom"] == {}
    assert more.meta["partitioner_tag"] == BACKWARD
    a = value(2, 3)
    assert torch.equal(results(gm, more, a, value(3)), a + 1)


def test_functions_that_are_alike_are_traced_once():
    gm, (x, y), splicer = graph()
    calls: list[str] = []

    def counted(x: Tensor) -> Tensor:
        calls.append("")
        return x * 2

    assert not splicer.knows("double")
    first, again = splicer(counted, [x], like="double"), splicer(counted, [x], like="double")
    assert (len(calls), first is again) == (1, False)
    assert splicer.knows("double")
    assert not splicer.knows(None)
    splicer(counted, [y])
    splicer(counted, [y])
    assert len(calls) == 3
    assert not splicer.knows(None)
    a = value(2, 3)
    assert torch.equal(results(gm, [first, again], a, value(3))[1], 2 * a)


def test_a_value_is_inserted_once():
    gm, _, splicer = graph()

    def make() -> Tensor:
        return torch.ones(2)

    one = splicer.once(make, like="a", tag=FORWARD)
    assert splicer.once(make, like="a") is one
    assert splicer.once(make, like="b") is not one
    assert one.meta["partitioner_tag"] == FORWARD
    assert splicer.inserted == 2
    assert torch.equal(results(gm, one, value(2, 3), None), torch.ones(2))


def test_constants_are_kept_under_names_of_their_own():
    gm, (x, _), splicer = graph()
    gm.register_buffer("_lbi_constant_0", torch.zeros(3))
    nodes = [splicer(lambda x, held=held: x + held, [x]) for held in (torch.full((3,), 2.0), torch.full((3,), 5.0))]
    assert torch.equal(gm._lbi_constant_0, torch.zeros(3))
    a = value(2, 3)
    two, five = results(gm, nodes, a, None)
    assert torch.equal(two, a + 2)
    assert torch.equal(five, a + 5)


def test_neither_autocast_nor_gradients_reach_a_trace():
    _, (x, y), splicer = graph()
    seen: list[Any] = []

    def product(x: Tensor, y: Tensor) -> Tensor:
        seen.append((torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))
        return x.float() @ y.float()

    with torch.autocast("cpu", torch.bfloat16), torch.enable_grad():
        node = splicer(product, [x, y])
    assert seen == [(False, False)]
    assert node.meta["val"].dtype == torch.float32


def test_what_has_no_batching_rule_raises_rather_than_loops():
    _, (x, _), splicer = graph()
    with pytest.raises(RuntimeError, match="vmap fallback"), splicer.tracing():
        torch.vmap(lambda row: torch.histc(row, 3))(x.meta["val"])


def sized() -> tuple[fx.GraphModule, fx.Node, fx.Node]:
    """A graph of a tensor with symbolic sizes, and of another one."""
    gm = make_fx(lambda x, y: (x.neg(), y), tracing_mode="symbolic")(torch.randn(3, 5), torch.randn(4))
    x, y = gm.graph.find_nodes(op="placeholder")
    return gm, x, y


@pytest.mark.parametrize("tag", [FORWARD, BACKWARD])
def test_sizes_of_the_backward_are_left_to_the_partitioner(tag: str):
    gm, x, _ = sized()
    splicer = Splicer(gm, before=gm.graph.output_node(), decompositions=None)
    node = splicer(lambda x: x.new_ones(x.shape[0] * 2 + 1), [x], tag=tag)
    inserted = [one for one in gm.graph.nodes if "custom" in one.meta]
    sizes = [one for one in inserted if one is not node]
    assert {one.target for one in sizes} == {aten.sym_size.int, operator.mul, operator.add}
    assert [one.meta.get("partitioner_tag") for one in sizes] == [tag if tag == FORWARD else None] * 3
    assert node.meta["partitioner_tag"] == tag
    assert torch.equal(results(gm, node, torch.randn(4, 5), None), torch.ones(9))


def test_sizes_of_the_latent_may_be_used_beside_those_of_inputs():
    gm, x, y = sized()
    latent = x.meta["val"]
    splicer = Splicer(gm, before=gm.graph.output_node(), decompositions=None, latent=x)
    node = splicer(lambda y: y.sum() * y.new_ones(latent.shape), [y])
    assert torch.equal(results(gm, node, torch.randn(2, 7), torch.ones(4)), torch.full((2, 7), 4.0))
