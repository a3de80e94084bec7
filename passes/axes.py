"""Axes: does a value mix the positions (or the samples) of another, proven by static rules or measured by a probe.

Contract: nodes of a captured graph, or a function that runs them, in; a frozen verdict out. Nothing is changed: the
random state is put back after a probe. Unsure means coupled.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from math import prod

import torch
from torch import Tensor, fx

from lbi_compile.errors import BatchCouplingError
from lbi_compile.passes.axis_calls import AxisState, Shapes
from lbi_compile.passes.axis_probes import (
    ANTICAUSAL,
    CAUSAL,
    MIXED,
    POSITION_WISE,
    Verdict,
    contradicts,
    probe_axis,
    sees_later,
)
from lbi_compile.passes.axis_rules import follow
from lbi_compile.passes.axis_writes import settle_writes
from lbi_compile.passes.layouts import Layout
from lbi_compile.passes.names import describe, operator_name

__all__ = [
    "ANTICAUSAL",
    "CAUSAL",
    "MIXED",
    "POSITION_WISE",
    "Verdict",
    "batch_coupling",
    "batch_couplings",
    "classify",
    "classify_positions",
    "coupling_error",
    "probe_axis",
    "sees_later",
    "trace_axis",
]


ALL_KINDS = (POSITION_WISE, CAUSAL, ANTICAUSAL)


def trace_axis(
    nodes: Iterable[fx.Node],
    *,
    source: fx.Node,
    axis: int,
    shapes: Shapes,
    stride: int = 1,
    size: int | None = None,
) -> Mapping[fx.Node, AxisState]:
    """Follow one axis of ``source`` through ``nodes``.

    Sound: a node is only said to carry the axis where every element at axis position t depends by value on nothing of
    ``source`` but its positions t. Reads of nodes outside ``nodes`` count as independent of ``source``.

    Args:
        nodes: Nodes in program order.
        source: The node whose axis is followed.
        axis: Which of its dims.
        shapes: Sizes of every node that gives one tensor (``Costs.shape``), taken where the sizes of different axes
            differ: a view that swaps two axes of equal size cannot be told from one that keeps them.
        stride: Positions of the dim for one step of the axis, where the axis is a part of the dim (the rows of
            flattened pixels).
        size: Positions of such a part.

    Returns:
        A state for ``source`` and for every node.

    Example:
        >>> trace_axis(region, source=canvas, axis=1, shapes=record.shape)[end]
        AxisState(kind='at', dim=1, stride=1, ...)
    """
    shape = shapes[source]
    assert shape is not None
    size = shape[axis] if size is None else size
    states: dict[fx.Node, AxisState] = {}
    if size < 2:
        states[source] = AxisState("mixed", node=source, why=_SINGLE)
    else:
        states[source] = AxisState("at", dim=axis % len(shape), stride=stride)
    spoilt: AxisState | None = None
    nodes = [node for node in nodes if node is not source]
    ahead = set(nodes)
    for node in nodes:
        ahead.discard(node)
        states[node] = spoilt or follow(node, states, shapes, size=size)
        spoilt = spoilt or settle_writes(node, states, ahead)
    return states


_SINGLE = "an axis of size 1 cannot be followed"


def classify(
    nodes: Iterable[fx.Node],
    *,
    source: fx.Node,
    sink: fx.Node,
    axis_in: int,
    axis_out: int,
    shapes: Shapes,
    fn: Callable[[Tensor], Tensor] | None = None,
    example: Tensor | None = None,
    kinds: Collection[str] = ALL_KINDS,
) -> Verdict:
    """How ``sink`` depends on ``source`` along an axis: static rules first, a probe where they are unsure.

    Args:
        nodes: Nodes between them, in program order, ``sink`` included.
        source: The node that is read.
        sink: The node that reads.
        axis_in: Dim of ``source``.
        axis_out: Dim of ``sink``.
        shapes: Sizes of every node that gives one tensor (``Costs.shape``).
        fn: Runs ``nodes``: value of ``source`` to value of ``sink``.
        example: A value of ``source``.
        kinds: Kinds that make a difference to the caller; all others may be called ``"mixed"``.

    Returns:
        The verdict; ``"mixed"`` where the rules are unsure and no ``fn`` is given, so that it proves no mixing.
    """
    state = trace_axis(nodes, source=source, axis=axis_in, shapes=shapes)[sink]
    found = _proven(state, source, sink, axis_in, axis_out, shapes)
    return found if isinstance(found, Verdict) else _measured(found, fn, example, axis_in, axis_out, kinds)


def _proven(
    state: AxisState, source: fx.Node, sink: fx.Node, axis_in: int, axis_out: int, shapes: Shapes
) -> Verdict | AxisState:
    """The verdict that a state of ``sink`` proves, or what is to be measured."""
    whole, part = shapes[source], shapes[sink]
    assert whole is not None
    if state.kind == "absent":
        return _UNRELATED
    if state.kind == "at":
        assert part is not None
        if state.dim == axis_out % len(part) and part[axis_out] == whole[axis_in]:
            return _APART
        state = _elsewhere(state, sink, part)
    if part is not None and part[axis_out] != whole[axis_in]:
        return _of_other_size(whole[axis_in], part[axis_out], state)
    return state


_UNRELATED = Verdict(POSITION_WISE, "static", "does not depend on the source")
_APART = Verdict(POSITION_WISE, "static", "every operator on the way keeps the positions apart")


def _elsewhere(state: AxisState, sink: fx.Node, shape: Sequence[int]) -> AxisState:
    """An axis that is kept, but not where it is looked for."""
    why = f"the axis leaves {operator_name(sink)} as dim {state.dim} of {list(shape)}"
    return AxisState("mixed", node=sink, why=why)


def _of_other_size(before: int, after: int, state: AxisState) -> Verdict:
    return Verdict(MIXED, "static", f"{before} input positions, but {after} output positions; {state.why}", state.node)


def _measured(
    state: AxisState,
    fn: Callable[[Tensor], Tensor] | None,
    example: Tensor | None,
    axis_in: int,
    axis_out: int,
    kinds: Collection[str] = ALL_KINDS,
) -> Verdict:
    """The probe's verdict where the rules give a state of kind ``"mixed"``."""
    if state.certain or fn is None or example is None:
        why = state.why if state.certain else f"{state.why}; unsure counts as mixed"
        return Verdict(MIXED, "static", why, state.node)
    found = probe_axis(fn, example, axis_in=axis_in, axis_out=axis_out, kinds=kinds)
    if found.kind != MIXED and contradicts(found.kind, fn, example, axis_in=axis_in, axis_out=axis_out):
        found = Verdict(MIXED, "probe", f"{found.why}, but values of other positions change the result")
    return found if found.kind == POSITION_WISE else replace(found, why=f"{found.why}; {state.why}", node=state.node)


