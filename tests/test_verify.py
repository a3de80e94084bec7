"""verify: the error measure, the Jacobians, the lanes, and what the report says of right and wrong models."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import lbi_compile
from lbi_compile.diagnostics import interface_jacobian
from lbi_compile.errors import OptionError
from lbi_compile.verify import relative_errors
from tests.cases import gpt2, mlp
from tests.models import BatchNormMLP, CausalTransformer


def test_relative_errors_forgive_rounding_of_zero_gradients_only() -> None:
    expected: dict[str, Tensor | None] = {"a": torch.tensor([3.0, 4.0]), "zero": torch.zeros(2), "none": None}
    got: dict[str, Tensor | None] = {"a": torch.tensor([3.0, 4.5]), "zero": torch.tensor([1e-9, 0.0]), "none": None}
    errors = relative_errors(got, expected)
    assert errors["a"] == pytest.approx(0.1, rel=1e-4)
    assert errors["zero"] == pytest.approx(1e-9 / 5e-6, rel=1e-4)
    assert "none" not in errors
    assert relative_errors({**got, "none": torch.ones(1)}, expected)["none"] == math.inf
    assert relative_errors({**got, "a": None}, expected)["a"] == math.inf
    assert relative_errors({**got, "a": torch.tensor([math.nan, 4.0])}, expected)["a"] == math.inf
    assert set(relative_errors(expected, expected).values()) == {0.0}


def test_interface_jacobian_is_d_after_d_before_with_rows_of_after() -> None:
    A = torch.randn(3, 3, dtype=torch.float64)
    before = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    found = interface_jacobian((before @ A.T).tanh(), before)
    slope = 1 - (before @ A.T).tanh().square()
    torch.testing.assert_close(found, (slope.unsqueeze(-1) * A).flatten(0, 1))
    assert (
        interface_jacobian(torch.ones(2, 3, requires_grad=True) * 1, torch.ones(2, 3, requires_grad=True)).eq(0).all()
    )


def test_report_of_an_exact_model() -> None:
    torch.manual_seed(0)
    model, inputs = gpt2(4)
    bounded = lbi_compile.transform(model, inputs, regions=4, r=4)
    report = lbi_compile.verify(bounded, inputs)
    assert report.ok
    assert report.max_rel_error <= 1e-10
    assert report.leak is False
    assert report.batch_independent is True
    assert [count for _, count in report.lanes] == [1, 1, 1]
    assert [name for name, _ in report.lanes] == [point.name for point in bounded.plan.boundaries]
    assert report.first_boundary == 1
    cells = [cell.A.detach().double() for cell in bounded.interface.cells.values()]  # type: ignore[operator, union-attr]
    norms = [float(torch.linalg.matrix_norm(A, 2)) for A in cells]
    assert report.jacobian_norms == pytest.approx(norms)
    assert report.product_norms[-1] == pytest.approx(float(torch.linalg.matrix_norm(cells[1] @ cells[0], 2)))
    assert "verify: ok" in str(report)


def test_a_tighter_tolerance_fails_and_says_so() -> None:
    torch.manual_seed(0)
    model, inputs = mlp(4)
    bounded = lbi_compile.transform(model, inputs, regions=3, r=4)
    report = lbi_compile.verify(bounded, inputs, engine="chain", tolerance=-1.0)
    assert not report.ok
    assert "FAIL" in str(report).upper()
    with pytest.raises(OptionError, match="backward='guess'"):
        lbi_compile.verify(bounded, inputs, engine="guess")


def test_coupled_samples_are_named_and_harmless_to_the_chain() -> None:
    torch.manual_seed(0)
    x = torch.randn(6, 10)
    bounded = lbi_compile.transform(BatchNormMLP(10, width=12, depth=4), x, regions=3, r=4)
    report = lbi_compile.verify(bounded, x, engine="chain")
    assert report.ok
    assert report.batch_independent is False
    assert report.jacobian_norms == ()
    check = next(check for check in report.checks if check.name == "batch independence")
    assert check.ok is None
    assert "batch_norm" in check.detail


def test_casts_baked_into_the_model_do_not_spoil_the_float64_twin() -> None:
    class Casting(CausalTransformer):
        def forward(self, tokens: Tensor) -> Tensor:
            return super().forward(tokens).to(torch.float32) * 2

    torch.manual_seed(0)
    model, tokens = Casting(vocabulary=32, length=16, width=16, depth=4, heads=2), torch.randint(0, 32, (2, 9))
    bounded = lbi_compile.transform(model, tokens, regions=3, r=4, interface="chunked")
    report = lbi_compile.verify(bounded, tokens, engine="chain")
    assert report.ok
    assert bounded(tokens).dtype == torch.float32
