"""Refuse what is not linear in the adjoints: only a linear path has the Jacobian that its unit cotangents show.

The backward of differentiable operators is linear. A hook that clips gradients, adds noise to them or normalises them,
or a hand-written ``autograd.Function``, need not be.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from lbi_compile._torch import unset_fake_temporarily
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
    "amax", "amin", "aminmax", "argmax", "argmin", "_cdist_forward", "cummax", "cummin", "cumprod", "index_reduce",
    "kthvalue", "linalg_cholesky_ex", "_linalg_det", "_linalg_eigh", "linalg_inv_ex", "linalg_matrix_exp",
    "linalg_qr", "_linalg_slogdet", "_linalg_svd", "linalg_vector_norm", "_log_softmax", "logcumsumexp",
    "logsumexp", "max", "median", "min", "mode", "nanmedian", "norm", "prod", "renorm", "scatter_reduce",
    "_softmax", "sort", "std", "std_mean", "topk", "var", "var_mean",
}  # fmt: skip
# Made of a gradient's shape, not of its numbers.
_SHAPED = {"full_like": 1, "new_full": 2, "ones_like": None, "new_ones": None}
# Operators that put numbers beside those of a gradient or add them to it, and the arguments that hold either: a
# constant among them is a part of the result that no unit cotangent shows, unless it is zero.
_JOINED = {
    "cat": (0,), "stack": (0,), "where": (1, 2), "masked_fill": (0, 2), "masked_scatter": (0, 2), "copy": (1,),
    "fill": (1,), "index_fill": (0, 3), "put": (0, 2), "index_put": (0, 2), "_unsafe_index_put": (0, 2),
    "index_add": (0, 3), "index_copy": (0, 3), "scatter": (0, 3), "scatter_add": (0, 3), "slice_scatter": (0, 1),
    "select_scatter": (0, 1), "diagonal_scatter": (0, 1), "as_strided_scatter": (0, 1), "addmm": (0,),
    "addmv": (0,), "baddbmm": (0,), "constant_pad_nd": (2,),
}  # fmt: skip
_ZEROS = {"zeros", "zeros_like", "new_zeros"}
_FILLED = {"full": 1, "full_like": 1, "new_full": 2, "scalar_tensor": 0, "fill": 1}
# Of their first argument alone, and zero where it is.
_KEEPING = {
    "alias", "as_strided", "clone", "contiguous", "convert_element_type", "detach", "expand", "flatten",
    "lift_fresh_copy", "neg", "permute", "reshape", "select", "slice", "squeeze", "t", "to", "_to_copy",
    "transpose", "unflatten", "_unsafe_view", "unsqueeze", "view",
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


def require_no_constant(
    root: fx.GraphModule, path: Sequence[fx.Node], *, live: Collection[fx.Node], dead: Collection[fx.Node]
) -> None:
    """Check what is put beside the gradients of a path, as ``torch.where`` or ``torch.cat`` in a hook may do.

    Args:
        root: Owner of the graph.
        path: Nodes of an adjoint path.
        live: Those that depend on the adjoint, and the adjoint.
        dead: Other values that are read as zero.

    Raises:
        EngineError: A constant joins the gradient that is not known to be zero.
    """
    known = {*live, *dead, *path}
    for node in path:
        if node not in live or node.op != "call_function":
            continue
        for place in _JOINED.get(_name(node.target), ()):
            if place >= len(node.args):
                continue
            given = node.args[place]
            for one in given if isinstance(given, (list, tuple)) else (given,):
                if one not in known and not _is_zero(root, one):
                    raise EngineError(
                        f"{node.target} of a gradient between two latents and of {one}, which is not known to be zero",
                        expected="a backward that is linear in the gradients: no constants put in their place",
                        do="use backward='chain', or change gradients after the backward instead of inside it",
                    )


def _name(target: Any) -> str:
    """An operator without namespace and overload; empty for a Python function."""
    schema = getattr(target, "_schema", None)
    return "" if schema is None else schema.name.rpartition("::")[2]


def _is_zero(root: fx.GraphModule, value: Any) -> bool:
    """Whether a constant of a graph is zero everywhere, by how it is made."""
    while isinstance(value, fx.Node):
        if value.op == "get_attr":
            found = getattr(root, str(value.target), None)
            with unset_fake_temporarily():  # a fake tensor has no numbers to look at
                return type(found) is Tensor and not bool(found.any())
        if value.op != "call_function":
            return False
        name = _name(value.target)
        if name in _ZEROS:
            return True
        if name in _FILLED:
            value = value.args[_FILLED[name]]
        elif name in _KEEPING:
            value = value.args[0]
        elif name in ("cat", "stack"):
            parts: Any = value.args[0]
            return all(_is_zero(root, part) for part in parts)
        else:
            return False
    return isinstance(value, (int, float)) and value == 0


def _is_linear(target: Any, args: Sequence[Any], kwargs: dict[str, Any], live: Callable[[Any], bool]) -> bool:
    name = _name(target)
    if name.endswith(("_backward", "_backward_data")):
        return True
    if torch.Tag.nondeterministic_seeded in target.tags:
        return False  # other numbers for every cotangent
    if name in _SHAPED:
        place = _SHAPED[name]
        return place is not None and args[place] == 0
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