def classify_positions(
    nodes: Iterable[fx.Node],
    *,
    source: fx.Node,
    sink: fx.Node,
    source_layout: Layout,
    sink_layout: Layout,
    shapes: Shapes,
    fn: Callable[[Tensor], Tensor] | None = None,
    example: Tensor | None = None,
) -> Verdict:
    """How ``sink`` depends on ``source`` along all position axes at once: rows and columns of an image, say.

    Positions are those of the folded values (``Layout.fold``), in row-major order; an image and its flattened pixels
    have the same. Each axis is followed by the static rules, all are measured together where one is unproven.

    Args:
        nodes: Nodes between them, in program order, ``sink`` included.
        source: The node that is read.
        sink: The node that reads.
        source_layout: Which dims of ``source`` are positions.
        sink_layout: Which dims of ``sink`` are.
        shapes: Sizes of every node that gives one tensor (``Costs.shape``).
        fn: Runs ``nodes``: value of ``source`` to value of ``sink``, both unfolded.
        example: A value of ``source``.

    Returns:
        The verdict, ``"position-wise"`` where position p of ``sink`` reads position p of ``source`` alone; ``"causal"``
        and ``"anticausal"`` are measured, and meant in row-major order.

    Example:
        >>> image = Layout(batch=0, width=1, rank=4)
        >>> classify_positions(
        ...     nodes, source=a, sink=h, source_layout=image, sink_layout=image, shapes=record.shape
        ... ).kind
        'position-wise'
    """
    nodes, whole, part = list(nodes), shapes[source], shapes[sink]
    assert whole is not None
    assert part is not None
    before = [whole[dim] for dim in source_layout.positions]
    after = [part[dim] for dim in sink_layout.positions]
    if prod(before) != prod(after):
        state = AxisState("mixed", node=sink, why=f"{operator_name(sink)} gives others")
        return _of_other_size(prod(before), prod(after), state)
    if _has_single(source, source_layout, whole):
        return _measured(AxisState("mixed", node=source, why=_SINGLE), None, None, 1, 1)
    states = [
        _placed(
            trace_axis(nodes, source=source, axis=dim, shapes=shapes, stride=stride, size=size)[sink],
            sink,
            sink_layout,
            part,
            below=stride * prod(before[source_layout.positions.index(dim) + 1 :]),
        )
        for dim, stride, size in _pieces(source_layout.positions, before, after)
    ]
    mixed = sorted((state for state in states if state.kind == "mixed"), key=lambda state: not state.certain)
    if not mixed:
        return _APART if any(state.kind == "at" for state in states) else _UNRELATED
    if fn is None or example is None:
        return _measured(mixed[0], None, None, 1, 1)
    run, native = fn, example

    def folded(x: Tensor) -> Tensor:
        # in the memory order of the example, which the graph may rely on
        return sink_layout.fold(run(torch.empty_like(native).copy_(source_layout.unfold(x, native.shape))))

    return _measured(mixed[0], folded, source_layout.fold(example), 1, 1)


