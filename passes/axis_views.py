"""Static axis rules of what only rearranges elements: views, permutations, picks and joins."""

from __future__ import annotations

from collections.abc import Callable
from math import prod

from lbi_compile.passes.axis_calls import AxisState, Call, MixedError, Rule, agree

VIEW_RULES: dict[str, Rule] = {}


def _rule(names: str) -> Callable[[Rule], Rule]:
    def add(rule: Rule) -> Rule:
        VIEW_RULES.update({f"aten.{name}": rule for name in names.split()})
        return rule

    return add


@_rule("view reshape _unsafe_view view_copy flatten unflatten squeeze unsqueeze view_as reshape_as ravel")
def _reshape(call: Call) -> AxisState:
    """Row-major order stays, so the axis is where its step in that order is.

    Element number f of the input is at axis position ``(f // step) % S``. A dim of the result with ``inner`` elements
    below each of its positions holds the axis iff ``inner`` divides ``step`` and no dim above it shifts the position.
    """
    value = call.args[call.first]
    state, shape, out = call.state(value), call.shape(value), call.out
    if "dtype" in call.args and out != shape:
        raise MixedError("it reads the bits as another type")
    if state.kind == "absent":
        return state
    step = state.stride * prod(shape[state.dim + 1 :])
    for dim, count in enumerate(out):
        inner = prod(out[dim + 1 :])
        if step % inner == 0 and (inner * count) % (step * call.size) == 0:
            return AxisState("at", dim, step // inner)
    raise MixedError("it cuts the axis up or leaves a part of it in another dim")


@_rule("permute transpose swapaxes swapdims t movedim moveaxis numpy_T mT")
def _permute(call: Call) -> AxisState:
    state, shape = call.one()
    return AxisState("at", _order(call, len(shape)).index(state.dim), state.stride)


def _order(call: Call, rank: int) -> list[int]:
    """For every dim of the result the dim of the input it shows."""
    order = list(range(rank))
    if "dims" in call.args:
        return call.dims("dims", rank)
    if "source" in call.args:
        source, target = call.dims("source", rank), call.dims("destination", rank)
        rest = iter(dim for dim in order if dim not in source)
        return [source[target.index(dim)] if dim in target else next(rest) for dim in order]
    if len(call.args) == 1:  # t, mT and T without arguments
        return [*order[:-2], *reversed(order[-2:])] if rank == 2 or "mT" in str(call.node.target) else order[::-1]
    (a,), (b,) = (call.dims(name, rank) for name in list(call.args)[1:3])
    order[a], order[b] = order[b], order[a]
    return order


@_rule("expand expand_as broadcast_to repeat tile")
def _repeat(call: Call) -> AxisState:
    """Copies along new or old dims; a repeated axis starts over, as a state allows."""
    value = call.args[call.first]
    state = call.state(value)
    if state.kind == "absent":
        return state
    return AxisState("at", state.dim + len(call.out) - len(call.shape(value)), state.stride)


@_rule("repeat_interleave")
def _repeat_each(call: Call) -> AxisState:
    state, shape = call.one()
    times = call.args.get("repeats")
    if not isinstance(times, int) or call.args.get("dim") is None:
        raise MixedError("it repeats elements by numbers that are no constant")
    return AxisState("at", state.dim, state.stride * (times if state.dim in call.dims("dim", len(shape)) else 1))


@_rule("slice narrow")
def _slice(call: Call) -> AxisState:
    state, shape = call.one()
    if state.dim in call.dims("dim", len(shape)) and call.out[state.dim] != shape[state.dim]:
        raise MixedError("it takes a part of the axis")
    return state


@_rule("select unbind")
def _select(call: Call) -> AxisState:
    state, shape = call.one()
    (dim,) = call.dims("dim", len(shape))
    if dim == state.dim:
        raise MixedError("it picks single positions of the axis")
    return AxisState("at", state.dim - (dim < state.dim), state.stride)


@_rule("split split_with_sizes chunk tensor_split unsafe_split unsafe_split_with_sizes unsafe_chunk")
def _split(call: Call) -> AxisState:
    state, shape = call.one()
    if state.dim in call.dims("dim", len(shape)):
        raise MixedError("it takes parts of the axis")
    return state


@_rule("flip roll")
def _shift(call: Call) -> AxisState:
    state, shape = call.one()
    if state.dim in call.dims("dims", len(shape)):
        raise MixedError("it moves positions of the axis")
    return state


@_rule("unfold")
def _unfold(call: Call) -> AxisState:
    state, shape = call.one()
    if state.dim in call.dims("dimension", len(shape)):
        raise MixedError("its windows cover several positions of the axis")
    return state


@_rule("view_as_real")
def _as_real(call: Call) -> AxisState:
    return call.one()[0]


@_rule("view_as_complex")
def _as_complex(call: Call) -> AxisState:
    state, shape = call.one()
    if state.dim == len(shape) - 1:
        raise MixedError("it pairs positions of the axis")
    return state


@_rule("cat concat concatenate")
def _join(call: Call) -> AxisState:
    dim, stride = agree((call.state(x).dim, call.state(x).stride) for x in call.only("tensors"))
    if dim in call.dims("dim", len(call.out)):
        raise MixedError("it joins values along the axis")
    return AxisState("at", dim, stride)


@_rule("stack")
def _stack(call: Call) -> AxisState:
    dim, stride = agree((call.state(x).dim, call.state(x).stride) for x in call.only("tensors"))
    (new,) = call.dims("dim", len(call.out))
    return AxisState("at", dim + (new <= dim), stride)
