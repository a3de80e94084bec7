"""Jacobians put into the forward of joint graphs written by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx

import lbi_compile.kernels.pins  # noqa: F401  registers the operators
from lbi_compile.errors import EngineError
from lbi_compile.passes.forward_jacobians import forward_jacobians
from lbi_compile.passes.scan_backward import ScanRecord
from tests.joint_graphs import Graph, value

aten, lbi = torch.ops.aten, torch.ops.lbi
B, R = 3, 4


def region(g: Graph, k: int, m: fx.Node, tangent: fx.Node, *, chain: int = -1, to: bool = True) -> list[fx.Node]:
    """Region k, ``tanh``, between its markers: what it gives, its Jacobian's place and the adjoint of ``m``."""
    before = g.call(lbi.boundary.default, m, 2 * k, chain)
    tanh = g.call(aten.tanh.default, before)
    after = g.call(lbi.boundary.default, tanh, 2 * k + 1, chain)
    slot = g.graph.call_function(lbi.jacobian.default, (after, before, k, chain))
    slot.meta["val"] = after.meta["val"].new_empty(*m.meta["val"].shape, R)
    for node in (before, tanh, after, slot):
        node.meta["partitioner_tag"] = "is_forward"
    # AOTAutograd computes the slope in the backward
    adjoint = g.call(lbi.boundary_bwd.default, tangent, 2 * k + 1, chain)
    slope = g.call(aten.rsub.Scalar, g.call(aten.mul.Tensor, tanh, tanh), 1.0)
    adjoint = g.call(aten.mul.Tensor, adjoint, slope)
    if to:
        adjoint = g.call(lbi.boundary_bwd.default, adjoint, 2 * k, chain)
    return [after, slot, adjoint]


def test_a_jacobian_takes_its_place_and_gradients_go():
    g = Graph(fake=True)
    m, n, tangent = (g.input(name, B, R) for name in ("m", "n", "tangents_1"))
    after, slot, adjoint = region(g, 1, m, tangent)
    other, second, back = region(g, 2, n, tangent)
    gm, record = g.done(after, slot, other, second, adjoint, back), ScanRecord()
    assert forward_jacobians(gm, record=record, forward_outputs=4) is gm
    assert (record.status, record.jacobians, record.error) == ("forward", 2, None)
    assert record.why == "Jacobians of 2 regions in the forward"
    assert record.inserted > 0
    x, y = value(B, R), value(B, R)
    found = gm(x, y, None)
    for out, J, given in ((*found[:2], x), (*found[2:4], y)):
        assert torch.equal(out, given.tanh())
        torch.testing.assert_close(J, torch.diag_embed(1 - given.tanh() ** 2), rtol=0, atol=1e-15)
    assert found[4:] == (None, None)
    for node in gm.graph.nodes:
        assert not str(node.target).startswith("lbi")
        # all of it is of the forward, and inputs are of neither
        if node.op in ("call_function", "placeholder"):
            assert node.meta.get("partitioner_tag") == ("is_forward" if node.op == "call_function" else None)


def test_an_index_that_all_share_is_spread_over_all():
    g = Graph(fake=True)
    m, tangent = g.input("m", 2, B, R), g.input("tangents_1", 2, B, R)
    before = g.call(lbi.boundary.default, m, 2, 0)
    after = g.call(lbi.boundary.default, g.call(aten.mul.Tensor, before, 3.0), 3, 0)
    slot = g.graph.call_function(lbi.jacobian.default, (after, before, 1, 0))
    slot.meta["val"] = after.meta["val"].new_empty(2, B, R, R)
    adjoint = g.call(aten.mul.Tensor, g.call(lbi.boundary_bwd.default, tangent, 3, 0), 3.0)
    gm = g.done(after, slot, g.call(lbi.boundary_bwd.default, adjoint, 2, 0))
    forward_jacobians(gm, record=ScanRecord(), forward_outputs=2)
    _, J, _ = gm(value(2, B, R), None)
    assert torch.equal(J, 3 * torch.eye(R).double().expand(2, B, R, R))


