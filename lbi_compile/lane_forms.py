"""Lane forms: what is known of each lane, and what a region reads in its place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import Tensor, fx

from .interfaces import canvas_scale
from .interfaces.lanes import PROJECTED, SOURCE, TEMPLATE, AlongAxis, LaneForm
from .naming import Naming
from .passes.lanes import Cut, allocate, ancestors, form
from .passes.layouts import Layout, layout
from .passes.liveness import Liveness, is_float_tensor
from .passes.names import operator_name
from .passes.positions import Outputs
from .plan import Decision, Lane, Plan

# operators through which a residual stream goes on
_STREAM = frozenset(
    f"aten.{name}" for name in ("add", "add_", "dropout", "layer_norm", "rms_norm", "group_norm", "mul", "contiguous")
)


def describe_lanes(
    gm: fx.GraphModule,
    live: Liveness,
    cut: Cut,
    cheap: frozenset[fx.Node],
    outputs: Sequence[Outputs],
    *,
    blind: frozenset[tuple[int, int]],
    naming: Naming,
) -> tuple[Cut, tuple[Lane, ...], tuple[Decision, ...]]:
    """Slots, readers and bases of the lanes of a cut.

    The base of a lane is the latest shared source of its shape that leads to it, one of its own residual stream first;
    else the canvas, pooled and projected to the lane's shape; else, where the outputs look back only and the canvas has
    their positions, a learned template: a pooled canvas would let them see later positions.

    Args:
        gm: Captured graph.
        live: Its liveness.
        cut: Where it is cut.
        cheap: Values to which next to no work leads.
        outputs: The outputs with positions.
        blind: Pairs ``(output, input)``, by index, in which the output sees no later position of the input.
        naming: Names nodes.

    Returns:
        The cut with the bases among its shared sources, the lanes in the order in which they first cross, reasons.
    """
    position = {node: i for i, node in enumerate(live.live)}
    pairs = [
        (_reached(gm, live, index), ancestors(live, [one.sink]), one)
        for one in outputs
        for output, index in blind
        if output == one.index
    ]

    def looks_back_at(node: fx.Node) -> bool:
        return any(node in after and node in before and _has_positions(node, one) for after, before, one in pairs)

    looks_back = frozenset(filter(looks_back_at, cut.crossers))
    slots = allocate(cut, looks_back)
    readers = _readers(live, cut)
    shared = list(cut.shared)
    lanes: list[Lane] = []
    why: list[Decision] = []
    for lane in cut.crossers:
        leading = ancestors(live, [lane])
        fitting = [
            node
            for node in cheap
            if node in leading
            and is_float_tensor(node)
            and form(node) == form(lane)
            and cut.piece[node] < cut.first(lane)
            and node is not lane
        ]
        if cut.canvas in leading or cut.canvas not in position:
            fitting += [cut.canvas] if form(cut.canvas) == form(lane) and is_float_tensor(cut.canvas) else []
        base, source = PROJECTED, 0
        if fitting:
            stream = _stream(live, lane)
            chosen = max(fitting, key=lambda node: (node in stream, position.get(node, -1)))
            base = SOURCE
            if chosen is not cut.canvas:
                if chosen not in shared:
                    shared.append(chosen)
                source = shared.index(chosen) + 1
            reason = f"{naming.point(chosen).name} has its shape and leads to it"
        elif looks_back_at(cut.canvas):
            base, reason = TEMPLATE, "a pooled canvas would show later positions"
        else:
            reason = "no shared value has its shape"
        point = naming.point(lane)
        lanes.append(
            Lane(point, cut.first(lane), cut.last(lane), slots[lane], readers[lane], base, source, lane in looks_back)
        )
        why.append(Decision(f"lane {point.name}", f"{base}, slot {slots[lane]}", reason))
    return replace(cut, shared=tuple(shared)), tuple(lanes), tuple(why)


def _stream(live: Liveness, lane: fx.Node) -> set[fx.Node]:
    """Values that reach a lane through additions, norms, dropouts and scalings alone: its residual stream."""
    found: set[fx.Node] = set()
    pending = [lane]
    while pending:
        node = pending.pop()
        if node in found:
            continue
        found.add(node)
        if operator_name(node) in _STREAM:
            pending += [a for a in live.waits[node] if live.kind.get(a) == "live" and is_float_tensor(a)]
    return found


def _reached(gm: fx.GraphModule, live: Liveness, index: int) -> set[fx.Node]:
    """Nodes that an input leads to."""
    found = {gm.graph.find_nodes(op="placeholder")[index]}
    for node in gm.graph.nodes:
        if any(before in found for before in live.waits.get(node, ())):
            found.add(node)
    return found


def _has_positions(node: fx.Node, output: Outputs) -> bool:
    """One of the axes behind the first has the size of the output's position axis."""
    return output.size in [str(size) for size in node.meta["val"].shape[1:]]


def _readers(live: Liveness, cut: Cut) -> dict[fx.Node, tuple[int, ...]]:
    found: dict[fx.Node, set[int]] = {lane: set() for lane in cut.crossers}
    for node in live.live:
        for before in live.waits[node]:
            if before in found and cut.first(before) <= cut.piece[node] <= cut.last(before):
                found[before].add(cut.piece[node])
    return {lane: tuple(sorted(regions)) for lane, regions in found.items()}


def lane_forms(
    cut: Cut, plan: Plan, outputs: Sequence[Outputs], *, batch: str | None, values: Mapping[fx.Node, Any]
) -> tuple[tuple[LaneForm, ...], LaneForm]:
    """Forms of the lanes, and of the canvas, with the scale of their values in one run.

    Args:
        cut: Where the model is cut.
        plan: Its plan.
        outputs: The outputs with positions.
        batch: The batch size as it prints.
        values: Value of every node.
    """
    canvas = _form(cut.canvas, Lane(plan.canvas, 0, 0, 0, (), SOURCE, 0, False), batch, values, outputs)
    pairs = zip(cut.crossers, plan.lanes, strict=True)
    return tuple(_form(node, lane, batch, values, outputs) for node, lane in pairs), canvas


def _form(
    node: fx.Node, lane: Lane, batch: str | None, values: Mapping[fx.Node, Any], outputs: Sequence[Outputs]
) -> LaneForm:
    shape: Sequence[Any] = node.meta["val"].shape
    found: Layout | AlongAxis = layout(node, batch=batch) if len(shape) > 1 else Layout(0, 0, len(shape))
    if lane.causal:
        sizes = {one.size for one in outputs}
        axis = next(dim for dim, size in enumerate(shape) if dim != found.batch and str(size) in sizes)
        found = AlongAxis(found.batch, axis, len(shape))
    value = values[node]
    assert isinstance(value, Tensor)
    features = [shape[dim] for dim in range(len(shape)) if dim != found.batch and dim not in found.positions]
    return LaneForm(
        layout=found,
        width=prod(int(size) for size in features),
        positions=tuple(None if isinstance(shape[d], torch.SymInt) else int(shape[d]) for d in found.positions),
        base=lane.base,
        source=lane.source,
        causal=lane.causal,
        slot=lane.slot,
        first=lane.first,
        last=lane.last,
        readers=lane.readers,
        scale=canvas_scale(value),
    )
