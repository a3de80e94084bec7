"""Checks of static axis rules against what results really depend on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from hypothesis import HealthCheck
from torch import Tensor, fx, nn

from lbi_compile.passes.axes import probe_axis, trace_axis
from lbi_compile.passes.axis_calls import AxisState
from tests.random_graphs import Builder, changed

# Of hypothesis: the same examples in every run, however slow the machine.
PROPERTY: Any = {"deadline": None, "suppress_health_check": list(HealthCheck), "derandomize": True, "database": None}


def shapes_of(build: Builder) -> dict[fx.Node, tuple[int, ...] | None]:
    """Sizes of every node, whose values are noted as a captured graph has them."""
    for node, value in build.values.items():
        node.meta["val"] = value
    return {node: tuple(v.shape) if isinstance(v, Tensor) else None for node, v in build.values.items()}


def calls(build: Builder) -> list[fx.Node]:
    """The operators of a graph."""
    return [node for node in build.graph.nodes if node.op == "call_function"]


def trace(build: Builder, axis: int) -> Mapping[fx.Node, AxisState]:
    """States of all nodes for an axis of the source."""
    return trace_axis(calls(build), source=build.source, axis=axis, shapes=shapes_of(build))


def brief(state: AxisState) -> str:
    """Where a value holds the axis: a dim, ``dim/stride``, ``-`` mixed, ``!`` surely mixed, ``a`` absent."""
    if state.kind != "at":
        return {"absent": "a", "mixed": "!" if state.certain else "-"}[state.kind]
    return str(state.dim) if state.stride == 1 else f"{state.dim}/{state.stride}"


def single_call(call: Callable[[Builder, fx.Node], fx.Node | None]) -> tuple[Builder, fx.Node, list[str]]:
    """One call on a source ``[2, 3, 4]``: the graph, its last node, and where that holds each axis of the source."""
    build = Builder((2, 3, 4))
    node = call(build, build.source)
    assert node is not None, "the call does not run"
    return build, node, [brief(trace(build, axis)[node]) for axis in range(3)]


def check(gm: fx.GraphModule, build: Builder) -> None:
    """Every state against what changes when the source does, and a proof for the output against the probe."""
    sink = gm.graph.output_node().all_input_nodes[0]
    writes = any("_." in str(node.target) for node in gm.graph.nodes)
    for axis, size in enumerate(build.x.shape):
        states = trace(build, axis)
        for position in range(size):
            for node, mask in changed(gm, build, axis=axis, position=position).items():
                state = states.get(node)
                if state is None or state.kind == "mixed":
                    continue
                allowed = torch.zeros_like(mask)
                if state.kind == "at":
                    allowed |= _kept_index(state, mask.shape, size) == position
                assert not (mask & ~allowed).any(), f"axis {axis} of {node} is no {state}:\n{gm.graph}"
        last = states[sink]
        if last.kind == "at" and last.stride == 1 and build.values[sink].shape[last.dim] == size and not writes:
            found = probe_axis(function(gm, build), build.x, axis_in=axis, axis_out=last.dim)
            assert found.kind == "position-wise" or "NaN" in found.why, f"{found}\n{gm.graph}"


def function(gm: fx.GraphModule, build: Builder) -> Any:
    """The graph as a function of its source."""
    return partial(_call_with, gm, [value.clone() for value in build.constants])


def _kept_index(state: AxisState, shape: torch.Size, size: int) -> Tensor:
    """Axis position of every element by the definition of ``AxisState``."""
    index = torch.arange(shape[state.dim]) // state.stride % size
    return index.view([-1 if i == state.dim else 1 for i in range(len(shape))])


def _call_with(gm: fx.GraphModule, constants: list[Tensor], x: Tensor) -> Tensor:
    torch.manual_seed(0)
    return gm(x, *constants)


def module(build: Builder, node: fx.Node) -> fx.GraphModule:
    """The graph with ``node`` as its output."""
    build.graph.output(node)
    return fx.GraphModule(nn.Module(), build.graph)
