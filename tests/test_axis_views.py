"""Where views, picks, joins and recurrent nets hold an axis, case by case, and what a rule sees of a call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from lbi_compile.passes.axis_calls import AxisState, Call, MixedError, agree, contract, parameters
from tests.axis_checks import check, module, single_call
from tests.random_graphs import Builder

aten = torch.ops.aten
Make = Callable[[Builder, fx.Node], fx.Node | None]


def cell(b: Builder, x: fx.Node | None, state: fx.Node | None, net: Any = aten.gru_cell.default) -> fx.Node | None:
    return b.call(net, x, state, b.constant(9, 4), b.constant(9, 3))


def gru(b: Builder, x: fx.Node, hx: Any, *, batch_first: bool, i: int, layers: int = 1) -> fx.Node | None:
    weights = [b.constant(6, 4), b.constant(6, 2), b.constant(6), b.constant(6)]
    return b.item(b.call(aten.gru.input, x, hx, weights, True, layers, 0.0, False, False, batch_first), i)


def lstm(b: Builder, x: fx.Node, i: int) -> fx.Node | None:
    weights = [b.constant(8, 4), b.constant(8, 2), b.constant(8), b.constant(8)]
    states = [b.constant(1, 2, 2), b.constant(1, 2, 2)]
    return b.item(b.call(aten.lstm.input, x, states, weights, True, 1, 0.0, False, False, True), i)


# One call on x [2, 3, 4]. Where the result holds each axis of x: a dim, "dim/stride", "-" for mixed, "a" for absent.
CALLS: dict[str, tuple[str, Make]] = {
    "view that merges the last two": ("0 1/4 1", lambda b, x: b.call(aten.view.default, x, [2, 12])),
    "view that adds dims of one": ("1 2 4", lambda b, x: b.call(aten.view.default, x, [1, 2, 3, 1, 4])),
    "view of one row": ("0/12 0/4 0", lambda b, x: b.call(aten.view.default, x, [24, 1])),
    "view that moves a factor": ("0/2 - -", lambda b, x: b.call(aten.view.default, x, [4, 6])),
    "view that cuts a flattened axis": ("0 - -", lambda b, x: b.call(aten.view.default, x, [2, 2, 6])),
    "view of a flattened part": (
        "0/3 0 1",
        lambda b, x: b.call(aten.view.default, b.call(aten.flatten.using_ints, x), [6, 4]),
    ),
    "unflatten": ("0 1 -", lambda b, x: b.call(aten.unflatten.int, x, 2, [2, 2])),
    "squeeze": ("0 1 2", lambda b, x: b.call(aten.squeeze.default, b.call(aten.unsqueeze.default, x, 1))),
    "view as the type it has": ("0 1 2", lambda b, x: b.call(aten.view.dtype, x, torch.float64)),
    "permute from the end": ("2 1 0", lambda b, x: b.call(aten.permute.default, x, [-1, -2, -3])),
    "transpose of inner dims": ("0 2 1", lambda b, x: b.call(aten.transpose.int, x, -1, 1)),
    "movedim of several": ("2 1 0", lambda b, x: b.call(aten.movedim.intlist, x, [0, 2], [2, 0])),
    "movedim forward": ("1 2 0", lambda b, x: b.call(aten.movedim.int, x, -1, 0)),
    "numpy_T": ("2 1 0", lambda b, x: b.call(aten.numpy_T.default, x)),
    "t of a vector": ("- - 0", lambda b, x: b.call(aten.t.default, b.call(aten.sum.dim_IntList, x, [0, 1]))),
    "expand in place": (
        "0 - 2",
        lambda b, x: b.call(aten.expand.default, b.call(aten.mean.dim, x, [1], True), [2, 5, 4]),
    ),
    "repeat in more dims": ("2 3 4", lambda b, x: b.call(aten.repeat.default, x, [2, 1, 1, 3, 1])),
    "tile of fewer dims": ("0 1 2", lambda b, x: b.call(aten.tile.default, x, [2])),
    "repeat_interleave of another dim": ("0 1 2/3", lambda b, x: b.call(aten.repeat_interleave.self_int, x, 3, -1)),
    "repeat_interleave by a tensor": (
        "- - -",
        lambda b, x: b.call(aten.repeat_interleave.self_Tensor, x, b.constant(3, high=2), 1),
    ),
    "narrow": ("- 1 2", lambda b, x: b.call(aten.narrow.default, x, 0, 1, 1)),
    "slice from the end": ("0 1 -", lambda b, x: b.call(aten.slice.Tensor, x, -1, 0, 3)),
    "select from the front": ("- 0 1", lambda b, x: b.call(aten.select.int, x, 0, 1)),
    "select from the end": ("0 1 -", lambda b, x: b.call(aten.select.int, x, -1, 1)),
    "unbind of a dim": ("0 1 -", lambda b, x: b.item(b.call(aten.unbind.int, x, -1), 1)),
    "split_with_sizes": ("0 - 2", lambda b, x: b.item(b.call(aten.split_with_sizes.default, x, [1, 2], -2), 1)),
    "flip from the end": ("0 1 -", lambda b, x: b.call(aten.flip.default, x, [-1])),
    "flip of two": ("- 1 -", lambda b, x: b.call(aten.flip.default, x, [0, 2])),
    "roll from the end": ("0 - 2", lambda b, x: b.call(aten.roll.default, x, [1], [-2])),
    "unfold from the end": ("0 1 -", lambda b, x: b.call(aten.unfold.default, x, -1, 2, 1)),
    "view_as_real": (
        "0 1/2 -",
        lambda b, x: b.call(
            aten.view_as_real.default, b.call(aten.view_as_complex.default, b.call(aten.view.default, x, [2, 6, 2]))
        ),
    ),
    "cat from the end": ("0 1 -", lambda b, x: b.call(aten.cat.default, [x, x], -1)),
    "cat of flattened axes": (
        "0/3 0 -",
        lambda b, x: b.call(aten.cat.default, [b.call(aten.view.default, x, [6, 4]), b.constant(6, 1)], 1),
    ),
    "stack in front": ("1 2 3", lambda b, x: b.call(aten.stack.default, [x, b.constant(2, 3, 4)])),
    "stack from the end": ("0 1 2", lambda b, x: b.call(aten.stack.default, [b.constant(2, 3, 4), x], -1)),
    "stack before the last": ("0 1 3", lambda b, x: b.call(aten.stack.default, [x, x], -2)),
    "gru_cell of rows": (
        "0 - -",
        lambda b, x: cell(b, b.call(aten.select.int, x, 1, 0), b.constant(2, 3)),
    ),
    "gru_cell that starts from them": (
        "0 - -",
        lambda b, x: cell(b, b.constant(2, 4), b.call(aten.select.int, x, 2, 0)),
    ),
    "gru, samples first": ("0 - -", lambda b, x: gru(b, x, b.constant(1, 2, 2), batch_first=True, i=0)),
    "gru, samples second": ("- 1 -", lambda b, x: gru(b, x, b.constant(1, 3, 2), batch_first=False, i=0)),
    "gru, last states": ("1 - -", lambda b, x: gru(b, x, b.constant(1, 2, 2), batch_first=True, i=1)),
    "gru, last states of samples second": (
        "- 1 -",
        lambda b, x: gru(b, x, b.constant(1, 3, 2), batch_first=False, i=1),
    ),
    "gru that starts from x": (
        "- 1 -",
        lambda b, x: gru(
            b,
            b.constant(5, 3, 4),
            b.call(aten.slice.Tensor, b.call(aten.slice.Tensor, x, 0, 0, 1), 2, 0, 2),
            batch_first=False,
            i=0,
        ),
    ),
    "gru that starts from x, samples first": (
        "0 - -",
        lambda b, x: gru(
            b,
            b.constant(2, 5, 4),
            b.call(
                aten.transpose.int,
                b.call(aten.slice.Tensor, b.call(aten.slice.Tensor, x, 1, 0, 1), 2, 0, 2),
                0,
                1,
            ),
            batch_first=True,
            i=0,
        ),
    ),
    "lstm, last cells": ("1 - -", lambda b, x: lstm(b, x, 2)),
}


@pytest.mark.parametrize("name", CALLS)
def test_rules_of_single_calls(name: str):
    expected, call = CALLS[name]
    build, node, found = single_call(call)
    assert [state.replace("!", "-") for state in found] == expected.split()
    gm = module(build, node)
    if isinstance(build.values[node], Tensor) and not build.values[node].is_complex():
        check(gm, build)


# -- what a rule sees of a call


def seen(target: Any, *args: Any, states: dict[str, AxisState], **kwargs: Any) -> tuple[Call, dict[str, fx.Node]]:
    """A call on inputs ``x`` [2, 3] and ``y`` [3], given by their names, that hold the axis as told."""
    graph = fx.Graph()
    nodes = {name: graph.placeholder(name) for name in ("x", "y")}
    given = torch.utils._pytree.tree_map(lambda a: nodes.get(a, a) if isinstance(a, str) else a, (args, kwargs))
    node = graph.call_function(target, *given)
    shapes = {nodes["x"]: (2, 3), nodes["y"]: (3,), node: (2, 3)}
    return Call(node, {nodes[name]: state for name, state in states.items()}, shapes, size=2), nodes


AT = AxisState("at", 0)


def test_arguments_are_known_by_name_with_their_defaults():
    call, nodes = seen(aten.add.Tensor, "x", other="y", states={"x": AT})
    assert call.args == {"self": nodes["x"], "other": nodes["y"], "alpha": 1}
    assert (call.first, call.out) == ("self", (2, 3))
    # keyword only
    call, _ = seen(aten.add.Tensor, "x", "y", alpha=3, states={})
    assert call.args["alpha"] == 3


def test_parameters_tell_what_is_written_to():
    written = {name: writes for name, _, _, writes in parameters(aten.add_.Tensor)}
    assert written == {"self": True, "other": False, "alpha": False}
    assert [only for _, only, _, _ in parameters(aten.add.Tensor)] == [False, False, True]
    assert not any(writes for _, _, _, writes in parameters(aten.view.default))
    assert parameters(len) == ()


def test_states_and_sizes_of_arguments():
    call, nodes = seen(aten.mul.Tensor, "x", "y", states={"x": AT})
    assert (call.state(nodes["x"]), call.state(nodes["y"]).kind, call.state(2.0).kind) == (AT, "absent", "absent")
    assert (call.shape(nodes["y"]), call.shape(2.0)) == ((3,), ())
    assert (call.is_tensor(nodes["x"]), call.is_tensor(2.0)) == (True, False)
    call._shapes = {**call._shapes, nodes["y"]: None}
    assert not call.is_tensor(nodes["y"])
    with pytest.raises(MixedError, match="sizes of an argument are unknown"):
        call.shape(nodes["y"])


def test_carriers_are_the_values_that_hold_the_axis():
    call, nodes = seen(aten.cat.default, ["x", "y", "x"], states={"x": AT, "y": AxisState("mixed")})
    assert call.carriers() == call.carriers("tensors") == [nodes["x"]]
    assert call.carriers("dim") == []
    assert call.only("tensors") == [nodes["x"]]
    with pytest.raises(MixedError, match="no rule covers"):
        call.only("dim")


def test_a_value_given_twice_is_found_in_the_argument_that_no_rule_covers():
    call, nodes = seen(aten.mul.Tensor, "x", "x", states={"x": AT})
    assert call.only("self", "other") == [nodes["x"]]
    with pytest.raises(MixedError, match="no rule covers"):
        call.one()
    call, _ = seen(aten.mul.Tensor, "x", "y", states={"x": AT})
    assert call.one() == (AT, (2, 3))


@pytest.mark.parametrize(
    ("given", "rank", "expected"), [(-1, 3, [2]), ([0, -3], 3, [0, 0]), ((1,), 2, [1]), (0, 0, [0]), (-1, 0, [0])]
)
def test_dims_are_counted_from_the_front(given: Any, rank: int, expected: list[int]):
    call, _ = seen(aten.flip.default, "x", given, states={})
    assert call.dims("dims", rank) == expected


@pytest.mark.parametrize("given", [[], None, [0, "y"]])
def test_what_names_no_dims_is_refused(given: Any):
    call, _ = seen(aten.flip.default, "x", given, states={})
    with pytest.raises(MixedError, match="dims names no dims"):
        call.dims("dims", 3)


def test_carriers_have_to_agree():
    assert agree([(1, 2), (1, 2)]) == (1, 2)
    for found in ([(1, 2), (1, 3)], [(0, 1), (1, 1)], []):
        with pytest.raises(MixedError, match="in different dims"):
            agree(found)


def test_a_sum_of_products_keeps_the_labels_of_its_result():
    call, nodes = seen(aten.mm.default, "x", "y", states={"x": AxisState("at", 1, 3)})
    operands = [(nodes["x"], "ij"), (nodes["y"], "j")]
    assert contract(call, operands, "kj") == AxisState("at", 1, 3)
    with pytest.raises(MixedError, match="sums over the axis"):
        contract(call, operands, "ik")
    call, nodes = seen(aten.mm.default, "x", "y", states={"x": AT, "y": AT})
    with pytest.raises(MixedError, match="in different dims"):
        contract(call, [(nodes["x"], "ij"), (nodes["y"], "j")], "ij")
