"""Which calls are linear in their live arguments, by rule and by numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from lbi_compile.errors import EngineError
from lbi_compile.passes.linearity import require_linear

aten = torch.ops.aten


class Live(str):
    """Stands for a value that depends on the adjoint."""

    __slots__ = ()


L, D = Live("live"), torch.ones(3, 3)  # live and not


def linear(target: Any, *args: Any) -> bool:
    try:
        require_linear(target, args, {}, live=lambda x: isinstance(x, Live))
    except EngineError:
        return False
    return True


CALLS: list[tuple[Any, Sequence[Any], bool]] = [
    *[(op, [L], True) for op in (aten.neg.default, aten.clone.default, aten.real.default)],
    (torch.ops.prims.convert_element_type.default, [L, torch.double], True),
    *[(op, [L], False) for op in (aten.sin.default, aten.relu.default, aten.abs.default, aten.sign.default)],
    (aten.clamp.default, [L, -1, 1], False),
    (aten.pow.Tensor_Scalar, [L, 2], False),
    # a sum with what is not live is affine, but for zero
    (aten.add.Tensor, [L, L], True),
    (aten.add.Tensor, [L, D], False),
    (aten.add.Tensor, [D, L], False),
    (aten.add.Tensor, [L, L, 2], True),
    (aten.add.Tensor, [L, 0], True),
    (aten.add.Tensor, [L, 0.0], True),
    (aten.add.Scalar, [L, 1], False),
    (aten.sub.Tensor, [0, L], True),
    (aten.rsub.Scalar, [L, -1.0], False),
    (aten.rsub.Scalar, [L, 0], True),
    *[(op, [L, D], True) for op in (aten.mul.Tensor, aten.mm.default, aten.bmm.default, aten.dot.default)],
    *[(op, [D, L], True) for op in (aten.mul.Tensor, aten.mm.default, aten.mv.default, aten.convolution.default)],
    *[(op, [L, L], False) for op in (aten.mul.Tensor, aten.mm.default, aten.bmm.default, aten.convolution.default)],
    (aten.mul.Scalar, [L, 3], True),
    *[(op, [L, L, D], True) for op in (aten.addmm.default, aten.addmv.default, aten.baddbmm.default)],
    *[(op, [L, D, L], True) for op in (aten.addmm.default, aten.addmv.default, aten.baddbmm.default)],
    *[(op, [D, L, L], False) for op in (aten.addmm.default, aten.addmv.default, aten.baddbmm.default)],
    (aten.div.Tensor, [L, D], True),
    (aten.div.Tensor, [D, L], False),
    (aten.div.Tensor, [L, L], False),
    (aten.div.Scalar, [L, 3], True),
    (aten.where.self, [D, L, L], True),
    (aten.where.self, [D, D, L], True),
    (aten.where.self, [L, D, D], False),
    (aten.masked_fill.Scalar, [L, D, 0], True),
    (aten.masked_fill.Scalar, [L, D, 1], False),
    (aten.masked_fill.Scalar, [L, L, 0], False),
    (aten.masked_fill.Tensor, [L, D, torch.zeros(())], True),
    (aten.addcmul.default, [L, L, D], True),
    (aten.addcmul.default, [L, D, L], True),
    (aten.addcmul.default, [L, L, L], False),
    (aten.addcmul.default, [D, L, D], False),
    (aten.addcdiv.default, [L, L, D], True),
    (aten.addcdiv.default, [L, D, L], False),
    (aten.addcdiv.default, [L, D, D], False),  # a constant is added
    (aten.addcmul.default, [L, D, D], False),
    (aten.lerp.Scalar, [L, L, 0.5], True),
    (aten.lerp.Tensor, [L, L, L], False),
    (aten.lerp.Scalar, [L, D, 0.5], False),
    (aten.lerp.Scalar, [D, L, 0.5], False),
    # what moves or sums numbers, and what chooses among them
    (aten.sum.default, [L], True),
    (aten.permute.default, [L, [1, 0]], True),
    (aten.cat.default, [[L, D]], True),
    (aten.cumsum.default, [L, 0], True),
    (aten._softmax.default, [L, 0, False], False),
    (aten.zeros_like.default, [L], True),
    (aten.ones_like.default, [L], False),
    (aten.full_like.default, [L, 0], True),
    (aten.full_like.default, [L, 2], False),
    (aten.new_full.default, [L, [3], 0.0], True),
    (aten.new_full.default, [L, [3], 0.5], False),
    (aten.rand_like.default, [L], False),
    (aten.native_dropout.default, [L, 0.5, True], False),
    (aten.linalg_vector_norm.default, [L], False),
    (aten.amax.default, [L], False),
    (aten.sort.default, [L], False),
    (aten.prod.default, [L], False),
    # the backward of an operator
    (aten.threshold_backward.default, [L, D, 0], True),
    (aten.tanh_backward.default, [L, D], True),
    (aten._softmax_backward_data.default, [L, D, 0, torch.float], True),
]


@pytest.mark.parametrize(("target", "args", "expected"), CALLS, ids=lambda x: str(x)[:40])
def test_calls(target: Any, args: Sequence[Any], expected: bool) -> None:
    assert linear(target, *args) == expected


def _value(argument: Any, live: Tensor) -> Any:
    if isinstance(argument, list) and any(isinstance(x, Live) for x in argument):
        return [_value(x, live) for x in argument]
    return live if isinstance(argument, Live) else argument


@pytest.mark.parametrize(
    ("target", "args"),
    [
        (target, args)
        for target, args, expected in CALLS
        if expected
        and target._schema.name.split("::")[-1]
        in ("neg", "clone", "add", "sub", "rsub", "mul", "mm", "addmm", "div", "addcmul", "addcdiv", "lerp", "sum")
    ],
    ids=lambda x: str(x)[:40],
)
def test_what_is_taken_for_linear_is(target: Any, args: Sequence[Any]) -> None:
    """f(a - 2 b) = f(a) - 2 f(b), and a constant part would show in f(0)."""
    a, b = torch.randn(2, 3, 3, dtype=torch.double)

    def call(live: Tensor) -> Tensor:
        given = [_value(arg.double() if isinstance(arg, Tensor) else arg, live) for arg in args]
        if len(given) > 2 and isinstance(given[2], (int, float)) and target is aten.add.Tensor:
            return target(*given[:2], alpha=given[2])
        if not isinstance(given[0], Tensor):
            return target(torch.tensor(given[0], dtype=torch.double), *given[1:])
        return target(*given)

    torch.testing.assert_close(call(a - 2 * b), call(a) - 2 * call(b))
    assert not call(a * 0).any()
