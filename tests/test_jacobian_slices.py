"""Pieces cut out of a backward graph: what they read, what they leave out, and when two of them are alike."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lbi_compile.errors import EngineError
from lbi_compile.passes.jacobian_slices import cut, downstream, simplify, upstream
from tests.joint_graphs import Graph, value

aten = torch.ops.aten


def test_closures_stop_where_they_are_told():
    g = Graph()
    a = g.input("a", 2)
    b, c = g.call(aten.neg.default, a), g.call(aten.neg.default, a)
    d = g.call(aten.neg.default, b)
    e = g.call(aten.add.Tensor, d, c)
    assert downstream([a]) == {b, c, d, e}
    assert downstream([a], stop={d}) == {b, c, e}
    assert upstream([e]) == {a, b, c, d}
    assert upstream([e], stop={b, c}) == {d}


def test_a_slice_reads_other_adjoints_as_zero():
    g = Graph()
    lam, other, saved = g.input("lam", 2, 4), g.input("other", 2, 4), g.input("saved", 2, 4)
    a = g.call(aten.mul.Tensor, lam, saved)
    b = g.call(aten.add.Tensor, a, other)  # the sum disappears
    c = g.call(aten.cat.default, [b, other], -1)  # here zeros are needed
    piece = cut(g.done(c), [a, b, c], live=[lam], dead=[other], end=c)
    assert piece.constants == (saved,)
    assert piece.zeros == (other,)
    assert [n.target for n in piece.module.graph.nodes if n.op == "call_function"] == [
        aten.mul.Tensor,
        aten.cat.default,
    ]
    x, s = value(2, 4), value(2, 4)
    (zero,) = piece.zero_values()
    assert torch.equal(piece.module(x, s, zero), torch.cat([x * s, torch.zeros(2, 4)], -1))


@pytest.mark.parametrize("wide", [(2, 4), (3, 2, 4)])
def test_a_sum_that_broadcasts_stays(wide: tuple[int, ...]):
    g = Graph()
    lam, other = g.input("lam", 2, 4), g.input("other", *wide)
    total = g.call(aten.add.Tensor, lam, other)
    piece = cut(g.done(total), [total], live=[lam], dead=[other], end=total)
    x = value(2, 4)
    assert torch.equal(piece.module(x, *piece.zero_values()), x.expand(wide))
    assert len(piece.zeros) == (wide != (2, 4))


def test_gradients_that_nobody_reads_are_not_computed():
    g = Graph()
    lam, x, w = g.input("lam", 2, 3, 4, 4), g.input("x", 2, 2, 4, 4), g.input("w", 3, 2, 1, 1)
    mask = [True, True, True]
    place = ([3], [1, 1], [0, 0], [1, 1], False, [0, 0], 1)
    node = g.call(aten.convolution_backward.default, lam, x, w, *place, mask)
    first = g.graph.call_function(lambda pair, i: pair[i], (node, 0))
    first.meta["val"] = node.meta["val"][0]
    piece = cut(g.done(first), [node, first], live=[lam], dead=[], end=first)
    (copy,) = piece.module.graph.find_nodes(op="call_function", target=aten.convolution_backward.default)
    assert copy.args[-1] == [True, False, False]
    assert mask == [True, True, True]
    assert node.args[-1] == [True, True, True]


def test_higher_order_operators_are_refused():
    g = Graph()
    g.root.body = nn.Identity()
    lam = g.input("lam", 2)
    body = g.graph.get_attr("body")
    node = g.graph.call_function(aten.neg.default, (lam, body))
    node.meta["val"] = value(2)
    with pytest.raises(EngineError, match="a higher-order operator"):
        cut(g.done(node), [node], live=[lam], dead=[], end=node)


def test_backward_operators_are_decomposed():
    g = Graph()
    lam, saved = g.input("lam", 2, 4), g.input("saved", 2, 4)
    a = g.call(aten.gelu_backward.default, lam, saved)
    piece = cut(g.done(a), [a], live=[lam], dead=[], end=a)
    simple = simplify(piece, [lam.meta["val"]])
    assert not [n for n in simple.graph.nodes if "backward" in str(n.target)]
    x, s = value(2, 4), value(2, 4)
    torch.testing.assert_close(simple(x, s), piece.module(x, s))


def two(second: str) -> list[Any]:
    """Signatures of a piece and of another one that differs from it as ``second`` says."""
    signatures = []
    for how in ("", second):
        g = Graph()
        lam, saved = g.input("lam", 2, 4), g.input("saved", 2, 3 if how == "shape" else 4)
        if how == "dtype":
            saved.meta["val"] = saved.meta["val"].float()
        target = aten.sub.Tensor if how == "operator" else aten.mul.Tensor
        args = (saved, lam) if how == "order" else (lam, saved)
        if how == "number":
            args = (lam, 2.0)
        if how == "shape":
            args = (lam, g.call(aten.sum.dim_IntList, saved, [1], True))
        if how == "constant":
            g.root.constant = value(4)
            args = (lam, g.graph.get_attr("constant"))
            args[1].meta["val"] = g.root.constant
            node = g.graph.call_function(target, args)
            node.meta["val"] = value(2, 4)
        else:
            node = g.call(target, *args)
        piece = cut(g.done(node), [node], live=[lam], dead=[], end=node)
        signatures.append(piece.signature())
    return signatures


def test_pieces_that_trace_alike_have_one_signature():
    first, second = two("")
    assert first == second


@pytest.mark.parametrize("change", ["shape", "dtype", "operator", "order", "number"])
def test_other_pieces_have_another_signature(change: str):
    first, second = two(change)
    assert first != second


def test_a_piece_with_a_constant_of_its_own_has_no_signature():
    assert two("constant")[1] is None
