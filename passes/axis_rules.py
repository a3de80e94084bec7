"""Static rules: where an operator leaves an axis that its arguments carry.

Each rule answers for one family of operators. A case that no rule covers is mixed: unsure is never independent.
Rules for what only rearranges elements stand in ``axis_views``.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch
from torch import fx

from lbi_compile.passes.axis_calls import ABSENT, AxisState, Call, MixedError, Rule, Shapes, agree, contract
from lbi_compile.passes.axis_views import VIEW_RULES
from lbi_compile.passes.names import operator_name

_RULES: dict[str, Rule] = dict(VIEW_RULES)

# What depends on the sizes and the type of its argument alone, or gives no value.
_SHAPE_ONLY = frozenset(
    {
        "aten.sym_size",
        "aten.sym_stride",
        "aten.sym_numel",
        "aten.sym_storage_offset",
        "aten.zeros_like",
        "aten.ones_like",
        "aten.empty_like",
        "aten.rand_like",
        "aten.randn_like",
        "aten.randint_like",
        "aten.new_zeros",
        "aten.new_ones",
        "aten.new_empty",
        "aten._assert_tensor_metadata",
        "aten._assert_async",
        "aten._assert_scalar",
    }
)


def follow(node: fx.Node, states: Mapping[fx.Node, AxisState], shapes: Shapes, *, size: int) -> AxisState:
    """The state of ``node`` from the states of its arguments.

    Args:
        node: The node; arguments without a state do not depend on the source.
        states: States of the nodes before it.
        shapes: Sizes of every node that gives one tensor.
        size: Size S of the axis, at least 2.

    Returns:
        Its state; ``"mixed"`` names the operator that mixed first.
    """
    carried = [state for before in node.all_input_nodes if (state := states.get(before, ABSENT)).kind != "absent"]
    name = _plain(operator_name(node))
    if not carried or name in _SHAPE_ONLY or 0 in (shapes.get(node) or ()):
        return ABSENT
    for state in carried:
        if state.kind == "mixed":
            return state
    rule = _RULES.get(name)
    if rule is None and torch.Tag.pointwise in getattr(node.target, "tags", ()):
        rule = _elementwise
    try:
        if rule is None:
            raise MixedError("no rule covers it")
        state = rule(Call(node, states, shapes, size=size))
        _check(state, shapes.get(node), size)
    except MixedError as mixed:
        why = f"{operator_name(node)}: {mixed.why}"
        return AxisState("mixed", node=node, why=why, certain=mixed.certain)
    return state


def _plain(name: str) -> str:
    """``aten.relu_`` has the rule of ``aten.relu``."""
    return name if name.endswith("__") else name.removesuffix("_")


def _check(state: AxisState, shape: tuple[int, ...] | None, size: int) -> None:
    """Whole axes only: every rule relies on a dim that is a multiple of the axis it holds."""
    if state.kind != "at" or shape is None:
        return
    if not 0 <= state.dim < len(shape) or shape[state.dim] % (state.stride * size):
        raise MixedError("it keeps only a part of the axis")


def _rule(names: str) -> Callable[[Rule], Rule]:
    def add(rule: Rule) -> Rule:
        _RULES.update({f"aten.{name}": rule for name in names.split()})
        return rule

    return add


@_rule(
    "__and__ __or__ __xor__ rsub masked_fill polar complex log_sigmoid tril triu dropout alpha_dropout feature_dropout "
    "feature_alpha_dropout bernoulli conj resolve_conj resolve_neg real imag"
)
def _elementwise(call: Call) -> AxisState:
    """Elementwise, over arguments broadcast from the right."""
    rank = len(call.out)
    places = ((call.state(x).dim - len(call.shape(x)) + rank, call.state(x).stride) for x in call.carriers())
    return AxisState("at", *agree(places))


@_rule("where")
def _where(call: Call) -> AxisState:
    if len(call.args) == 1:
        raise MixedError("it lists positions")
    return _elementwise(call)


@_rule("max min")
def _extremum(call: Call) -> AxisState:
    return _elementwise(call) if "other" in call.args else _reduce(call)


@_rule("prelu one_hot native_dropout")
def _first_alone(call: Call) -> AxisState:
    return call.one()[0]


@_rule("to _to_copy type_as contiguous clone alias detach lift_fresh lift_fresh_copy")
def _copy_of_first(call: Call) -> AxisState:
    """Copies of the first argument; the others give a type, a device or a layout."""
    return call.state(call.args[call.first])


@_rule("full_like new_full")
def _fill(call: Call) -> AxisState:
    """Not shape-only: a number read from the source, which is always mixed, may be the value."""
    return ABSENT


@_rule("copy")
def _copy(call: Call) -> AxisState:
    """Overwrites the first argument with the second, broadcast from the right."""
    if not call.carriers("src"):
        return ABSENT
    state, shape = call.state(call.args["src"]), call.shape(call.args["src"])
    return AxisState("at", state.dim - len(shape) + len(call.shape(call.args["self"])), state.stride)


@_rule("linear")
def _linear(call: Call) -> AxisState:
    x, weight, bias = (call.args[name] for name in ("input", "weight", "bias"))
    rows: list[Hashable] = list(range(len(call.shape(x)) - 1))
    out: list[Hashable] = ["o"] if len(call.shape(weight)) == 2 else []
    return contract(call, [(x, [*rows, "k"]), (weight, [*out, "k"]), (bias, out)], [*rows, *out])


def _product(call: Call, left: Any, right: Any, bias: Any = None) -> AxisState:
    """``matmul`` with its broadcast batch dims, and a bias that is broadcast to the result."""
    a, b = len(call.shape(left)), len(call.shape(right))
    batch = [("batch", back) for back in range(max(a, b, 2) - 2, 0, -1)]
    rows, columns = ["i"] if a > 1 else [], ["j"] if b > 1 else []
    out = [*batch, *rows, *columns]
    operands: list[tuple[Any, list[Any]]] = [
        (left, [*batch[len(batch) - max(a - 2, 0) :], *rows, "k"]),
        (right, [*batch[len(batch) - max(b - 2, 0) :], "k", *columns]),
    ]
    if bias is not None:
        operands.append((bias, out[len(out) - len(call.shape(bias)) :]))
    return contract(call, operands, out)


@_rule("matmul mm bmm mv dot")
def _matmul(call: Call) -> AxisState:
    left, right = list(call.args.values())[:2]
    return _product(call, left, right)


@_rule("addmm baddbmm addmv")
def _matmul_with_bias(call: Call) -> AxisState:
    bias, left, right = list(call.args.values())[:3]
    return _product(call, left, right, bias)


@_rule("einsum")
def _einsum(call: Call) -> AxisState:
    equation = call.args["equation"].replace(" ", "")
    if "->" not in equation:
        raise MixedError("an equation without -> has no rule")
    inputs, out = equation.split("->")
    operands = call.args["tensors"]
    terms = [_letters(term, len(call.shape(value))) for term, value in zip(inputs.split(","), operands, strict=True)]
    return contract(call, list(zip(operands, terms, strict=True)), _letters(out, len(call.out)))


def _letters(term: str, rank: int) -> list[str]:
    """Labels of one operand; the dims of an ellipsis are told apart by their distance from its right end."""
    before, dots, after = term.partition("...")
    hidden = rank - len(before) - len(after) if dots else 0
    return [*before, *(f"...{back}" for back in range(hidden, 0, -1)), *after]


@_rule("scaled_dot_product_attention")
def _attention(call: Call) -> AxisState:
    """Query rows stay apart; keys and values are summed over their positions."""
    query, key, value, mask = (call.args[name] for name in ("query", "key", "value", "attn_mask"))
    rank = max(len(call.shape(operand)) for operand in (query, key, value, mask))
    if any(call.state(x).kind == "at" and call.state(x).dim == len(call.shape(x)) - 2 for x in (key, value)):
        raise MixedError("every position reads the keys and values of others")
    batch: list[Any] = [("batch", back) for back in range(rank - 2, 0, -1)]
    # with grouped queries one key head serves several query heads
    shared = [*batch[:-1], "key head"] if call.args["enable_gqa"] and batch else batch

    def right(labels: list[Any], operand: Any) -> list[Any]:
        return labels[len(labels) - len(call.shape(operand)) :]

    operands = [
        (query, right([*batch, "row", "feature"], query)),
        (key, right([*shared, "column", "feature"], key)),
        (value, right([*shared, "column", "value"], value)),
    ]
    if mask is not None:
        operands.append((mask, right([*batch, "row", "column"], mask)))
    return contract(call, operands, [*batch, "row", "value"])


@_rule("embedding")
def _embedding(call: Call) -> AxisState:
    weight, indices = call.args["weight"], call.args["indices"]
    places: list[Hashable] = list(range(len(call.shape(indices))))
    return contract(call, [(weight, ["row", "feature"]), (indices, places)], [*places, "feature"])


@_rule("layer_norm rms_norm")
def _norm_of_last(call: Call) -> AxisState:
    state, shape = call.one()
    if state.dim >= len(shape) - len(call.args["normalized_shape"]):
        raise MixedError("it normalises over the axis")
    return state


@_rule("group_norm")
def _norm_of_groups(call: Call) -> AxisState:
    state, _ = call.one()
    if state.dim != 0:
        raise MixedError("it normalises over the axis")
    return state


@_rule("instance_norm")
def _norm_of_instances(call: Call) -> AxisState:
    state, _ = call.one()
    if state.dim > 1 and call.args["use_input_stats"] is not False:
        raise MixedError("it normalises over the axis")
    return state


@_rule("batch_norm")
def _norm_of_batch(call: Call) -> AxisState:
    state, _ = call.one()
    if state.dim != 1 and call.args["training"] is not False:
        raise MixedError("in training it normalises with statistics of the whole batch", certain=True)
    return state


@_rule(
    "softmax _softmax _safe_softmax log_softmax _log_softmax cumsum cumprod cummax cummin logcumsumexp sort argsort "
    "topk glu diff"
)
def _along(call: Call) -> AxisState:
    """Works along one dim and keeps the others apart."""
    state, shape = call.one()
    if state.dim in call.dims("dim", len(shape)):
        raise MixedError("it runs along the axis")
    return state


@_rule(
    "sum mean amax amin prod any all var std var_mean std_mean logsumexp norm linalg_vector_norm nansum nanmean "
    "count_nonzero argmax argmin median nanmedian mode kthvalue"
)
def _reduce(call: Call) -> AxisState:
    state, shape = call.one()
    if call.args.get("dim") in (None, []):
        raise MixedError("it reduces every dim")
    dims = call.dims("dim", len(shape))
    if state.dim in dims:
        raise MixedError("it reduces the axis")
    gone = 0 if call.args.get("keepdim") else sum(dim < state.dim for dim in dims)
    return AxisState("at", state.dim - gone, state.stride)


@_rule("conv1d conv2d conv3d convolution conv_transpose1d conv_transpose2d conv_transpose3d")
def _convolution(call: Call) -> AxisState:
    """Samples stay apart; positions do where the kernel covers one of them."""
    state, shape = call.one()
    kernel = call.shape(call.args["weight"])[2:]
    batched = len(shape) == len(kernel) + 2
    if batched and state.dim == 0:
        return state
    along = state.dim - (len(shape) - len(kernel))
    if along < 0:
        raise MixedError("it sums over the axis")
    stride, padding = (_for_dim(call.args[name], along) for name in ("stride", "padding"))
    if kernel[along] != 1 or stride != 1 or padding not in (0, "valid", "same"):
        raise MixedError("its kernel covers several positions of the axis")
    return state


def _for_dim(value: Any, i: int) -> Any:
    return value[i if len(value) > 1 else 0] if isinstance(value, (list, tuple)) else value


def _of_last(names: str, count: int) -> None:
    """Rules of operators that mix positions of their last ``count`` dims and treat the others as a batch."""

    @_rule(names)
    def keep_the_others(call: Call) -> AxisState:
        state, shape = call.one()
        if state.dim >= len(shape) - count:
            raise MixedError("it mixes positions of the axis")
        return state


for _rank in (1, 2, 3):
    _pools = [f"{kind}_pool{_rank}d" for kind in ("avg", "max", "adaptive_avg", "adaptive_max", "_adaptive_avg")]
    _sampled = [f"upsample_{kind}{_rank}d" for kind in ("nearest", "_nearest_exact", "linear", "bilinear", "bicubic")]
    _pads = [f"{kind}_pad{_rank}d" for kind in ("reflection", "replication")]
    _of_last(" ".join([*_pools, f"max_pool{_rank}d_with_indices", *_sampled, *_pads]), _rank)
_of_last("upsample_trilinear3d", 3)
_of_last("pixel_shuffle pixel_unshuffle", 3)


@_rule("lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell")
def _cell(call: Call) -> AxisState:
    """One step of a recurrent net: inputs and states ``[B, D]``."""
    inputs = call.only("input", "hx")
    dim, stride = agree((call.state(value).dim, call.state(value).stride) for value in inputs)
    if dim != 0 or any(len(call.shape(value)) != 2 for value in inputs):
        raise MixedError("it sums over the axis")
    return AxisState("at", dim, stride)
