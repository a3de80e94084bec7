"""Static axis rules: what each says of a single call, and every proof against what results really depend on."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx

from lbi_compile.passes.axis_calls import AxisState
from tests.axis_checks import PROPERTY, check, module, single_call, trace
from tests.random_graphs import Builder, grow

aten = torch.ops.aten


def _check_random(data: st.DataObject) -> None:
    sizes = data.draw(st.sampled_from([(2, 3, 4), (3, 5, 2), (2, 2, 2), (4, 3), (3, 2, 2, 4), (6, 2, 3)]))
    check(*grow(sizes, data.draw(st.integers(1, 7)), lambda options: data.draw(st.sampled_from(list(options)))))


@given(st.data())
@settings(max_examples=100, **PROPERTY)
def test_static_proofs_hold_on_random_graphs(data: st.DataObject):
    _check_random(data)


@pytest.mark.slow
@given(st.data())
@settings(max_examples=1000, **PROPERTY)
def test_static_proofs_hold_on_many_random_graphs(data: st.DataObject):
    _check_random(data)


def _first_column_as_index(b: Builder, x: fx.Node) -> fx.Node | None:
    """Zero or one for each sample: ``[B]``."""
    column = b.call(aten.select.int, b.call(aten.select.int, x, 2, 0), 1, 0)
    return b.call(aten.to.dtype, b.call(aten.ge.Scalar, column, 1.0), torch.int64)


# One call on x [2, 3, 4]. Where the result holds each axis of x: a dim, "dim/stride", "-" for mixed, "a" for absent.
CALLS: dict[str, tuple[str, Callable[[Builder, fx.Node], fx.Node | None]]] = {
    "relu": ("0 1 2", lambda b, x: b.call(aten.relu.default, x)),
    "hardswish": ("0 1 2", lambda b, x: b.call(aten.hardswish.default, x)),
    "multiply": ("0 1 2", lambda b, x: b.call(aten.multiply.Tensor, x, b.constant(4))),
    "fill": ("0 1 2", lambda b, x: b.call(aten.fill.Scalar, x, 2.0)),
    "add, broadcast": ("1 2 3", lambda b, x: b.call(aten.add.Tensor, x, b.constant(5, 2, 1, 4))),
    "add, crossed": (
        "0 - 3",
        lambda b, x: b.call(
            aten.add.Tensor, b.call(aten.unsqueeze.default, x, 1), b.call(aten.unsqueeze.default, x, 2)
        ),
    ),
    "where": ("0 1 2", lambda b, x: b.call(aten.where.self, b.call(aten.gt.Scalar, x, 1.0), x, x)),
    "maximum of two": ("0 1 2", lambda b, x: b.call(aten.max.other, x, x)),
    "maximum of all": ("- - -", lambda b, x: b.call(aten.max.default, x)),
    "masked_fill": ("0 1 2", lambda b, x: b.call(aten.masked_fill.Scalar, x, b.call(aten.gt.Scalar, x, 1.0), 0.0)),
    "prelu": ("0 1 2", lambda b, x: b.call(aten.prelu.default, x, b.constant(3))),
    "dropout": ("0 1 2", lambda b, x: b.call(aten.dropout.default, x, 0.5, True)),
    "tril": ("0 1 2", lambda b, x: b.call(aten.tril.default, x)),
    "to": ("0 1 2", lambda b, x: b.call(aten.to.dtype, x, torch.float32)),
    "type_as": ("a a a", lambda b, x: b.call(aten.type_as.default, b.constant(2), x)),
    "copy in place": ("1 2 3", lambda b, x: b.call(aten.copy_.default, b.constant(5, 2, 3, 4), x)),
    "zeros_like": ("a a a", lambda b, x: b.call(aten.zeros_like.default, x)),
    "full_like": ("a a a", lambda b, x: b.call(aten.full_like.default, x, 2.0)),
    "full_like of an item": (
        "- - -",
        lambda b, x: b.call(aten.full_like.default, x, b.call(aten.item.default, b.call(aten.sum.default, x))),
    ),
    "item": ("- - -", lambda b, x: b.call(aten.item.default, b.call(aten.sum.default, x))),
    "linear": ("0 1 -", lambda b, x: b.call(aten.linear.default, x, b.constant(5, 4), b.constant(5))),
    "linear with x as its weight": (
        "- 1 -",
        lambda b, x: b.call(aten.linear.default, b.constant(6, 4), b.call(aten.select.int, x, 0, 1)),
    ),
    "addmm of a flattened batch": (
        "0/3 0 -",
        lambda b, x: b.call(aten.addmm.default, b.constant(5), b.call(aten.view.default, x, [6, 4]), b.constant(4, 5)),
    ),
    "matmul": ("1 2 -", lambda b, x: b.call(aten.matmul.default, x, b.constant(5, 2, 4, 6))),
    "matmul from the left": ("0 - 2", lambda b, x: b.call(aten.matmul.default, b.constant(5, 3), x)),
    "matmul with a vector": ("0 1 -", lambda b, x: b.call(aten.matmul.default, x, b.constant(4))),
    "bmm with itself": ("0 - -", lambda b, x: b.call(aten.bmm.default, x, b.call(aten.transpose.int, x, 1, 2))),
    "einsum": ("2 0 -", lambda b, x: b.call(aten.einsum.default, "btd,de->teb", [x, b.constant(4, 5)])),
    "einsum, ellipsis": ("0 1 -", lambda b, x: b.call(aten.einsum.default, "...d,d->...", [x, b.constant(4)])),
    "einsum, no arrow": ("- - -", lambda b, x: b.call(aten.einsum.default, "btd", [x])),
    "embedding": (
        "0 1 2",
        lambda b, x: b.call(
            aten.embedding.default, b.constant(9, 5), b.call(aten.to.dtype, b.call(aten.abs.default, x), torch.int64)
        ),
    ),
    "attention over itself": (
        "0 - -",
        lambda b, x: b.call(aten.scaled_dot_product_attention.default, x, x, x),
    ),
    "attention to constants": (
        "0 1 -",
        lambda b, x: b.call(aten.scaled_dot_product_attention.default, x, b.constant(2, 5, 4), b.constant(2, 5, 6)),
    ),
    "attention with grouped queries": (
        "0 - -",
        lambda b, x: b.call(
            aten.scaled_dot_product_attention.default,
            b.constant(2, 6, 5, 4),
            b.call(aten.unsqueeze.default, x, 2),
            b.call(aten.unsqueeze.default, x, 2),
            enable_gqa=True,
        ),
    ),
    "layer_norm": ("0 1 -", lambda b, x: b.call(aten.layer_norm.default, x, [4], b.constant(4), b.constant(4))),
    "rms_norm of two dims": ("0 - -", lambda b, x: b.call(aten.rms_norm.default, x, [3, 4])),
    "group_norm": ("0 - -", lambda b, x: b.call(aten.group_norm.default, x, 3)),
    "instance_norm": (
        "0 1 -",
        lambda b, x: b.call(aten.instance_norm.default, x, None, None, None, None, True, 0.1, 1e-5, False),
    ),
    "batch_norm, training": (
        "- 1 -",
        lambda b, x: b.call(aten.batch_norm.default, x, None, None, None, None, True, 0.1, 1e-5, False),
    ),
    "batch_norm, evaluation": (
        "0 1 2",
        lambda b, x: b.call(
            aten.batch_norm.default, x, None, None, b.constant(3), b.constant(3), False, 0.1, 1e-5, False
        ),
    ),
    "softmax": ("0 - 2", lambda b, x: b.call(aten.softmax.int, x, -2)),
    "cumsum": ("0 - 2", lambda b, x: b.call(aten.cumsum.default, x, 1)),
    "topk": ("- 1 2", lambda b, x: b.item(b.call(aten.topk.default, x, 1, 0), 0)),
    "sort": ("0 1 -", lambda b, x: b.item(b.call(aten.sort.default, x), 0)),
    "mean": ("0 - 1", lambda b, x: b.call(aten.mean.dim, x, [1])),
    "mean, kept": ("0 - 2", lambda b, x: b.call(aten.mean.dim, x, [-2], True)),
    "sum of all": ("- - -", lambda b, x: b.call(aten.sum.default, x)),
    "max over a dim": ("- 0 1", lambda b, x: b.item(b.call(aten.max.dim, x, 0), 0)),
    "var": ("0 - -", lambda b, x: b.call(aten.var.correction, x, [1, 2], correction=0)),
    "conv1d": ("0 - -", lambda b, x: b.call(aten.conv1d.default, x, b.constant(5, 3, 3), None, [1], [1])),
    "conv1d, pointwise": ("0 - 2", lambda b, x: b.call(aten.conv1d.default, x, b.constant(5, 3, 1))),
    "conv1d, strided": ("0 - -", lambda b, x: b.call(aten.conv1d.default, x, b.constant(5, 3, 1), None, [3])),
    "conv1d, same": ("0 - 2", lambda b, x: b.call(aten.conv1d.padding, x, b.constant(5, 3, 1), None, [1], "same")),
    "conv1d, same, wide": (
        "0 - -",
        lambda b, x: b.call(aten.conv1d.padding, x, b.constant(5, 3, 3), None, [1], "same"),
    ),
    "conv_transpose1d, strided": (
        "0 - -",
        lambda b, x: b.call(aten.conv_transpose1d.default, x, b.constant(3, 5, 1), None, [2], [0], [1], 1, [2]),
    ),
    "conv1d without a batch": ("- - -", lambda b, x: b.call(aten.conv2d.default, x, b.constant(5, 2, 2, 2))),
    "conv1d, x as its own kernel": ("- - -", lambda b, x: b.call(aten.conv1d.default, x, x)),
    "conv1d of a constant": ("- - -", lambda b, x: b.call(aten.conv1d.default, b.constant(5, 3, 6), x)),
    "avg_pool1d": ("0 1 -", lambda b, x: b.call(aten.avg_pool1d.default, x, [2])),
    "upsample": ("0 1 -", lambda b, x: b.call(aten.upsample_nearest1d.default, x, [8])),
    "gru_cell": (
        "0 -",
        lambda b, x: b.call(
            aten.gru_cell.default,
            b.call(aten.select.int, x, 2, 0),
            b.constant(2, 6),
            b.constant(18, 3),
            b.constant(18, 6),
        ),
    ),
    "flatten, unflatten": (
        "0 1 2",
        lambda b, x: b.call(aten.view.default, b.call(aten.flatten.using_ints, x, 0, 1), [2, 3, 4]),
    ),
    "flatten all": ("0/12 0/4 0", lambda b, x: b.call(aten.flatten.using_ints, x)),
    "view across": ("- - 1", lambda b, x: b.call(aten.view.default, x, [3, 8])),
    "view that splits a dim": ("0 1 -", lambda b, x: b.call(aten.view.default, x, [2, 3, 2, 2])),
    "view as another type": ("- - -", lambda b, x: b.call(aten.view.dtype, x, torch.float32)),
    "unsqueeze": ("0 2 3", lambda b, x: b.call(aten.unsqueeze.default, x, 1)),
    "transpose": ("2 1 0", lambda b, x: b.call(aten.transpose.int, x, 0, -1)),
    "permute": ("1 2 0", lambda b, x: b.call(aten.permute.default, x, [2, 0, 1])),
    "movedim": ("2 0 1", lambda b, x: b.call(aten.movedim.int, x, 0, 2)),
    "t": ("1 0", lambda b, x: b.call(aten.t.default, b.call(aten.select.int, x, 2, 0))),
    "mT": ("0 2 1", lambda b, x: b.call(aten.mT.default, x)),
    "expand": ("1 2 3", lambda b, x: b.call(aten.expand.default, x, [5, -1, -1, -1])),
    "expand_as": ("a a a", lambda b, x: b.call(aten.expand_as.default, b.constant(4), x)),
    "repeat": ("1 2 3", lambda b, x: b.call(aten.repeat.default, x, [2, 1, 3, 1])),
    "repeat_interleave": ("0 1/2 2", lambda b, x: b.call(aten.repeat_interleave.self_int, x, 2, 1)),
    "repeat_interleave of all": ("- - -", lambda b, x: b.call(aten.repeat_interleave.self_int, x, 2)),
    "slice": ("0 - 2", lambda b, x: b.call(aten.slice.Tensor, x, 1, 1, 3)),
    "slice of all": ("0 1 2", lambda b, x: b.call(aten.slice.Tensor, x, 1, 0, 2**62)),
    "nothing left": (
        "a a a",
        lambda b, x: b.call(aten.view.default, b.call(aten.slice.Tensor, x, 1, 0, 0), [0, 7]),
    ),
    "select": ("0 - 1", lambda b, x: b.call(aten.select.int, x, 1, -1)),
    "unbind": ("- 0 1", lambda b, x: b.item(b.call(aten.unbind.int, x), 1)),
    "split": ("0 1 -", lambda b, x: b.item(b.call(aten.split.Tensor, x, 2, -1), 1)),
    "chunk": ("0 1 -", lambda b, x: b.item(b.call(aten.chunk.default, x, 2, 2), 0)),
    "index_select": ("0 - 2", lambda b, x: b.call(aten.index_select.default, x, 1, b.constant(7, high=3))),
    "index_select by an index from x": (
        "- - -",
        lambda b, x: b.call(aten.index_select.default, x, 1, _first_column_as_index(b, x)),
    ),
    "flip": ("0 - 2", lambda b, x: b.call(aten.flip.default, x, [1])),
    "roll": ("0 - 2", lambda b, x: b.call(aten.roll.default, x, [1], [1])),
    "roll of all": ("- - -", lambda b, x: b.call(aten.roll.default, x, [1])),
    "unfold": ("0 - 2", lambda b, x: b.call(aten.unfold.default, x, 1, 2, 1)),
    "cat": ("0 - 2", lambda b, x: b.call(aten.cat.default, [x, b.constant(2, 1, 4)], 1)),
    "cat of different axes": (
        "- - 1",
        lambda b, x: b.call(
            aten.cat.default, [b.call(aten.flatten.using_ints, x, 0, 1), b.call(aten.select.int, x, 0, 0)]
        ),
    ),
    "stack": ("0 2 3", lambda b, x: b.call(aten.stack.default, [x, b.constant(2, 3, 4)], 1)),
    "pad, replicate": ("0 1 -", lambda b, x: b.call(aten.pad.default, x, [0, 4], "replicate")),
    "pad": ("0 - 2", lambda b, x: b.call(aten.constant_pad_nd.default, x, [0, 0, 1, -1])),
    "gather": ("0 - 2", lambda b, x: b.call(aten.gather.default, x, 1, b.constant(2, 3, 4, high=3))),
    "gather of a part": ("- - 2", lambda b, x: b.call(aten.gather.default, x, 1, b.constant(1, 3, 4, high=3))),
    "scatter_add": (
        "0 - 2",
        lambda b, x: b.call(aten.scatter_add.default, x, 1, b.constant(2, 3, 4, high=3), b.constant(2, 3, 4)),
    ),
    "index": ("0 - 3", lambda b, x: b.call(aten.index.Tensor, x, [None, b.constant(5, 6, high=3)])),
    "index, apart": (
        "- 1 -",
        lambda b, x: b.call(aten.index.Tensor, x, [b.constant(5, high=2), None, b.constant(5, high=4)]),
    ),
    "index, apart and not in front": (
        "1 - 2",
        lambda b, x: b.call(
            aten.index.Tensor,
            b.call(aten.unsqueeze.default, x, 3),
            [None, b.constant(5, high=3), None, b.constant(5, high=1)],
        ),
    ),
    "index by a mask": (
        "- - -",
        lambda b, x: b.call(aten.index.Tensor, x, [b.call(aten.gt.Scalar, b.constant(2), 0.0)]),
    ),
    "view_as_complex": (
        "0 1/2 -",
        lambda b, x: b.call(aten.view_as_complex.default, b.call(aten.view.default, x, [2, 6, 2])),
    ),
    "no rule": ("- - -", lambda b, x: b.call(aten.cov.default, b.call(aten.select.int, x, 0, 0))),
    "relu in place": ("0 1 2", lambda b, x: b.call(aten.relu_.default, b.call(aten.mul.Tensor, x, 2.0))),
}


@pytest.mark.parametrize("name", CALLS)
def test_rules_of_single_calls(name: str):
    expected, call = CALLS[name]
    build, node, found = single_call(call)
    assert [state.replace("!", "-") for state in found][: len(expected.split())] == expected.split()
    gm = module(build, node)
    if isinstance(build.values[node], Tensor):
        check(gm, build)


def test_names_the_first_operator_without_a_rule():
    build = Builder((2, 3, 4))
    strange = build.call(aten.cummax.default, build.call(aten.diagonal.default, build.source, 0, 1, 2), 0)
    assert strange is not None
    state = trace(build, 0)[strange]
    assert state.kind == "mixed"
    assert state.node is strange.args[0]
    assert state.why == "aten.diagonal: no rule covers it"


def test_an_axis_of_size_one_cannot_be_followed():
    build = Builder((2, 1))
    node = build.call(aten.relu.default, build.source)
    assert node is not None
    assert trace(build, 1)[node].kind == "mixed"
    assert trace(build, -2)[node] == AxisState("at", dim=0)


def test_random_draws_before_the_source_do_not_carry_it():
    build = Builder((2, 3))
    noise = build.call(aten.rand_like.default, build.source)
    out = build.call(aten.matmul.default, noise, build.constant(3, 3))
    assert trace(build, 0)[out].kind == "absent"  # type: ignore[index]
