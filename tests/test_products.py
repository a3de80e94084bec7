"""Products of very many Jacobians: what overflows or underflows on the way spoils no adjoint, product or norm."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from mpmath import mpf
from torch import Tensor

import lbi_compile
from lbi_compile import newton
from lbi_compile.diagnostics import jacobian_norms
from lbi_compile.kernels import cpu_scan, ops, products, reference
from lbi_compile.render.report import _norms
from lbi_compile.verify import verify
from tests.cases import in_float64
from tests.scan_oracle import hard_problems

K = 4096
LOW = (torch.float32, torch.bfloat16)


def chains(dtype: torch.dtype) -> dict[str, Tensor]:
    """Jacobians `[4096, 1, 2, 2]` whose products leave the range of the dtype."""
    noise = torch.randn(K, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    turns = torch.tensor([1e30, 1e-30]).repeat_interleave(K // 2)[:, None, None, None]
    diagonal = torch.tensor([[10.0, 0.0], [0.0, 1.0]]).expand(K, 1, 2, 2)
    found = {
        "growth": noise * 4,
        "decay": noise / 64,
        "there and back": turns * torch.tensor([[0.8, 0.6], [-0.6, 0.8]]),
        "back and there": turns.flip(0) * torch.tensor([[0.8, 0.6], [-0.6, 0.8]]),
        "one direction": diagonal,
        "projection": diagonal * torch.tensor([1.0, 0.0]),
    }
    return {name: J.to(dtype) for name, J in found.items()}


def exact_suffixes(J: Tensor) -> list[list[list[mpf]]]:
    """All suffix products of one index in numbers whose exponents have no bounds."""
    product = [[mpf(1), mpf(0)], [mpf(0), mpf(1)]]
    found = [product]
    for step in reversed(J[:, 0].double().tolist()):
        product = [[row[0] * step[0][j] + row[1] * step[1][j] for j in range(2)] for row in product]
        found.append(product)
    return found[::-1]


@pytest.mark.parametrize("dtype", LOW)
def test_scaled_products_hold_what_no_dtype_does(dtype: torch.dtype) -> None:
    found = chains(dtype)
    together = torch.cat(list(found.values()), 1)  # every index has exponents of its own
    scaled, plain = products.scaled_suffix_products(together), ops.suffix_products(together)
    suffixes, prefixes = products.product_norms(together)
    assert scaled.rows.isfinite().all()
    assert float(scaled.rows.abs().max()) <= 2.0**-9
    assert suffixes.shape == prefixes.shape == (K + 1, len(found))
    torch.testing.assert_close(suffixes[0], prefixes[-1])  # both are the product of all
    largest = torch.finfo(dtype).max
    for n, (name, J) in enumerate(found.items()):
        exact = exact_suffixes(J)
        for k, i, j in product((0, 1, K // 2, K - 50, K), range(2), range(2)):
            size, wanted = max(map(abs, exact[k][i])), exact[k][i][j]
            got = mpf(scaled.rows[k, n, i, j].item()) * mpf(2) ** int(scaled.exponents[k, n, i])
            assert abs(got - wanted) <= 2e-3 * size, (name, k)
            value = plain[k, n, i, j].item()
            if 1e-36 < size < largest / 2:
                assert value == pytest.approx(float(wanted), abs=1e-2 * float(size)), (name, k)
            if abs(wanted) > 2 * mpf(largest) or wanted == 0:
                assert value == (math.copysign(math.inf, wanted) if wanted else 0), (name, k)
        top = max(abs(x) for row in exact[0] for x in row)
        if 1e-290 < top < 1e290:
            assert float(top) * 0.99 <= float(suffixes[0, n]) <= 2.01 * float(top), name
        else:
            assert float(suffixes[0, n]) == math.inf if top > 1 else float(suffixes[0, n]) < 1e-289, name


def test_plain_products_do_not() -> None:
    """Why it is done: the same products, one number after another, are infinite, NaN or zero."""
    found = chains(torch.float32)
    assert reference.suffix_products(found["one direction"])[0].isnan().any()
    assert (reference.suffix_products(found["back and there"])[0] == 0).all() or reference.suffix_products(
        found["back and there"]
    )[0].isnan().any()
    torch.testing.assert_close(
        ops.suffix_products(found["one direction"])[0, 0], torch.tensor([[math.inf, 0.0], [0.0, 1.0]])
    )


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("form", [cpu_scan, reference])
def test_adjoints_stay_finite_where_products_do_not(form: object, dtype: torch.dtype) -> None:
    for name, J, last, b in hard_problems(K):
        given = [None if x is None else x.to(dtype) for x in (J, last, b)]
        exact = reference.suffix_scan(*(None if x is None else x.double() for x in given))  # type: ignore[arg-type]
        got = form.suffix_scan(*given).double()  # type: ignore[attr-defined]
        # float32 keeps what it accumulates; what is stored is rounded to the dtype
        slack = 1e-4 if dtype == torch.float32 else 2**-8
        held = exact.abs() > 1e-36
        error = torch.where(held, got - exact, 0).abs().amax(2) / exact.abs().amax(2).clamp_min(1e-36)
        assert got.isfinite().all(), name
        assert error.max() < slack, name


@pytest.mark.parametrize("function", [ops.suffix_products, ops.prefix_products])
def test_derivatives_survive_a_step_out_of_range(function: object) -> None:
    """The product of `2^a, 2^-a` and an ordinary number is an ordinary number, and so are its derivatives."""
    J = torch.tensor([3.0, 2.0**100, 2.0**100, 2.0**-100, 2.0**-100, 5.0]).view(6, 1, 1, 1).requires_grad_()
    whole = function(J)[0 if function is ops.suffix_products else -1].sum()  # type: ignore[operator]
    (gradient,) = torch.autograd.grad(whole, J)
    assert whole.item() == 15.0
    assert gradient.flatten()[[0, 5]].tolist() == [5.0, 3.0]


@pytest.mark.parametrize("scale", [1e25, 1e-25, 1e160])
def test_norms_of_a_model_whose_jacobians_explode(scale: float) -> None:
    """float32 latents, products far outside of float32, and in the last case a report whose norms are infinite."""
    model, x = in_float64("transformer", depth=4)
    wide = scale > 1e38
    model = model.to(torch.float64 if wide else torch.float32)
    bounded = lbi_compile.transform(model, x, regions=4, r=4, cell="linear")
    cells = [p for name, p in bounded.interface.named_parameters() if name.endswith(".A")]
    with torch.no_grad():
        for cell in cells:
            cell.copy_(torch.eye(4, dtype=cell.dtype) * scale)
    (found,) = jacobian_norms(bounded, x)
    assert found.norms == pytest.approx((scale, scale))
    assert found.products == pytest.approx((scale, scale**2 if scale < 1e100 else math.inf))
    report = _norms(found.first, found.norms, found.products, ascii_only=True)
    assert report.row_count == 3
    if wide:
        assert "inf" in str(verify(bounded, x)), "the whole report can be printed"


def test_norms_of_jacobians_that_are_not_finite_are_not_made_up() -> None:
    J = torch.eye(3).repeat(5, 2, 1, 1)
    J[2, 1, 0, 0] = math.nan
    suffixes, prefixes = products.product_norms(J)
    assert suffixes[:, 0].tolist() == prefixes[:, 0].tolist() == [1.0] * 6
    assert suffixes[:, 1].isnan().tolist() == [True, True, True, False, False, False]
    assert prefixes[:, 1].isnan().tolist() == [False, False, False, True, True, True]
    assert math.isnan(newton.product_norm(J))
    assert newton.product_norm(torch.full((K, 1, 1, 1), 3.0)) == math.inf