def _has_single(source: fx.Node, layout: Layout, shape: Sequence[int]) -> bool:
    """There is only one position here, or along an axis that may have more elsewhere."""
    value = source.meta.get("val")
    sizes = value.shape if isinstance(value, Tensor) else [None] * len(shape)
    single = [dim for dim in layout.positions if shape[dim] == 1]
    return len(single) == len(layout.positions) or any(not isinstance(sizes[dim], int) for dim in single)


def _placed(state: AxisState, sink: fx.Node, layout: Layout, shape: Sequence[int], *, below: int) -> AxisState:
    """The state, mixed where the axis is not in a position dim of ``sink`` with ``below`` positions in each step."""
    if state.kind != "at":
        return state
    inner = prod(shape[dim] for dim in layout.positions if dim > state.dim)
    return state if state.dim in layout.positions and state.stride * inner == below else _elsewhere(state, sink, shape)


def _pieces(dims: Sequence[int], before: Sequence[int], after: Sequence[int]) -> list[tuple[int, int, int]]:
    """Axes of more than one position to follow, each a dim of the source with stride and size.

    A dim is cut where the sink cuts its positions, if the two ways go together.
    """
    cuts = sorted(_inner(before) | _inner(after))
    if any(b % a for a, b in pairwise(cuts)):
        cuts = sorted(_inner(before))
    found = []
    for i, dim in enumerate(dims):
        inner = prod(before[i + 1 :])
        inside = [cut for cut in cuts if inner <= cut <= inner * before[i]]
        found += [(dim, a // inner, b // a) for a, b in pairwise(inside)]
    return found


def _inner(sizes: Sequence[int]) -> set[int]:
    """How many positions are below each step of the dims, and all of them."""
    return {prod(sizes[i:]) for i in range(len(sizes) + 1)}


def batch_coupling(
    nodes: Iterable[fx.Node],
    *,
    source: fx.Node,
    sink: fx.Node,
    shapes: Shapes,
    axis_in: int = 0,
    axis_out: int = 0,
    fn: Callable[[Tensor], Tensor] | None = None,
    example: Tensor | None = None,
) -> Verdict:
    """Whether the samples of ``source`` are mixed on the way to ``sink``; arguments as for ``classify``.

    Returns:
        ``"position-wise"`` where they are not, else ``"mixed"`` with the node to blame.
    """
    found = classify(
        nodes,
        source=source,
        sink=sink,
        axis_in=axis_in,
        axis_out=axis_out,
        shapes=shapes,
        fn=fn,
        example=example,
        kinds=(POSITION_WISE,),
    )
    return _coupled(found)


def batch_couplings(
    nodes: Iterable[fx.Node],
    *,
    source: fx.Node,
    sinks: Mapping[fx.Node, int],
    shapes: Shapes,
    axis_in: int = 0,
    function: Callable[[fx.Node], Callable[[Tensor], Tensor] | None] | None = None,
    example: Tensor | None = None,
) -> dict[fx.Node, Verdict]:
    """``batch_coupling`` for several sinks with one pass over the nodes.

    Args:
        nodes: Nodes between them, in program order, every sink included.
        source: The node that is read.
        sinks: The nodes that read, each with the dim of its samples.
        shapes: Sizes of every node that gives one tensor (``Costs.shape``).
        axis_in: Dim of the samples of ``source``.
        function: For a sink what runs ``nodes``: value of ``source`` to value of the sink. Only asked where the rules
            are unsure.
        example: A value of ``source``.

    Returns:
        A verdict for each sink.
    """
    states = trace_axis(nodes, source=source, axis=axis_in, shapes=shapes)
    verdicts = {}
    for sink, axis_out in sinks.items():
        found = _proven(states[sink], source, sink, axis_in, axis_out, shapes)
        if not isinstance(found, Verdict):
            fn = None if function is None or found.certain else function(sink)
            found = _measured(found, fn, example, axis_in, axis_out, (POSITION_WISE,))
        verdicts[sink] = _coupled(found)
    return verdicts


def _coupled(found: Verdict) -> Verdict:
    return found if found.kind == POSITION_WISE else replace(found, kind=MIXED)


def coupling_error(node: fx.Node) -> BatchCouplingError:
    """The error for an operator that mixes the samples of a batch; it names the module and the source line.

    Args:
        node: The node to blame (``Verdict.node``).

    Example:
        >>> raise coupling_error(verdict.node)
    """
    of_batch = "batch_norm" in operator_name(node)
    cure = "use LayerNorm, GroupNorm or model.eval()" if of_batch else "rewrite it so that every sample stands alone"
    return BatchCouplingError(
        f"{describe(node)} mixes the samples of a batch",
        expected="regions that treat every sample alone, so that each has interface Jacobians of its own",
        do=f'use backward="chain", which needs no independent samples, or {cure}',
    )
