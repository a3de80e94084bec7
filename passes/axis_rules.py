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
from lbi_compile.passes.axis_recurrent import RECURRENT_RULES
from lbi_compile.passes.axis_routing import ROUTING_RULES
from lbi_compile.passes.axis_views import VIEW_RULES
from lbi_compile.passes.axis_windows import WINDOW_RULES
from lbi_compile.passes.names import operator_name

_RULES: dict[str, Rule] = {**VIEW_RULES, **WINDOW_RULES, **ROUTING_RULES, **RECURRENT_RULES}


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
    if not carried:
        return ABSENT
    rule = _rule_of(node)
    if rule is _of_sizes or 0 in (shapes.get(node) or ()):
        return ABSENT
    for state in carried:
        if state.kind == "mixed":
            return state
    try:
        if rule is None:
            raise MixedError("no rule covers it")
        state = rule(Call(node, states, shapes, size=size))
        _check(state, shapes.get(node), size)
    except MixedError as mixed:
        why = f"{operator_name(node)}: {mixed.why}"
        return AxisState("mixed", node=node, why=why, certain=mixed.certain)
    return state


def _rule_of(node: fx.Node) -> Rule | None:
    """The rule of an operator; ``aten.relu_`` has that of ``aten.relu``."""
    if node.target not in _RULE_OF:
        name = operator_name(node)
        rule = _RULES.get(name if name.endswith("__") else name.removesuffix("_"))
        elementwise = torch.Tag.pointwise in getattr(node.target, "tags", ())
        _RULE_OF[node.target] = _elementwise if rule is None and elementwise else rule
    return _RULE_OF[node.target]


_RULE_OF: dict[Any, Rule | None] = {}  # of every operator met, for names and tags are slow to read


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
    "sym_size sym_stride sym_numel sym_storage_offset zeros_like ones_like empty_like rand_like randn_like "
    "randint_like new_zeros new_ones new_empty _assert_tensor_metadata _assert_async _assert_scalar"
)
def _of_sizes(call: Call) -> AxisState:
    """Depends on the sizes and the type of its argument alone, or gives no value: even a mixed one does not matter."""
    return ABSENT


# Elementwise operators without the tag that says so.
@_rule(
    "__and__ __or__ __xor__ rsub subtract multiply divide true_divide floor_divide negative absolute fix ldexp "
    "hardswish greater greater_equal less less_equal not_equal isclose isreal special_erf special_expit "
    "special_expm1 special_log1p special_logit special_gammaln special_xlogy masked_fill fill zero polar complex conj "
    "resolve_conj resolve_neg real imag log_sigmoid tril triu dropout alpha_dropout feature_dropout "
    "feature_alpha_dropout bernoulli normal uniform exponential fake_quantize_per_tensor_affine"
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


@_rule("prelu native_dropout")
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


@_rule("layer_norm native_layer_norm rms_norm _fused_rms_norm")
def _norm_of_last(call: Call) -> AxisState:
    state, shape = call.one()
    if state.dim >= len(shape) - len(call.args["normalized_shape"]):
        raise MixedError("it normalises over the axis", certain=True)
    return state


@_rule("group_norm")
def _norm_of_groups(call: Call) -> AxisState:
    state, _ = call.one()
    if state.dim != 0:
        raise MixedError("it normalises over the axis", certain=state.dim > 1)
    return state


@_rule("instance_norm")
def _norm_of_instances(call: Call) -> AxisState:
    state, _ = call.one()
    if state.dim > 1 and call.args["use_input_stats"] is not False:
        raise MixedError("it normalises over the axis", certain=True)
    return state


@_rule("batch_norm")
def _norm_of_batch(call: Call) -> AxisState:
    state, _ = call.one()
    if state.dim != 1 and call.args["training"] is not False:
        raise MixedError("in training it normalises with statistics of the whole batch", certain=True)
    return state


@_rule(
    "softmax special_softmax _softmax _safe_softmax log_softmax _log_softmax "
    "cumsum cumprod cummax cummin logcumsumexp glu diff "
    "fft_fft fft_ifft fft_rfft fft_irfft fft_hfft fft_ihfft fft_fft2 fft_ifft2 fft_rfft2 fft_irfft2 "
    "fft_fftn fft_ifftn fft_rfftn fft_irfftn fft_fftshift fft_ifftshift"
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
