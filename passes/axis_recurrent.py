"""Static axis rules of recurrent nets: every sample has a state of its own, time steps read those before them."""

from __future__ import annotations

from typing import Any

from torch import fx

from lbi_compile.passes.axis_calls import AxisState, Call, MixedError, Rule, agree
from lbi_compile.passes.names import operator_name

_NETS = ("aten.lstm", "aten.gru", "aten.rnn_tanh", "aten.rnn_relu")
_CELLS = ("aten.lstm_cell", "aten.gru_cell", "aten.rnn_tanh_cell", "aten.rnn_relu_cell")


def _net(call: Call) -> AxisState:
    """A whole net on inputs `[B, T, D]` or `[T, B, D]`, with initial states `[L, B, D]`."""
    call.only("input", "hx")
    samples = 0 if call.args["batch_first"] else 1
    found = []
    for name, dim in (("input", samples), ("hx", 1)):
        for state in map(call.state, call.carriers(name)):
            if state.dim != dim:
                raise MixedError("it runs along the axis" if state.dim < 2 else "it sums over the axis")
            found.append((samples, state.stride))
    return AxisState("at", *agree(found))


def _cell(call: Call) -> AxisState:
    """One step: inputs and states `[B, D]`."""
    inputs = call.only("input", "hx")
    dim, stride = agree((call.state(value).dim, call.state(value).stride) for value in inputs)
    if dim != 0 or any(len(call.shape(value)) != 2 for value in inputs):
        raise MixedError("it sums over the axis")
    return AxisState("at", dim, stride)


def _result(call: Call) -> AxisState:
    """One of the results of an operator, whose rule speaks for all of them; but last states are `[L, B, D]`."""
    source, index = call.node.args[:2]
    if call.is_tensor(source):
        raise MixedError("an index into a tensor has no rule")
    state: Any = call.state(source)
    last = isinstance(source, fx.Node) and operator_name(source) in _NETS and index != 0
    return AxisState("at", 1, state.stride) if last and state.kind == "at" else state


RECURRENT_RULES: dict[str, Rule] = {
    **dict.fromkeys(_NETS, _net),
    **dict.fromkeys(_CELLS, _cell),
    "getitem": _result,
}