@pytest.mark.parametrize("missing", ["the latent before", "the chain"])
def test_a_region_whose_latents_do_not_meet_has_zeros(missing: str):
    g = Graph(fake=True)
    m, tangent = g.input("m", B, R), g.input("tangents_1", B, R)
    after, slot, adjoint = region(g, 1, m, tangent, to=missing != "the latent before")
    if missing == "the chain":
        slot.update_arg(3, 7)
    gm, record = g.done(after, slot, adjoint), ScanRecord()
    forward_jacobians(gm, record=record, forward_outputs=2)
    _, J, _ = gm(value(B, R), None)
    assert record.jacobians == 1
    assert torch.equal(J, torch.zeros(B, R, R).double())


def test_operators_that_ran_once_per_cotangent_are_told():
    g = Graph(fake=True)
    m, tangent = g.input("m", 1, R), g.input("tangents_1", 1, R)
    before = g.call(lbi.boundary.default, m, 2, 0)
    after = g.call(lbi.boundary.default, g.call(aten.neg.default, before), 3, 0)
    slot = g.graph.call_function(lbi.jacobian.default, (after, before, 1, 0))
    slot.meta["val"] = after.meta["val"].new_empty(1, R, R)
    total = g.call(
        aten.view.default, g.call(aten.sum.dim_IntList, g.call(lbi.boundary_bwd.default, tangent, 3, 0), [0, 1]), [1]
    )
    zeros = g.call(aten.full.default, [1, R], 0.0, dtype=torch.double)
    at = g.constant("at", torch.tensor([0, 2]))
    # values that broadcast over the indices have no batching rule
    adjoint = g.call(aten._unsafe_index_put.default, zeros, [None, at], total, True)
    gm, record = g.done(after, slot, g.call(lbi.boundary_bwd.default, adjoint, 2, 0)), ScanRecord()
    forward_jacobians(gm, record=record, forward_outputs=2)
    assert set(record.unrolled) == {"aten._unsafe_index_put.default"}
    _, J, _ = gm(value(1, R), None)
    assert torch.equal(J, torch.tensor([1.0, 0, 1, 0]).double().expand(1, R, R))


def test_latents_of_two_shapes_are_refused_and_told():
    g = Graph(fake=True)
    m, tangent = g.input("m", B, R), g.input("tangents_1", B, R)
    before = g.call(lbi.boundary.default, m, 2, 0)
    after = g.call(lbi.boundary.default, g.call(aten.tanh.default, before), 3, 0)
    slot = g.graph.call_function(lbi.jacobian.default, (after, before, 1, 0))
    slot.meta["val"] = value(B, R, R)
    adjoint = g.call(aten.slice.Tensor, g.call(lbi.boundary_bwd.default, tangent, 3, 0), 1, 0, 2)
    gm, record = g.done(after, slot, g.call(lbi.boundary_bwd.default, adjoint, 2, 0)), ScanRecord()
    with pytest.raises(EngineError, match="latents of shapes") as caught:
        forward_jacobians(gm, record=record, forward_outputs=2)
    assert (record.status, record.error, record.jacobians) == ("failed", caught.value, 0)


def test_a_graph_without_jacobians_keeps_its_gradients():
    g = Graph()
    m, tangent = g.input("m", B, R), g.input("tangents_1", B, R)
    after = g.call(lbi.boundary.default, m, 2, 0)
    gm, record = g.done(after, g.call(lbi.boundary_bwd.default, tangent, 2, 0)), ScanRecord()
    forward_jacobians(gm, record=record, forward_outputs=1)
    x, lam = value(B, R), value(B, R)
    found: tuple[Tensor, ...] = gm(x, lam)
    assert (record.status, record.jacobians) == ("forward", 0)
    assert torch.equal(found[0], x)
    assert torch.equal(found[1], lam)
