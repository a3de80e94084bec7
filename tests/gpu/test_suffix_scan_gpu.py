"""The Triton forms on a CUDA device, through the operators and one by one; needs torch, triton and pytest only."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
pytest.importorskip("triton")

from lbi_compile.kernels import forms, ops, reference, suffix_scan  # noqa: E402  after the check for triton
from lbi_compile.kernels.forms import Form  # noqa: E402
from tests.scan_oracle import (  # noqa: E402
    K_SIZES,
    N_SIZES,
    R_SIZES,
    hard_problems,
    prefix_definition,
    problem,
    relative_error,
    suffix_definition,
)

FORMS = [pytest.param(Form("vector"), id="vector"), pytest.param(Form("chunked", 8), id="chunked")]
BOTH = [
    pytest.param(suffix_scan.suffix_scan, reference.suffix_scan, id="suffix"),
    pytest.param(suffix_scan.prefix_scan, reference.prefix_scan, id="prefix"),
]
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


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("scan", "twin"), BOTH)
class TestForms:
    @pytest.mark.parametrize("R", [1, 2, 3, 8, 16, 17, 32, 33, 64])
    @pytest.mark.parametrize(
        ("dtype", "bound"), [(torch.float64, 1e-11), (torch.float32, 1e-4), (torch.bfloat16, 2**-7)]
    )
    def test_every_width_and_ragged_chunks(self, form, scan, twin, R, dtype, bound):
        for K, N, with_b in product((1, 7, 8, 9, 37, 200), (1, 5), (True, False)):
            args = problem(K, N, R, dtype=dtype, b=with_b)
            exact = twin(*(x if x is None else x.double() for x in args))
            assert relative_error(scan(*on_device(*args), form=form), exact) < bound, (K, N, with_b)

    def test_strided_inputs(self, form, scan, twin):
        J, end, b = problem(20, 6, 16)
        assert b is not None
        Jd, endd, bd = (x.cuda() for x in (J, end, b))
        for name, args, here in (
            ("transposed J", (Jd.mT.contiguous().mT, endd, bd), (J, end, b)),
            ("sliced", (Jd[::2, 1::2], endd[1::2], bd[::2, 1::2]), (J[::2, 1::2], end[1::2], b[::2, 1::2])),
            ("steps innermost", (Jd.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2), endd, bd), (J, end, b)),
            ("one J for all", (Jd[:, :1].expand_as(Jd), endd, bd), (J[:, :1].expand_as(J), end, b)),
        ):
            assert relative_error(scan(*args, form=form), twin(*here)) < 1e-12, name

    def test_long_chains(self, form, scan, twin):
        chunk = Form(form.name, 8 * form.chunk)
        for N, R in ((1, 4), (3, 16)):
            args = problem(4096, N, R, dtype=torch.float32)
            exact = twin(*(x.double() for x in args if x is not None))
            assert relative_error(scan(*on_device(*args), form=chunk), exact) < 1e-3

    def test_products_of_jacobians_out_of_range(self, form, scan, twin):
        chunk = Form(form.name, 8 * form.chunk)
        for name, J, last, b in hard_problems(4096):
            if scan is suffix_scan.prefix_scan:
                J, b = J.mT.flip(0), None if b is None else b.flip(0)
            exact = twin(J.double(), last.double(), None if b is None else b.double())
            got = scan(*on_device(J, last, b), form=chunk).cpu().double()
            exact = exact.where(exact.abs() > 1e-37, 0)  # what float32 holds
            worst = (got.where(exact != 0, 0) - exact).abs().amax((1, 2)) / exact.abs().amax((1, 2)).clamp_min(1e-37)
            assert worst.max() < 1e-4, name

    def test_a_nan_stays_with_its_index(self, form, scan, twin):
        J, end, b = problem(40, 3, 4, dtype=torch.float32)
        J[20, 1, 0, 0] = torch.nan
        got = scan(*on_device(J, end, b), form=form)
        assert got[:, 1].isnan().any()
        assert got[:, ::2].isfinite().all()


@pytest.mark.parametrize(("scan", "twin"), BOTH)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2**-7)])
def test_vectors_that_share_a_jacobian(scan, twin, dtype, bound):
    for R, S in ((1, 3), (4, 1), (4, 9), (16, 16), (33, 5), (64, 64)):
        J = problem(7, 3, R, dtype=dtype)[0]
        end, b = torch.randn(3, S, R).to(dtype), torch.randn(7, 3, S, R).to(dtype)
        for args in ((J, end, b), (J, end, None), (J.mT.contiguous().mT, end.mT.contiguous().mT, b)):
            exact = twin(*(x if x is None else x.double() for x in args))
            assert relative_error(scan(*on_device(*args)).flatten(1, 2), exact.flatten(1, 2)) < bound, (R, S)


@pytest.mark.parametrize("name", ["suffix_products", "prefix_products"])
def test_products(name):
    for K, N, R in ((1, 3, 1), (5, 2, 4), (37, 2, 16), (9, 1, 33), (5, 2, 64)):
        J = problem(K, N, R)[0]
        got, exact = getattr(ops, name)(J.cuda()), getattr(reference, name)(J)
        assert relative_error(got.flatten(1, 2), exact.flatten(1, 2)) < 1e-12, (K, N, R)
    J = problem(3, 2, 3)[0].cuda().requires_grad_()
    assert torch.autograd.gradcheck(getattr(ops, name), J)
    opcheck(getattr(torch.ops.lbi, name), (J,))


def test_long_chains_of_few_indices_are_chunked():
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    form = forms.choose(4096, 1, 16, dtype=torch.float32, device="cuda", processors=processors)
    assert form.name == "chunked"
    args = problem(4096, 1, 16, dtype=torch.float32)
    got, same = ops.suffix_scan(*on_device(*args)), suffix_scan.suffix_scan(*on_device(*args), form=form)
    assert torch.equal(got, same)
