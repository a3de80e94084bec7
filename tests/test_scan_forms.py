"""The choice of a form, the fast form on a CPU against the oracle, full products, and vectors that share Jacobians."""

from __future__ import annotations

import threading
from itertools import product

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from lbi_compile._torch import FakeTensorMode
from lbi_compile.errors import ScanShapeError
from lbi_compile.kernels import cpu_scan, forms, ops, reference
from lbi_compile.kernels.forms import Form, choose
from tests.scan_oracle import hard_problems, problem, relative_error

SCANS = [
    pytest.param(cpu_scan.suffix_scan, reference.suffix_scan, id="suffix"),
    pytest.param(cpu_scan.prefix_scan, reference.prefix_scan, id="prefix"),
]
PRODUCTS = [
    pytest.param(ops.suffix_products, reference.suffix_products, id="suffix"),
    pytest.param(ops.prefix_products, reference.prefix_products, id="prefix"),
]
OPS = [
    pytest.param(ops.suffix_scan, reference.suffix_scan, id="suffix"),
    pytest.param(ops.prefix_scan, reference.prefix_scan, id="prefix"),
]


class TestChoice:
    def test_is_a_pure_function_of_its_arguments(self):
        grid = list(product((0, 1, 64, 1000, 4096), (0, 1, 8, 8192), (1, 3, 16, 64), (torch.float32, torch.float64)))
        chosen = [
            choose(K, N, R, dtype=dtype, device=device) for K, N, R, dtype in grid for device in ("cpu", "cuda", "xpu")
        ]
        again = [
            choose(K, N, R, dtype=dtype, device=device) for K, N, R, dtype in grid for device in ("cpu", "cuda", "xpu")
        ]
        assert chosen == again
        assert {form.name for form in chosen} == {"numpy", "torch", "vector", "chunked"}
        assert all((form.chunk > 0) == (form.name == "chunked") for form in chosen)

    @pytest.mark.parametrize("R", [1, 4, 16, 33, 64])
    def test_many_indices_or_few_steps_take_the_vector_form(self, R):
        for dtype in (torch.bfloat16, torch.float32, torch.float64):
            assert choose(32, 1, R, dtype=dtype, device="cuda") == Form("vector")
            assert choose(4096, 65536, R, dtype=dtype, device="cuda") == Form("vector")
            assert choose(4096, 1, R, dtype=dtype, device="cuda", vectors=2) == Form("vector")

    @pytest.mark.parametrize("R", [1, 4, 16])
    def test_few_indices_and_many_steps_take_the_chunked_form(self, R):
        for K in (1024, 4096, 5000):
            form = choose(K, 1, R, dtype=torch.float32, device="cuda")
            assert form.name == "chunked"
            assert 16 <= form.chunk < K / 4

    def test_longer_never_goes_back_and_wider_or_more_never_comes_sooner(self):
        def begins(N: int, R: int, dtype: torch.dtype) -> int:
            names = [choose(2**i, N, R, dtype=dtype, device="cuda").name for i in range(20)]
            assert names == sorted(names, reverse=True)  # "vector", ..., "chunked", ...
            return names.count("vector")

        for dtype in (torch.bfloat16, torch.float32, torch.float64):
            table = [[begins(N, R, dtype) for R in (1, 8, 16, 32, 64)] for N in (1, 16, 256, 4096)]
            assert all(row == sorted(row) for row in table)
            assert all(list(column) == sorted(column) for column in zip(*table, strict=True))

    def test_the_operator_follows_it(self, monkeypatch):
        calls = []
        real = forms.choose
        monkeypatch.setattr(forms, "choose", lambda *args, **named: calls.append((args, named)) or real(*args, **named))
        ops.suffix_scan(*problem(3, 2, 4))
        assert calls == [((3, 2, 4), {"dtype": torch.float64, "device": "cpu", "vectors": 1})]


