"""Refuse what is not linear in the adjoints: only a linear path has the Jacobian that its unit cotangents show.

The backward of differentiable operators is linear. A hook that clips gradients, adds noise to them or normalises them,
or a hand-written ``autograd.Function``, need not be.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from lbi_compile.errors import EngineError

aten = torch.ops.aten

# One operand, any scalar arguments.
_UNARY = {
    aten.neg.default,
    aten.positive.default,
    aten.clone.default,
    aten._conj.default,
    aten.conj_physical.default,
    aten.real.default,
    aten.imag.default,
    torch.ops.prims.convert_element_type.default,
}
_SUMS = {aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.sub.Scalar, aten.rsub.Tensor, aten.rsub.Scalar}
_PRODUCTS = {aten.mul.Tensor, aten.mul.Scalar}
_QUOTIENTS = {aten.div.Tensor, aten.div.Scalar, aten.true_divide.Tensor}
_CONTRACTIONS = {
    aten.mm.default: (0, 1),
    aten.bmm.default: (0, 1),
    aten.mv.default: (0, 1),
    aten.dot.default: (0, 1),
    aten.addmm.default: (1, 2),
    aten.addmv.default: (1, 2),
    aten.baddbmm.default: (1, 2),
    aten.convolution.default: (0, 1),
}
# Not pointwise, and known not to be linear. Anything else that is not pointwise moves, sums or multiplies numbers.
_NONLINEAR = {
    "_log_softmax", "_softmax", "amax", "amin", "aminmax", "argmax", "argmin", "cummax", "cummin", "cumprod",
    "linalg_vector_norm", "logcumsumexp", "logsumexp", "max", "median", "min", "norm", "prod", "sort", "std", "topk",
    "var", "var_mean", "std_mean",
}  # fmt: skip


def require_linear(target: Any, args: Sequence[Any], kwargs: dict[str, Any], *, live: Callable[[Any], bool]) -> None:
    """Check one call on the adjoint path.

    Args:
        target: Operator.
        args: Its arguments; at least one is live.
        kwargs: Its keyword arguments.
        live: Whether a leaf depends on the adjoint.

    Raises:
        EngineError: The call is not linear in its live arguments, or not known to be.
    """
    if not _is_linear(target, args, kwargs, live):
        raise EngineError(
            f"{target} on a gradient between two latents, which is not linear in it",
            expected="a backward that is linear in the gradients: no clipping, noise or norms of them inside regions",
            do="use backward='chain', or change gradients after the backward instead of inside it",
        )


def _is_linear(target: Any, args: Sequence[Any], kwargs: dict[str, Any], live: Callable[[Any], bool]) -> bool:
    name = target._schema.name.split("::")[-1]
    if name.endswith(("_backward", "_backward_data")):
        return True
    if target in _CONTRACTIONS:
        return not all(live(args[i]) for i in _CONTRACTIONS[target])
    if torch.Tag.pointwise not in target.tags:
        return name not in _NONLINEAR
    if target in _UNARY:
        return True
    if target in _SUMS:
        return all(live(x) or (isinstance(x, (int, float)) and x == 0) for x in args[:2])
    if target in _PRODUCTS:
        return not all(live(x) for x in args[:2])
    if target in _QUOTIENTS:
        return not live(args[1])
    if target is aten.where.self:
        return not live(args[0])
    if name == "masked_fill":  # of a number: the other overload is not pointwise
        return not live(args[1]) and args[2] == 0
    if name in ("addcmul", "addcdiv"):
        return live(args[0]) and live(args[1]) != live(args[2]) and not (name == "addcdiv" and live(args[2]))
    if name == "lerp":
        return live(args[0]) and live(args[1]) and not live(args[2])
    return False
