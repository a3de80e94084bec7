"""When an adjoint path runs on a part of its indices, what it then reads, and why it may not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import fx

from lbi_compile.passes.index_chunks import Inseparable, Narrowed, narrowed
from lbi_compile.passes.jacobian_slices import cut
from tests.joint_graphs import Graph, value

aten = torch.ops.aten
B, T, R = 3, 2, 4
Build = Callable[[Graph, fx.Node], fx.Node]


def narrow(build: Build, lead: tuple[int, ...] = (B, T), *, dead: bool = False) -> Narrowed:
    """The path from ``lam`` ``[*lead, R]``, with a saved value ``[*lead, R]`` as ``build`` may ask for them."""
    g = Graph()
    lam = g.input("lam", *lead, R)
    end = build(g, lam)
    others = [n for n in g.graph.nodes if n.op == "placeholder" and n is not lam and str(n.target).startswith("dead")]
    path = [node for node in g.graph.nodes if node.op == "call_function"]
    piece = cut(g.done(end), path, live=[lam], dead=others, end=end)
    return narrowed(piece, piece.module)


def saved(g: Graph, *shape: int, name: str = "saved") -> fx.Node:
    with g.graph.inserting_before(next(iter(g.graph.nodes))):
        return g.input(name, *shape)


def reads(found: Narrowed) -> list[tuple[int, int]]:
    return [(operand.lead, operand.missing) for operand in found.operands]


def test_a_value_of_every_index_is_read_in_parts():
    found = narrow(lambda g, lam: g.call(aten.mul.Tensor, lam, saved(g, B, T, R)))
    assert (found.lead, found.head, found.zeros) == ((B, T), None, ())
    assert reads(found) == [(2, 0)]
    assert list(found.inputs.values()) == [0]
    assert found.shape(5, R) == (5, 1, R)
    (operand,) = found.operands
    whole = value(B, T, R)
    assert torch.equal(found.flat(operand, whole, 6), whole.view(6, R))
    assert found.shaped(operand, whole.view(6, R)[1:4], 3).shape == (3, 1, R)
    lam = value(2, 1, R)
    part = whole.view(6, R)[2:4]
    assert torch.equal(found.module(lam, found.shaped(operand, part, 2), 2), lam * part.view(2, 1, R))


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((R,), (0, 0)),  # the same for every index
        ((1, 1, R), (0, 0)),
        ((T, R), (2, 1)),
        ((1, R), (0, 0)),
        ((B, 1, R), (2, 0)),
        ((B, T, 1), (2, 0)),
        ((1, T, 1), (2, 0)),
    ],
)
def test_values_that_broadcast(shape: tuple[int, ...], expected: tuple[int, int]):
    found = narrow(lambda g, lam: g.call(aten.mul.Tensor, lam, saved(g, *shape)))
    assert reads(found) == [expected]
    (operand,) = found.operands
    whole, lam = value(*shape), value(B, T, R)
    if not operand.lead:
        assert found.shaped(operand, whole, 6) is whole
        assert torch.equal(found.module(lam.view(6, 1, R), whole, 6).view(B, T, R), lam * whole)
        return
    flat = found.flat(operand, whole, 6)
    assert flat.shape == (6, shape[-1])
    part = found.module(lam.view(6, 1, R)[1:5], found.shaped(operand, flat[1:5], 4), 4)
    assert torch.equal(part, (lam * whole).view(6, 1, R)[1:5])


def test_flattened_indices_are_one_axis():
    w = value(R, R)

    def build(g: Graph, lam: fx.Node) -> fx.Node:
        flat = g.call(aten.view.default, lam, [B * T, R])
        flat = g.call(aten.mul.Tensor, g.call(aten.mm.default, flat, g.constant("w", w)), saved(g, B * T, R))
        return g.call(aten.view.default, flat, [B, T, R])

    found = narrow(build)
    matrix, slope = found.operands
    assert sorted(reads(found)) == [(0, 0), (1, 0)]
    matrix, slope = (matrix, slope) if matrix.lead == 0 else (slope, matrix)
    lam, s = value(5, 1, R), value(B * T, R)
    assert torch.equal(found.flat(slope, s, 6), s)
    assert found.shaped(slope, s[:5], 5).shape == (5, R)
    given = {matrix: w, slope: s[:5]}
    result = found.module(lam, *[given[operand] for operand in found.operands], 5)
    torch.testing.assert_close(result, ((lam[:, 0] @ w) * s[:5]).view(5, 1, R), rtol=0, atol=1e-14)


def test_what_is_computed_elementwise_from_saved_values_is_computed_for_the_part():
    def build(g: Graph, lam: fx.Node) -> fx.Node:
        return g.call(aten.mul.Tensor, lam, g.call(aten.exp.default, saved(g, B, T, R)))

    found = narrow(build)
    assert found.head is None
    assert [operand.source.op for operand in found.operands] == ["placeholder"]
    s, lam = value(5, 1, R), value(5, 1, R)
    assert torch.equal(found.module(lam, s, 5), lam * s.exp())


def test_what_mixes_saved_values_is_computed_once_for_all():
    def build(g: Graph, lam: fx.Node) -> fx.Node:
        s, other = saved(g, B, T, R), saved(g, B, T, R, name="other")
        total = g.call(aten.cumsum.default, g.call(aten.mul.Tensor, s, 2.0), 0)
        return g.call(aten.mul.Tensor, g.call(aten.mul.Tensor, lam, total), other)

    found = narrow(build)
    assert found.head is not None
    assert len(found.inputs) == 2
    assert [operand.source.op for operand in found.operands].count("placeholder") == 1
    values = dict(zip(found.inputs, (value(B, T, R), value(B, T, R)), strict=True))
    (computed,) = found.head(*values.values())
    assert any(torch.allclose(computed, (2 * one).cumsum(0)) for one in values.values())


def test_what_broadcasts_over_indices_is_not_computed_for_the_part():
    """``exp`` of ``[T, R]`` is read whole as ``[B * T, R]``: it has no sizes of the indices to take a part of."""
    found = narrow(lambda g, lam: g.call(aten.mul.Tensor, lam, g.call(aten.exp.default, saved(g, T, R))))
    assert found.head is not None
    assert reads(found) == [(2, 1)]
    found = narrow(lambda g, lam: g.call(aten.mul.Tensor, lam, g.call(aten.exp.default, saved(g, B, 1, R))))
    assert found.head is not None


def test_adjoints_from_elsewhere_are_zeros_of_the_part():
    def build(g: Graph, lam: fx.Node) -> fx.Node:
        return g.call(aten.cat.default, [g.call(aten.slice.Tensor, lam, 2, 0, 2), saved(g, B, T, 2, name="dead")], -1)

    found = narrow(build)
    assert (found.operands, len(found.zeros)) == ((), 1)
    (zero,) = found.zero_cotangents(R, 5)
    assert zero.shape == (5, 1, 2)
    assert zero.data.shape == (R, 1, 1, 1)
    assert not zero.data.any()
    lam = value(5, 1, R)
    expected = torch.cat([lam[..., :2], torch.zeros(5, 1, 2)], -1)
    assert torch.equal(found.module(lam, zero.full()[0], 5), expected)


def test_a_value_is_passed_in_once_however_often_it_is_read():
    def build(g: Graph, lam: fx.Node) -> fx.Node:
        s = saved(g, B, T, R)
        return g.call(aten.mul.Tensor, g.call(aten.mul.Tensor, lam, s), s)

    assert reads(narrow(build)) == [(2, 0)]


REFUSED: dict[str, tuple[str, tuple[int, ...], Build]] = {
    "one index": ("there is one index", (1, 1), lambda g, lam: g.call(aten.neg.default, lam)),
    "indices that mix": ("the axis", (B, T), lambda g, lam: g.call(aten.cumsum.default, lam, 1)),
    "indices in other axes": (
        "holds the indices in other than its leading axes",
        (B, T),
        lambda g, lam: g.call(aten.permute.default, lam, [1, 0, 2]),
    ),
    "indices flattened in another order": (
        "holds the indices in other than its leading axes",
        (B, T),
        lambda g, lam: g.call(aten.reshape.default, g.call(aten.permute.default, lam, [1, 0, 2]), [B * T, R]),
    ),
    "numbers in front, as many as indices": (
        "holds the indices in other than its leading axes",
        (2, 2),
        lambda g, lam: g.call(aten.permute.default, lam, [2, 0, 1]),
    ),
    "a value in the shape of the whole": (
        "makes a value in the shape of the whole",
        (B, T),
        lambda g, lam: g.call(aten.new_ones.default, lam, [B, T, R]),
    ),
    "a path that ends elsewhere": (
        "ends in a value that does not depend on the adjoint",
        (B, T),
        lambda g, lam: (g.call(aten.neg.default, lam), g.call(aten.exp.default, saved(g, B, T, R)))[1],
    ),
    "an end of flattened indices": (
        "ends in a value that does not depend on the adjoint",
        (B, T),
        lambda g, lam: g.call(aten.view.default, lam, [B * T, R]),
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_taken_apart(name: str):
    why, lead, build = REFUSED[name]
    with pytest.raises(Inseparable, match=why):
        narrow(build, lead)


def test_values_in_the_shape_of_an_adjoint_are_made_for_the_part():
    def build(g: Graph, lam: fx.Node) -> fx.Node:
        return g.call(aten.add.Tensor, lam, g.call(aten.zeros_like.default, lam))

    found = narrow(build)
    lam = value(5, 1, R)
    assert torch.equal(found.module(lam, 5), lam)


def test_one_axis_of_indices_may_be_of_size_one():
    found = narrow(lambda g, lam: g.call(aten.mul.Tensor, lam, saved(g, B, 1, R)), (B, 1))
    assert found.shape(2, R) == (2, 1, R)
    assert reads(found) == [(2, 0)]


def test_shapes_of_the_part_are_noted():
    found = narrow(lambda g, lam: g.call(aten.mul.Tensor, lam, saved(g, B, T, R)))
    found.settle(value(5, 1, R), [value(5, 1, R)], 5)
    (product,) = [node for node in found.module.graph.nodes if node.op == "call_function"]
    assert product.meta["val"].shape == (5, 1, R)
    with pytest.raises(Inseparable, match="gives other shapes"):
        found.settle(value(5, 1, R), [value(5, 2, R)], 5)