@pytest.mark.parametrize(("scan", "oracle"), SCANS)
class TestOnCpu:
    @pytest.mark.parametrize("with_b", [True, False])
    def test_is_the_oracle(self, scan, oracle, with_b):
        for K, N, R in product((0, 1, 2, 63, 64, 65, 200), (0, 1, 3, 8), (1, 3, 4, 16, 33)):
            args = problem(K, N, R, b=with_b)
            got = scan(*args)
            assert got.is_contiguous()
            exact = oracle(*args)
            assert got.shape == exact.shape
            assert N == 0 or relative_error(got, exact) < 1e-11, (K, N, R)

    def test_long_chains(self, scan, oracle):
        for N, R in ((1, 4), (8, 16)):
            args = problem(4096, N, R)
            assert relative_error(scan(*args), oracle(*args)) < 1e-9

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_low_precision_rounds_only_its_output(self, scan, oracle, dtype):
        for N, R in ((1, 4), (3, 16)):
            J, end, b = problem(70, N, R, dtype=dtype)
            assert b is not None
            got, exact = scan(J, end, b), oracle(J.double(), end.double(), b.double())
            assert got.dtype == dtype
            slack = 1e-4 * exact.abs().amax((1, 2), keepdim=True)
            assert ((got - exact).abs() <= torch.finfo(dtype).eps / 2 * exact.abs() + slack).all()

    @pytest.mark.parametrize("N", [1, 6])
    def test_strided_inputs(self, scan, oracle, N):
        J, end, b = problem(5, 6, 3)
        assert b is not None
        for name, args in {
            "transposed J": (J.mT.contiguous().mT, end, b),
            "steps innermost": (J.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2), end.T.contiguous().T, b),
            "every second step": (J[::2], end, b[::2]),
            "one Jacobian for all": (J[:, :1].expand(5, 6, 3, 3), end, b),
            "one Jacobian for all steps": (J[:1].expand(5, 6, 3, 3), end, b),
            "one end for all": (J, end[:1].expand(6, 3), b[:, :1].expand(5, 6, 3)),
        }.items():
            args = args[0][:, :N], args[1][:N], args[2][:, :N]
            assert relative_error(scan(*args), oracle(*args)) < 1e-13, name

    @pytest.mark.parametrize("S", [1, 5])
    def test_vectors_that_share_a_jacobian(self, scan, oracle, S):
        for N in (1, 3):
            J, _, _ = problem(7, N, 4)
            end, b = torch.randn(N, S, 4).double(), torch.randn(7, N, S, 4).double()
            assert relative_error(scan(J, end, b), oracle(J, end, b)) < 1e-13
            apart = torch.stack([oracle(J, end[:, s], b[:, :, s]) for s in range(S)], 2)
            assert relative_error(scan(J, end, b), apart) < 1e-13

    def test_inputs_are_only_read(self, scan, oracle):
        args = [x for x in problem(9, 3, 4) if x is not None]
        kept, versions = [x.clone() for x in args], [x._version for x in args]
        scan(*args)[:] = 0
        assert all(torch.equal(a, b) for a, b in zip(args, kept, strict=True))
        assert versions == [x._version for x in args]

    def test_threads_do_not_meet(self, scan, oracle):
        problems = [problem(300, 1 + i % 3, 4, seed=i) for i in range(8)]
        expected = [oracle(*args) for args in problems]
        wrong = []

        def work(i: int) -> None:
            for _ in range(5):
                if relative_error(scan(*problems[i]), expected[i]) > 1e-12:
                    wrong.append(i)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong

    def test_products_of_jacobians_out_of_range(self, scan, oracle):
        for name, J, last, b in hard_problems(4096):
            if scan is cpu_scan.prefix_scan:
                J, b = J.mT.flip(0), None if b is None else b.flip(0)
            exact = oracle(J.double(), last.double(), None if b is None else b.double())
            exact = exact.where(exact.abs() > 1e-37, 0)  # what float32 holds
            got = scan(J, last, b).where(exact != 0, 0).double()
            worst = (got - exact).abs().amax((1, 2)) / exact.abs().amax((1, 2)).clamp_min(1e-37)
            assert worst.max() < 1e-4, name

    def test_what_leaves_the_range_does_so_quietly(self, scan, oracle):
        J, last = torch.full((200, 2, 3, 3), 10.0), torch.ones(2, 3)
        torch.testing.assert_close(scan(J, last), oracle(J, last))
        assert scan(J, last).isinf().any()
        J[100, 0] = torch.nan
        got = scan(J / 30, last)
        assert got[:, 0].isnan().any()
        assert got[:, 1].isfinite().all()


