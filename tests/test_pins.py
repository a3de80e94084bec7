"""A latent pinned to a value solved for: the value, the latent's gradient, and refusals."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lbi_compile.errors import EngineError, ScanShapeError
from lbi_compile.kernels.pins import jacobian, pinned

SHAPE = (3, 4)


def latent(*, value: float | None = None) -> Tensor:
    m = torch.randn(SHAPE, dtype=torch.double) if value is None else torch.full(SHAPE, value).double()
    return m.requires_grad_()


def test_the_value_with_the_gradient_of_the_latent():
    m, value = latent(), latent()
    out = pinned(m, value)
    assert torch.equal(out, value)
    assert out.data_ptr() != value.data_ptr()
    cotangent = torch.randn(SHAPE).double()
    found = torch.autograd.grad(out, (m, value), cotangent, allow_unused=True)
    assert torch.equal(found[0], cotangent)
    assert found[1] is None


def test_a_value_is_brought_to_dtype_and_layout_of_the_latent():
    value = torch.randn(4, 3).mT
    out = pinned(latent(), value)
    assert out.dtype == torch.float64
    assert out.is_contiguous()
    assert torch.equal(out, value.double())
    same = torch.randn(4, 3).double().mT
    assert pinned(torch.zeros(SHAPE).double(), same).is_contiguous()


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_under_transforms_too_and_whatever_the_latent_is(bad: float):
    value = torch.randn(SHAPE).double()
    for m in (latent().detach(), torch.full(SHAPE, bad).double()):
        out, pull = torch.func.vjp(lambda m: pinned(m, value), m)
        assert torch.equal(out, value) or torch.allclose(out, value, rtol=0, atol=1e-15)
        if m.isfinite().all():
            assert torch.equal(pull(torch.full_like(out, 3.0))[0], torch.full_like(out, 3.0))
    rows = torch.vmap(pinned)(latent().detach(), value)
    torch.testing.assert_close(rows, value, rtol=0, atol=1e-15)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # torch's own, at first use
def test_forward_derivatives_are_those_of_the_latent():
    value, tangent = torch.randn(SHAPE).double(), torch.randn(SHAPE).double()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(latent().detach(), tangent)
        out = torch.autograd.forward_ad.unpack_dual(pinned(dual, value))
    assert torch.equal(out.tangent, tangent)
    assert torch.equal(out.primal, value)


@pytest.mark.parametrize("shape", [(3, 5), (4, 4), (1, 3, 4), (4,), (1, 4)])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_shapes_have_to_be_one(shape: tuple[int, ...], device: str):
    with pytest.raises(ScanShapeError, match="for it"):
        pinned(torch.zeros(SHAPE, device=device), torch.zeros(shape, device=device))


def test_devices_have_to_be_one():
    with pytest.raises(ScanShapeError, match="a latent on meta and a value for it on cpu"):
        pinned(torch.zeros(SHAPE, device="meta"), torch.zeros(SHAPE))


def test_the_place_of_a_jacobian_has_a_shape_and_no_value():
    after, before = torch.zeros(3, 4, device="meta"), torch.zeros(3, 4, device="meta")
    assert jacobian(after, before, 2, -1).shape == (3, 4, 4)
    with pytest.raises(EngineError, match="the Jacobian of region 2"):
        jacobian(torch.zeros(3, 4, requires_grad=True), torch.zeros(3, 4), 2, -1)
