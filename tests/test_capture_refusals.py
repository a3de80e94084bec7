"""What capture refuses, and how it says so."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lbi_compile import transform
from lbi_compile.capture import Inputs, as_inputs, capture
from lbi_compile.errors import (
    CaptureError,
    DataDependentControlFlowError,
    ExampleInputsError,
    NotAModuleError,
)
from tests.test_capture import Everything, Layer, X, capturing


def line_of(function: Callable[..., Any], code: str) -> int:
    lines, first = inspect.getsourcelines(function)
    return first + next(i for i, line in enumerate(lines) if code in line)


class Branch(Layer):
    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        if y.sum() > 0:
            return y
        return -y


class Sliced(Layer):
    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        count = int(y.sum().item())
        return y[:count]


class Helped(nn.Module):
    """The branch is in a child module."""

    def __init__(self) -> None:
        super().__init__()
        self.child = Branch()

    def forward(self, x: Tensor) -> Tensor:
        return self.child(x) * 2.0


@pytest.mark.parametrize(
    ("make", "where", "code"),
    [
        (Branch, Branch.forward, "if y.sum() > 0:"),
        (Sliced, Sliced.forward, "count = int("),
        (Helped, Branch.forward, "if y.sum() > 0:"),
    ],
)
def test_control_flow_on_values_names_the_users_line(
    make: type[nn.Module], where: Callable[..., Any], code: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(DataDependentControlFlowError) as caught:
        capturing(make(), X)
    assert f"{__file__}:{line_of(where, code)}, in forward: {code}" in caught.value.found
    assert "torch.where or torch.cond" in caught.value.do
    assert "def forward" not in capfd.readouterr().err  # the exporter's own report of it is not printed


def test_inputs_the_model_cannot_run_on() -> None:
    with pytest.raises(ExampleInputsError) as caught:
        capturing(Layer(), torch.randn(3, 5))
    assert caught.value.found.startswith("Layer fails on the example inputs (x=float32[3, 5]): RuntimeError")


@pytest.mark.parametrize(
    "example", [(X, X, X, X, X), {"x": X, "unknown": X}, {}], ids=["too many", "unknown name", "missing"]
)
def test_a_call_the_forward_does_not_take(example: Any) -> None:
    with pytest.raises(ExampleInputsError, match=r"Everything fails on the example inputs .*TypeError"):
        capturing(Everything(), example)


def test_a_forward_the_exporter_cannot_read() -> None:
    class Outside(Layer):
        def forward(self, x: Tensor) -> Tensor:
            return self.layer(torch.from_numpy(x.detach().numpy() + 1.0))

    with pytest.raises(CaptureError, match=re.escape("torch.export cannot capture Outside")) as caught:
        capturing(Outside(), X)
    assert type(caught.value) is CaptureError
    assert __file__ in caught.value.do


def test_what_is_no_module_is_refused() -> None:
    with pytest.raises(NotAModuleError, match="a model of type function"):
        capture(F.relu, Inputs((X,), {}))  # type: ignore[arg-type]


class StraightThrough(torch.autograd.Function):
    """Rounding whose gradient is that of the identity."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return gradient


class Rounding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(StraightThrough.apply(3 * self.inner(x)))


def test_an_autograd_function_whose_backward_would_be_lost_is_refused() -> None:
    model, x = nn.Sequential(*(Rounding() for _ in range(4))), torch.randn(3, 4)
    with pytest.raises(CaptureError, match=r"StraightThrough[\s\S]*custom_op"):
        capture(model, as_inputs(model, x))
    # cut at its child modules it keeps the backward it was written with
    whole = transform(model, x, regions=1)
    gradients = []
    for run in (model, whole):
        model.zero_grad()
        run(x).square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for own, bounded in zip(*gradients, strict=True):
        assert own is not None
        assert own.abs().sum() > 0
        assert torch.equal(own, bounded)


def test_recomputation_is_no_backward_that_could_be_lost() -> None:
    class Recomputed(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(super().forward, x, use_reentrant=True)

    model, x = nn.Sequential(nn.Linear(4, 4), Recomputed(4, 4)), torch.randn(3, 4)
    assert "batch" in capture(model, as_inputs(model, x)).dynamic