@pytest.mark.parametrize(("products", "oracle"), PRODUCTS)
class TestProducts:
    def test_is_the_oracle(self, products, oracle):
        for K, N, R in product((0, 1, 5, 37), (0, 1, 3), (1, 3, 4, 16, 33)):
            J, _, _ = problem(K, N, R)
            got, exact = products(J), oracle(J)
            assert got.shape == (K + 1, N, R, R)
            assert N == 0 or relative_error(got, exact) < 1e-12

    def test_is_the_derivative_of_the_chain(self, products, oracle):
        J, first, _ = problem(5, 1, 3)

        def latents(start: torch.Tensor, begin: int) -> list[torch.Tensor]:
            values = [start]
            for k in range(begin, 5):
                values.append(J[k, 0] @ values[-1])
            return values

        for k in range(6):
            if products is ops.suffix_products:
                exact = torch.func.jacrev(lambda m, k=k: latents(m, k)[-1])(first[0])
            else:
                exact = torch.func.jacrev(lambda m, k=k: latents(m, 0)[k])(first[0])
            torch.testing.assert_close(products(J)[k, 0], exact)

    def test_adjoints_are_the_last_one_times_the_products(self, products, oracle):
        J, end, _ = problem(5, 3, 4)
        if products is ops.suffix_products:
            got, exact = torch.einsum("knij,ni->knj", products(J), end), ops.suffix_scan(J, end)
        else:
            got, exact = torch.einsum("knij,nj->kni", products(J), end), ops.prefix_scan(J, end)
        torch.testing.assert_close(got, exact)

    def test_opcheck(self, products, oracle):
        op = getattr(torch.ops.lbi, products.__name__)
        opcheck(op, (problem(3, 2, 4)[0].requires_grad_(),))
        opcheck(op, (problem(3, 2, 4)[0][:, :1].expand(3, 2, 4, 4),))

    def test_gradients(self, products, oracle):
        J = problem(3, 2, 3)[0].requires_grad_()
        assert torch.autograd.gradcheck(products, J)
        assert torch.autograd.gradgradcheck(products, J)

    def test_vmap_and_functorch(self, products, oracle):
        J = torch.randn(5, 3, 2, 4, 4)
        torch.testing.assert_close(torch.func.vmap(products)(J), torch.stack([oracle(x) for x in J]))
        got, exact = (torch.func.grad(lambda J, f=f: f(J).sin().sum())(J[0]) for f in (products, oracle))
        torch.testing.assert_close(got, exact)

    def test_symbolic_shapes_and_fakes(self, products, oracle):
        traced = make_fx(products, tracing_mode="symbolic")(problem(3, 5, 4)[0])
        J = problem(3, 7, 4)[0]
        torch.testing.assert_close(traced(J), oracle(J))
        with FakeTensorMode() as mode:
            assert products(mode.from_tensor(J)).shape == (4, 7, 4, 4)

    def test_flops(self, products, oracle):
        with FlopCounterMode(display=False) as counter:
            products(problem(3, 5, 4)[0])
        assert counter.get_total_flops() == 2 * 3 * 5 * 4**3

    def test_low_precision_accumulates_in_float32(self, products, oracle):
        J = problem(37, 2, 4)[0].bfloat16()
        got, exact = products(J), oracle(J.double())
        assert got.dtype == torch.bfloat16
        assert relative_error(got.flatten(1, 2), exact.flatten(1, 2)) < 2**-8

    def test_misfits(self, products, oracle):
        for wrong in (torch.ones(2, 3, 4), torch.ones(2, 3, 4, 5), torch.ones(2, 3, 4, 4, dtype=torch.long)):
            with pytest.raises(ScanShapeError, match=r"expected: J \[K, N, R, R\]"):
                products(wrong)


@pytest.mark.parametrize(("op", "oracle"), OPS)
class TestManyVectors:
    def test_opcheck_and_gradients(self, op, oracle):
        J = problem(3, 2, 3)[0].requires_grad_()
        end, b = torch.randn(2, 4, 3).double().requires_grad_(), torch.randn(3, 2, 4, 3).double().requires_grad_()
        opcheck(getattr(torch.ops.lbi, op.__name__), (J, end, b))
        assert torch.autograd.gradcheck(op, (J, end, b))
        assert torch.autograd.gradgradcheck(op, (J, end, b), fast_mode=True)

    def test_gradient_is_the_oracles_also_under_autocast(self, op, oracle):
        J = problem(5, 3, 4, dtype=torch.float32)[0].requires_grad_()
        end = torch.randn(3, 6, 4)
        weight = torch.randn(6, 3, 6, 4)
        (exact,) = torch.autograd.grad((oracle(J, end) * weight).sum(), J)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            (got,) = torch.autograd.grad((op(J, end) * weight).sum(), J)
        torch.testing.assert_close(got, exact, rtol=1e-4, atol=1e-4)

    def test_vmap_over_cotangents_does_not_copy_jacobians(self, op, oracle):
        J, _, _ = problem(3, 2, 4)
        ends, b = torch.randn(5, 2, 4).double(), torch.randn(5, 3, 2, 4).double()
        seen = []

        class Look(torch.utils._python_dispatch.TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                if func.namespace == "lbi":
                    seen.append((args[0].data_ptr(), args[1].shape))
                return func(*args, **(kwargs or {}))

        with Look():
            got = torch.func.vmap(op, in_dims=(None, 0, 0))(J, ends, b)
        assert seen == [(J.data_ptr(), (2, 5, 4))]
        torch.testing.assert_close(got, torch.stack([oracle(J, e, x) for e, x in zip(ends, b, strict=True)]))

    def test_vmap_of_many_vectors(self, op, oracle):
        for dims in product((0, None), (1, None), (2, None)):
            if dims == (None, None, None):
                continue
            J, end, b = torch.randn(5, 3, 2, 4, 4), torch.randn(2, 5, 6, 4), torch.randn(3, 2, 5, 6, 4)
            args = [
                x if dim is not None else x.select(i, 0) for x, dim, i in zip((J, end, b), dims, (0, 1, 2), strict=True)
            ]
            got = torch.func.vmap(op, in_dims=dims)(*args)
            for i in range(5):
                each = [x if dim is None else x.select(dim, i) for x, dim in zip(args, dims, strict=True)]
                torch.testing.assert_close(got[i], oracle(*each))

    def test_flops(self, op, oracle):
        with FlopCounterMode(display=False) as counter:
            op(problem(3, 5, 4)[0], torch.randn(5, 7, 4).double())
        assert counter.get_total_flops() == 2 * 3 * 5 * 7 * 4 * 4
