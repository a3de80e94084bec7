"""Chains of additions over the items of one tensor become sums, and nothing else does."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from lbi_compile.passes.region_sums import item_of, sum_over_regions

aten = torch.ops.aten


def value(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.double)


def summed(function: Callable[..., Tensor | tuple[Tensor, ...]], *inputs: Tensor) -> tuple[int, list[str]]:
    """How many sums were made, and the operators that are left; the graph still gives what the function does."""
    gm = make_fx(function, tracing_mode="fake")(*inputs)
    made = sum_over_regions(gm.graph)
    gm.graph.eliminate_dead_code()
    gm.graph.lint()
    gm.recompile()
    torch.testing.assert_close(gm(*inputs), function(*inputs), rtol=0, atol=1e-14)
    return made, [str(node.target).split(".")[1] for node in gm.graph.nodes if node.op == "call_function"]


def test_a_sum_over_all_items_needs_no_slice():
    assert summed(lambda x: x[0] + x[1] + x[2], value(3, 2)) == (1, ["sum"])
    assert summed(lambda x: x[2] + (x[0] + x[1]), value(3, 2)) == (1, ["sum"])


def test_a_sum_over_some_items_that_follow_each_other():
    assert summed(lambda x: x[1] + x[2] + x[3], value(5, 2)) == (1, ["slice", "sum"])
    assert summed(lambda x: x[0] + x[1] + x[2], value(5, 2)) == (1, ["slice", "sum"])


def test_items_apart_and_fewer_than_three_are_left():
    assert summed(lambda x: x[0] + x[1] + x[3], value(5, 2))[0] == 0
    assert summed(lambda x: x[0] + x[1], value(2, 2))[0] == 0


def test_other_terms_and_items_taken_twice_are_added():
    assert summed(lambda x, y: x[0] + y + x[1] + x[2], value(3, 2), value(2)) == (1, ["sum", "add"])
    made, left = summed(lambda x: x[0] + x[1] + x[2] + x[1], value(3, 2))
    assert (made, left.count("sum"), left.count("add")) == (1, 1, 1)
    made, left = summed(lambda x, y: x[0] + y[0] + x[1] + y[1] + x[2] + y[2], value(3, 2), value(3, 2))
    assert (made, left) == (2, ["sum", "sum", "add"])


def test_a_sum_that_others_read_stays_one_of_the_terms():
    def two(x: Tensor) -> tuple[Tensor, Tensor]:
        a = x[0] + x[1] + x[2]
        return a + x[3] + x[4], a * 2

    made, left = summed(two, value(5, 2))
    assert (made, left.count("sum"), left.count("add")) == (1, 1, 2)


def test_additions_with_a_factor_or_a_number_are_terms():
    assert summed(lambda x: torch.add(x[0] + x[1] + x[2], x[3], alpha=2), value(4, 2))[1].count("sum") == 1
    assert summed(lambda x: x[0] + x[1] + x[2] + 1.0, value(3, 2))[1] == ["sum", "add"]


def test_sums_that_broadcast_or_change_the_dtype_are_terms():
    made, left = summed(lambda x, y: y + (x[0] + x[1] + x[2]), value(3, 2), value(4, 2))
    assert (made, left) == (1, ["sum", "add"])
    made, left = summed(lambda x, y: y + (x[0] + x[1] + x[2]), value(3, 2).float(), value(2))
    assert (made, left) == (1, ["sum", "add"])
    assert summed(lambda x, y: y + x[0] + x[1] + x[2], value(3, 2), value(4, 2))[0] == 0


def test_two_sums_in_one_graph():
    made, left = summed(lambda x: (x[0] + x[1] + x[2]) * (x[1] + x[2] + x[3]), value(4, 2))
    assert (made, left.count("sum"), left.count("slice")) == (2, 2, 2)


@pytest.mark.parametrize(
    ("function", "index"),
    [
        (lambda x: aten.select.int(x, 0, 2), 2),
        (lambda x: x.unbind()[1], 1),
        (lambda x: aten.select.int(x, 1, 0), None),
        (lambda x: x.unbind(1)[1], None),
        (lambda x: x.split(1)[1], None),
        (lambda x: x.neg(), None),
    ],
    ids=["select", "unbind", "select of another axis", "unbind of another axis", "split", "neg"],
)
def test_what_takes_one_item(function: Callable[[Tensor], Tensor], index: int | None):
    gm = make_fx(function)(value(3, 2))
    (x,) = gm.graph.find_nodes(op="placeholder")
    (result,) = gm.graph.output_node().all_input_nodes
    assert isinstance(result, fx.Node)
    assert item_of(result) == (None if index is None else (x, index))
