"""The Triton form on a CUDA device, through the operators; needs torch, triton and pytest only."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
pytest.importorskip("triton")

from lbi_compile.kernels import ops, reference, suffix_scan  # noqa: E402  after the check for triton
from tests.scan_oracle import (  # noqa: E402
    K_SIZES,
    N_SIZES,
    R_SIZES,
    prefix_definition,
    problem,
    relative_error,
    suffix_definition,
)

SCANS = [
    pytest.param(ops.suffix_scan, reference.suffix_scan, suffix_definition, id="suffix"),
    pytest.param(ops.prefix_scan, reference.prefix_scan, prefix_definition, id="prefix"),
]


def on_device(*inputs: Tensor | None) -> list[Tensor | None]:
    """Copies on the device with the strides they have here."""
    return [x if x is None else x.to("cuda") for x in inputs]


@pytest.mark.parametrize("name", ["suffix_scan", "prefix_scan"])
def test_cuda_tensors_reach_the_triton_form(name, monkeypatch):
    calls = []
    monkeypatch.setattr(suffix_scan, name, lambda *args: calls.append(args) or args[1].new_zeros(4, 2, 4))
    getattr(ops, name)(*on_device(*problem(3, 2, 4)))
    assert len(calls) == 1


@pytest.mark.parametrize(("scan", "twin", "definition"), SCANS)
class TestOnDevice:
    @pytest.mark.parametrize("R", R_SIZES)
    @pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
    def test_is_the_definition(self, scan, twin, definition, R, dtype, bound):
        for K, N, with_b in product(K_SIZES, N_SIZES, (True, False)):
            args = problem(K, N, R, dtype=dtype, b=with_b)
            got = scan(*on_device(*args))
            assert got.dtype == dtype
            assert got.is_contiguous()
            assert relative_error(got, definition(*args)) < bound, (K, N, with_b)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_low_precision_rounds_only_its_output(self, scan, twin, definition, dtype):
        for K, N, R in product((5, 37), (3, 17), (3, 16, 33)):
            args = problem(K, N, R, dtype=dtype)
            got, exact = scan(*on_device(*args)).double().cpu(), definition(*args)
            slack = 1e-5 * exact.abs().amax((1, 2), keepdim=True)
            assert ((got - exact).abs() <= torch.finfo(dtype).eps / 2 * exact.abs() + slack).all(), (K, N, R)

    @pytest.mark.parametrize("R", [3, 16, 17])
    def test_strided_inputs(self, scan, twin, definition, R):
        J, end, b = problem(5, 6, R)
        assert b is not None
        Jd, endd, bd = (x.cuda() for x in (J, end, b))
        for name, args, here in (
            ("transposed J", (Jd.mT.contiguous().mT, endd, bd), (J, end, b)),
            ("sliced", (Jd[::2, 1::2], endd[1::2], bd[::2, 1::2]), (J[::2, 1::2], end[1::2], b[::2, 1::2])),
            ("steps innermost", (Jd.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2), endd, bd), (J, end, b)),
            ("one J for all", (Jd[:, :1].expand(5, 6, R, R), endd, bd), (J[:, :1].expand(5, 6, R, R), end, b)),
            ("transposed end", (Jd, endd.T.contiguous().T, bd), (J, end, b)),
        ):
            assert relative_error(scan(*args), definition(*here)) < 1e-13, name

    def test_gradient(self, scan, twin, definition):
        for K, N, R in product((1, 5, 37), (1, 17), (3, 16, 33)):
            here = [x.requires_grad_() for x in problem(K, N, R) if x is not None]
            there = [x.detach().cuda().requires_grad_() for x in here]
            out, expected = scan(*there), twin(*here)
            weight = torch.randn_like(expected)
            grads = torch.autograd.grad(expected, here, weight)
            for a, c in zip(torch.autograd.grad(out, there, weight.cuda()), grads, strict=True):
                assert relative_error(a[None], c[None]) < 1e-11, (K, N, R)

    def test_gradcheck(self, scan, twin, definition):
        args = [x.cuda().requires_grad_() for x in problem(3, 2, 3) if x is not None]
        assert torch.autograd.gradcheck(scan, args)
        assert torch.autograd.gradgradcheck(scan, args)

    def test_vmap(self, scan, twin, definition):
        args = [torch.stack([x, x + 1]) for x in problem(3, 2, 4) if x is not None]
        got = torch.func.vmap(scan)(*(x.cuda() for x in args))
        for i in range(2):
            assert relative_error(got[i], twin(*(x[i] for x in args))) < 1e-13

    def test_opcheck(self, scan, twin, definition):
        op = getattr(torch.ops.lbi, scan.__name__)
        for with_b in (True, False):
            opcheck(op, tuple(on_device(*problem(3, 2, 4, b=with_b))))

    def test_autocast(self, scan, twin, definition):
        args = on_device(*problem(5, 3, 16, dtype=torch.float32))
        with torch.autocast("cuda", dtype=torch.bfloat16):
            got = scan(*args)
        assert torch.equal(got, scan(*args))

    def test_under_inductor(self, scan, twin, definition):
        args = [x.cuda().requires_grad_() for x in problem(4, 5, 3) if x is not None]

        def f(J, end, b):
            return ops.boundary(scan(J.sin(), end * 2, b), 0, 0).cos()

        compiled = torch.compile(f, fullgraph=True)
        got, expected = (torch.autograd.grad(g(*args).sum(), args) for g in (compiled, f))
        for a, c in zip(got, expected, strict=True):
            torch.testing.assert_close(a, c)

    def test_more_than_31_bits_of_offset(self, scan, twin, definition):
        K, N, R = 3, 3_000_000, 16  # 2.3e9 Jacobian entries
        if torch.cuda.get_device_properties(0).total_memory < 16 * 2**30:
            pytest.skip("needs 16 GiB of device memory")
        J = torch.empty(K, N, R, R, dtype=torch.bfloat16, device="cuda").normal_().mul_(0.25)
        end = torch.randn(N, R, dtype=torch.bfloat16, device="cuda")
        got = scan(J, end, None)[:, -5:]
        assert relative_error(got, definition(J[:, -5:], end[-5:], None)) < 2**-8
