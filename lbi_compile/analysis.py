"""Analysis: run the passes that look at a captured model, and write down what they found as a plan."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn

from .bounded import Options
from .capture import Capture
from .errors import PlanError
from .interfaces import interface_class, tokens_per_chunk
from .naming import Naming, class_name
from .passes import axes
from .passes.costs import Costs, costs
from .passes.evaluate import Evaluator
from .passes.liveness import LIVE, NUMBER, Liveness, is_float_tensor, liveness
from .passes.partition import Partition, partition
from .passes.separators import Separator, separators
from .passes.validate import NOT_LATER, has_identity_path, settle_interface, settle_readout
from .plan import Decision, Part, PassRecord, Plan
from .summary import capture_why, parts, write_plan

_T = TypeVar("_T")


@dataclass
class Analysis:
    """A captured model and where it is cut.

    Attributes:
        capture: The captured program.
        live: Its liveness.
        costs: Its costs.
        canvas: Node of the canvas.
        ends: Nodes where regions end.
        finishes: Per region its node a_k; ``None`` where no finish is used.
        plan: The record.
        sink: The output with positions (else the first live output).
        position_axis: Its position axis; ``None`` where it has none in common with the canvas.
        splits: The interface splits regions at a_k.
        evaluator: Runs parts of the graph.
    """

    capture: Capture
    live: Liveness
    costs: Costs
    canvas: fx.Node
    ends: tuple[fx.Node, ...]
    finishes: tuple[fx.Node | None, ...]
    plan: Plan
    sink: fx.Node
    position_axis: int | None
    splits: bool
    evaluator: Evaluator = field(repr=False)

    def coupling(self, k: int) -> axes.Verdict:
        """Whether region ``k`` computes every sample by itself (kind ``"position-wise"`` along the batch axis)."""
        start = self.canvas if k == 0 else self.ends[k - 1]
        return _coupling(self.live, self.costs, self.evaluator, start, self.ends[k])

    def dependence(self) -> str | None:
        """How output positions depend on canvas positions in the model; ``None`` without positions or numbers."""
        return _dependence(self.evaluator, self.canvas, self.sink, self.position_axis)

    def probe_bounded(self, function: Callable[[Tensor], Sequence[Any]]) -> str:
        """Dependence of output positions on canvas positions in a bounded model.

        Args:
            function: Maps a canvas to the model's flat outputs.
        """
        (leaves,) = self.capture.graph_module.graph.output_node().args
        assert isinstance(leaves, (tuple, list))
        assert self.position_axis is not None
        index = list(leaves).index(self.sink)
        canvas = self.evaluator.values[self.canvas]
        return _measure(lambda x: function(x)[index], canvas, self.position_axis)


class _Clock:
    """Times the passes for the plan."""

    def __init__(self) -> None:
        self.records: list[PassRecord] = []

    def run(self, name: str, work: Callable[[], _T], summary: Callable[[_T], str]) -> _T:
        start = time.perf_counter()
        result = work()
        self.records.append(PassRecord(name, time.perf_counter() - start, summary(result)))
        return result


def analyse(model: nn.Module, capture: Capture, options: Options) -> Analysis:
    """Run liveness, costs, separators, partition and axes on a captured model, and settle the interface.

    Args:
        model: The captured model, for its name.
        capture: Its captured program.
        options: What was asked for.

    Returns:
        The analysis with its plan.
    """
    if isinstance(options.regions, Plan):
        return locate(model, capture, options.regions)
    gm, clock = capture.graph_module, _Clock()
    leaves = tuple(capture.inputs.leaves)
    live = clock.run("liveness", lambda: liveness(gm), lambda x: f"{len(x.live)} of {len(gm.graph.nodes)} nodes live")
    cost = clock.run("costs", lambda: costs(gm, example=leaves), lambda x: f"{x.total_flops:.3g} FLOPs")
    points = clock.run("separators", lambda: separators(live), lambda x: f"{len(x)} one-lane separators")
    naming = Naming(gm, capture)
    evaluator = Evaluator(gm, live, leaves)
    steps = _Steps(live, cost, evaluator)
    cut = clock.run(
        "partition",
        lambda: _cut(live, points, options, cost, steps, naming),
        lambda x: f"{len(x.ends)} regions among {len(x.candidates)} places",
    )
    edges = [cut.canvas, *cut.ends]
    residual = [has_identity_path(a, b, memory=live.memory) for a, b in zip(edges, cut.ends, strict=False)]
    sink, position_axis = _positions(live, cut.canvas)
    dependence = clock.run(
        "axes",
        lambda: _dependence(evaluator, cut.canvas, sink, position_axis),
        lambda x: f"outputs depend on positions: {x or 'no position axis'}",
    )
    kind, cell, why = settle_interface(
        options.interface,
        options.cell,
        regions=len(cut.ends),
        rank=cut.canvas.meta["val"].dim(),
        positions=position_axis is not None,
        causal=None if dependence is None else dependence in ("causal", "position-wise"),
        residual=all(residual),
    )
    readout, readout_why = settle_readout(
        options.readout,
        interface=kind,
        allowed=interface_class(kind, cell).readouts_for(options.r),
        regions=len(cut.ends),
        residual=all(residual),
    )
    split = interface_class(kind, cell).splits
    finishes = tuple(steps.finish(a, b, points) if split else None for a, b in zip(edges, cut.ends, strict=False))
    length = cost.shape.get(cut.canvas) or (0, 0)
    made = write_plan(
        model, capture, live, cost, naming, cut.canvas, cut.ends, finishes, residual, split,
        interface=kind,
        cell=cell,
        readout=readout,
        r=options.r,
        chunk=tokens_per_chunk(length[1], options.r) if kind == "chunked" else None,
        causal=None if dependence is None else dependence in ("causal", "position-wise"),
        why=(*capture_why(capture), *cut.why, *why, readout_why),
        passes=tuple(clock.records),
    )  # fmt: skip
    return Analysis(capture, live, cost, cut.canvas, cut.ends, finishes, made, sink, position_axis, split, evaluator)


def locate(model: nn.Module, capture: Capture, plan: Plan) -> Analysis:
    """Find the places a plan names in another capture of the same model.

    Raises:
        PlanError: A place is missing, has another shape or divides the layers otherwise; or the plan is of another
            model.
    """
    gm = capture.graph_module
    live = liveness(gm)
    naming = Naming(gm, capture)
    if plan.model != class_name(model):
        raise PlanError(f"a plan of {plan.model}", expected=f"a plan of {class_name(model)}", do="make one with plan()")
    canvas = naming.find(plan.canvas)
    ends = tuple(naming.find(region.end) for region in plan.regions)
    finishes = tuple(naming.find(region.finish) if region.finish else None for region in plan.regions)
    leaves = tuple(capture.inputs.leaves)
    cost = costs(gm, example=leaves)
    _, stem, bodies, head = parts(gm, live, cost, canvas, ends)
    _raise_if_moved(plan, stem, bodies, head)
    sink, position_axis = _positions(live, canvas)
    return Analysis(
        capture, live, cost, canvas, ends, finishes, plan, sink, position_axis,
        interface_class(plan.interface, plan.cell).splits, Evaluator(gm, live, leaves),
    )  # fmt: skip


def _raise_if_moved(plan: Plan, stem: Part, bodies: Sequence[Part], head: Part) -> None:
    """Names of values count occurrences, which an argument that adds an operation may shift: layers tell."""
    here = {path: at for at, part in enumerate((stem, *bodies, head)) for path in part.modules}
    there = {
        path: at
        for at, part in enumerate((plan.stem, *(region.part for region in plan.regions), plan.head))
        for path in part.modules
    }
    for path, at in here.items():
        for known, wanted in there.items():
            related = path == known or path.startswith(known + ".") or known.startswith(path + ".")
            if related and at != wanted:
                places = ("the stem", *(f"region {k}" for k in range(len(bodies))), "the head")
                raise PlanError(
                    f"{path} in {places[at]} of this capture, but in {places[wanted]} of the plan",
                    expected="captures that divide the layers alike",
                    do="transform again with example inputs of this kind: their arguments run other operations",
                )


def _cut(
    live: Liveness, points: Sequence[Separator], options: Options, cost: Costs, steps: _Steps, naming: Naming
) -> Partition:
    if options.regions == 1 and len(points) < 2:
        # one region is the whole model: it needs no separator
        first = next(node for node in live.live if is_float_tensor(node))
        return Partition(first, (live.sinks[-1],), (), (Decision("boundaries", "none", "one region"),))
    wanted: Any = options.regions
    if isinstance(options.regions, tuple):
        wanted = [naming.before_module(path, points) for path in options.regions]
    return partition(
        live,
        points,
        regions=wanted,
        cost={node: cost.flops[node] + cost.bytes[node] for node in live.live},
        flops=cost.flops,
        leaves_finish=steps.position_wise,
        describe=naming.point,
    )


class _Steps:
    """Answers, once each, whether the graph between two neighbouring separators is position-wise."""

    def __init__(self, live: Liveness, cost: Costs, evaluator: Evaluator) -> None:
        self.live, self.cost, self.evaluator = live, cost, evaluator
        self._known: dict[tuple[fx.Node, fx.Node], bool] = {}

    def position_wise(self, source: fx.Node, sink: fx.Node) -> bool:
        key = (source, sink)
        if key not in self._known:
            rank = source.meta["val"].dim()
            self._known[key] = rank == 3 and sink.meta["val"].dim() == 3 and self._classify(source, sink)
        return self._known[key]

    def _classify(self, source: fx.Node, sink: fx.Node) -> bool:
        fn = _measurable(self.evaluator, source, sink)
        verdict = axes.classify(
            _between(self.live, source, sink),
            source=source,
            sink=sink,
            axis_in=1,
            axis_out=1,
            shapes=self.cost.shape,
            fn=fn,
            example=self.evaluator.values[source] if fn else None,
        )
        return verdict.kind == "position-wise"

    def finish(self, start: fx.Node, end: fx.Node, points: Sequence[Separator]) -> fx.Node:
        """The first separator of the region after which all is position-wise; ``end`` where the last op mixes."""
        position = {node: i for i, node in enumerate(self.live.live)}
        inside = [p.node for p in points if position.get(start, -1) < p.position < position[end]]
        found = end
        for before in [*reversed(inside), start]:
            if not self.position_wise(before, found):
                break
            found = before
        return found


def _between(live: Liveness, source: fx.Node, sink: fx.Node) -> list[fx.Node]:
    """Live nodes after ``source`` up to ``sink`` in program order, with the sizes they use."""
    graph = sink.graph
    found, inside = [], False
    for node in graph.nodes:
        if inside and live.kind.get(node) in (LIVE, NUMBER):
            found.append(node)
        inside = inside or node is source
        if node is sink:
            break
    return found


def _measurable(evaluator: Evaluator, source: fx.Node, sink: fx.Node) -> Callable[[Tensor], Tensor] | None:
    """The graph between two nodes as a function; ``None`` for a model without numbers (meta or fake)."""
    real = all(not p.is_meta for p in evaluator.gm.parameters())
    return evaluator.function(source, sink) if real else None


def _coupling(live: Liveness, cost: Costs, evaluator: Evaluator, source: fx.Node, sink: fx.Node) -> axes.Verdict:
    fn = _measurable(evaluator, source, sink)
    return axes.batch_coupling(
        _between(live, source, sink),
        source=source,
        sink=sink,
        shapes=cost.shape,
        fn=fn,
        example=evaluator.values[source] if fn else None,
    )


def _positions(live: Liveness, canvas: fx.Node) -> tuple[fx.Node, int | None]:
    """The output that shares the canvas's position axis, and that axis."""
    value = canvas.meta["val"]
    for sink in live.sinks if value.dim() == 3 else ():
        for axis, size in enumerate(sink.meta["val"].shape[1:], start=1):
            # two fixed sizes may be equal by chance, so without symbols only [B, T, ...] counts
            usual = axis == 1 and sink.meta["val"].dim() >= 3
            if str(size) == str(value.shape[1]) and (isinstance(size, torch.SymInt) or usual):
                return sink, axis
    return live.sinks[0], None


def _dependence(evaluator: Evaluator, canvas: fx.Node, sink: fx.Node, axis: int | None) -> str | None:
    function = _measurable(evaluator, canvas, sink)
    if axis is None or function is None:
        return None
    return _measure(function, evaluator.values[canvas], axis)


def _measure(function: Callable[[Tensor], Tensor], canvas: Tensor, axis: int) -> str:
    """Dependence by gradient, and where that finds none on later positions, by value."""
    kind = axes.probe_axis(function, canvas, axis_in=1, axis_out=axis).kind
    if kind in NOT_LATER and axes.sees_later(function, canvas, axis_in=1, axis_out=axis):
        return "mixed"
    return kind
