"""Analysis: run the passes that look at a captured model, and write down what they found as a plan."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import Tensor, fx, nn

from ._torch import paused_collector
from .capture import Capture
from .errors import PlanError
from .interfaces import interface_class, tokens_per_chunk
from .lane_forms import describe_lanes
from .naming import Naming, batch_symbol, class_name
from .options import Options
from .passes import axes
from .passes.costs import Costs, costs
from .passes.evaluate import Evaluator
from .passes.lanes import Cut, cut, main_path, shared_sources
from .passes.layouts import Layout, layout
from .passes.liveness import NUMBER, Liveness, is_float_tensor, liveness
from .passes.partition import Partition, partition
from .passes.positions import Outputs, later_inputs, outputs_along
from .passes.separators import Separator, separators
from .passes.validate import (
    NOT_LATER,
    has_identity_path,
    settle_finish,
    settle_interface,
    settle_lanes,
    settle_readout,
)
from .plan import Decision, Lane, Part, PassRecord, Plan
from .steps import Steps, folded_rank, measurable
from .summary import capture_why, parts, write_plan

_T = TypeVar("_T")
# interfaces that have no form for boundaries of several lanes
ONE_LANE = ("token", "token+chunked", "zero", "self")


@dataclass
class Analysis:
    """A captured model and where it is cut.

    Attributes:
        capture: The captured program.
        live: Its liveness.
        costs: Its costs.
        cut: Canvas, ends, lanes and the piece of every live node.
        finishes: Per region its node a_k; ``None`` where no finish is used.
        plan: The record.
        outputs: The outputs with positions: those of the canvas, or of an input.
        splits: The interface splits regions at a_k.
        evaluator: Runs parts of the graph.
        measured: What ``dependence`` found; empty before it was asked.
    """

    capture: Capture
    live: Liveness
    costs: Costs
    cut: Cut
    finishes: tuple[fx.Node | None, ...]
    plan: Plan
    outputs: tuple[Outputs, ...]
    splits: bool
    evaluator: Evaluator = field(repr=False)
    measured: tuple[str | None, ...] = ()

    @property
    def canvas(self) -> fx.Node:
        """Node of the canvas."""
        return self.cut.canvas

    @property
    def ends(self) -> tuple[fx.Node, ...]:
        """Nodes where regions end."""
        return self.cut.ends

    @property
    def where(self) -> dict[fx.Node, str]:
        """The part of every live node: ``"stem"``, ``"region k"`` or ``"head"``."""
        count = len(self.ends)
        return {
            node: "stem" if k < 0 else "head" if k == count else f"region {k}" for node, k in self.cut.piece.items()
        }

    def layout(self, node: fx.Node) -> Layout:
        """Which dims of a value are samples, features and positions."""
        return layout(node, batch=batch_symbol(self.capture.graph_module))

    def coupling(self, k: int) -> axes.Verdict:
        """Whether region ``k`` computes every sample by itself (kind ``"position-wise"`` along the batch axis)."""
        sources = (self.canvas,) if k == 0 else self.cut.lanes[k - 1]
        sinks = self.cut.lanes[k] if k < len(self.cut.lanes) else (self.ends[k],)
        nodes = [node for node, piece in self.cut.piece.items() if piece == k]
        verdict = axes.Verdict("position-wise", "static", "the region makes none of the values that leave it")
        for source in sources:
            for sink in sinks:
                if self.cut.piece[sink] != k:
                    continue
                verdict = self._coupling(nodes, source, sink)
                if verdict.kind != "position-wise":
                    return verdict
        return verdict

    def _coupling(self, inside: Sequence[fx.Node], source: fx.Node, sink: fx.Node) -> axes.Verdict:
        fn = measurable(self.evaluator, source, sink, inside)
        return axes.batch_coupling(
            _with_numbers(self.live, inside, source, sink),
            source=source,
            sink=sink,
            shapes=self.costs.shape,
            fn=fn,
            example=self.evaluator.values[source] if fn else None,
            **_batch_dims(self.layout(source), self.layout(sink)),
        )

    def dependence(self) -> str | None:
        """How output positions depend on positions in the model; ``None`` without positions or numbers."""
        if not self.measured:
            self.measured = (_dependence(self.evaluator, self.cut, self.outputs)[0],)
        return self.measured[0]

    def probe_bounded(self, canvas_fn: Callable[[Tensor], Sequence[Any]], run: Callable[[list[Any]], list[Any]]) -> str:
        """Dependence of output positions on canvas and input positions in a bounded model.

        Args:
            canvas_fn: Maps a canvas to the model's flat outputs.
            run: Maps input leaves to the model's flat outputs.
        """
        found, along = "position-wise", _of_canvas(self.outputs)
        if along is not None and self.cut.uniform:
            found = _measure(lambda x: canvas_fn(x)[along.index], self.evaluator.values[self.canvas], along)
        if found in NOT_LATER and _by_inputs(self.cut, self.outputs):
            leaves = self.capture.inputs.leaves
            _, blind = later_inputs(self.evaluator.outputs, leaves, self.outputs)
            sees, _ = later_inputs(run, leaves, self.outputs)
            found = "mixed" if blind & sees else "causal"
        return found


class _Clock:
    """Times the passes for the plan."""

    def __init__(self) -> None:
        self.records: list[PassRecord] = []

    def run(self, name: str, work: Callable[[], _T], summary: Callable[[_T], str]) -> _T:
        start = time.perf_counter()
        result = work()
        self.records.append(PassRecord(name, time.perf_counter() - start, summary(result)))
        return result


@paused_collector()
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
    _, main = main_path(live, cost.flops)
    points = clock.run("separators", lambda: separators(live, main=main), lambda x: f"{len(x)} one-lane separators")
    naming = Naming(gm, capture)
    evaluator = Evaluator(gm, live, leaves, keep=[point.node for point in points])
    steps = Steps(live, cost, evaluator, batch_symbol(gm))
    found = clock.run(
        "partition",
        lambda: _cut(live, points, options, cost, steps, naming, main),
        lambda x: f"{len(x.ends)} regions, {sum(map(len, x.cut.lanes))} lanes",
    )
    made_cut = found.cut
    edges = [made_cut.canvas, *made_cut.ends]
    uniform = made_cut.uniform
    residual = [
        uniform and has_identity_path(a, b, memory=live.memory) for a, b in zip(edges, made_cut.ends, strict=False)
    ]
    outputs = outputs_along(gm, live, made_cut.canvas, batch=batch_symbol(gm))
    dependence = clock.run(
        "axes",
        lambda: _dependence(evaluator, made_cut, outputs),
        lambda x: f"outputs depend on positions: {x[0] or 'no position axis'}",
    )
    dependence, blind = dependence
    causal = None if dependence is None else dependence in NOT_LATER
    lanes: tuple[Lane, ...] = ()
    lane_why: tuple[Decision, ...] = ()
    if uniform:
        kind, cell, why = settle_interface(
            options.interface,
            options.cell,
            regions=len(made_cut.ends),
            rank=folded_rank(made_cut.canvas),
            positions=_of_canvas(outputs) is not None,
            causal=causal,
            residual=all(residual),
        )
    else:
        # pooled on demand is the published form, which has no chunks: its leak is measured later
        blind = frozenset() if options.interface == "pooled" else blind
        made_cut, lanes, lane_why = describe_lanes(
            gm, live, made_cut, shared_sources(live, cost.flops), outputs, blind=blind, naming=naming
        )
        kind, cell, why = settle_lanes(options.interface, options.cell, causal=any(lane.causal for lane in lanes))
    readout, readout_why = settle_readout(
        options.readout,
        interface=kind,
        allowed=interface_class(kind, cell).readouts_for(options.r) if uniform else ("last",),
        regions=len(made_cut.ends),
        residual=uniform and all(residual),
    )
    split = uniform and interface_class(kind, cell).splits
    own = settle_finish(options.finish, interface=kind, splits=split)
    begins = (lambda _, end, __: end) if own else steps.finish
    finishes = tuple(begins(a, b, points) if split else None for a, b in zip(edges, made_cut.ends, strict=False))
    length = _length(made_cut, cost, outputs, lanes)
    width = options.r // (1 + max((lane.slot for lane in lanes), default=0)) or 1
    made = write_plan(
        model, capture, live, cost, naming, made_cut, finishes, residual, split, own,
        interface=kind,
        cell=cell,
        readout=readout,
        r=options.r,
        chunk=tokens_per_chunk(length, width) if kind in ("chunked", "token+chunked") else None,
        causal=causal,
        lanes=lanes,
        why=(*capture_why(capture), *found.why, *lane_why, *why, readout_why),
        passes=tuple(clock.records),
    )  # fmt: skip
    return Analysis(capture, live, cost, made_cut, finishes, made, outputs, split, evaluator, measured=(dependence,))


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
    _, main = main_path(live, cost.flops)
    shared = tuple(naming.find(point) for point in plan.shared)
    whole = len(ends) == 1 and not plan.lanes
    found = cut(
        live,
        main=main,
        canvas=canvas,
        lanes=[[naming.find(point) for point in points] for points in plan.crossings],
        ends=ends,
        gather=None if plan.gather is None else naming.find(plan.gather),
        shared=frozenset(shared) | (shared_sources(live, cost.flops) if shared or plan.lanes else frozenset()),
        bases=shared,
    )
    if len(found.shared) != len(shared) and not whole:
        raise PlanError(
            f"{len(found.shared)} shared values in this capture, {len(shared)} in the plan",
            expected="captures in which regions read the same values",
            do="transform again with example inputs of this kind",
        )
    _, stem, bodies, head = parts(gm, live, cost, found)
    _raise_if_moved(plan, stem, bodies, head)
    outputs = outputs_along(gm, live, canvas, batch=batch_symbol(gm))
    splits = not plan.lanes and interface_class(plan.interface, plan.cell).splits
    evaluator = Evaluator(gm, live, leaves, keep=(canvas, *ends, *found.crossers))
    return Analysis(capture, live, cost, found, finishes, plan, outputs, splits, evaluator)


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
    live: Liveness,
    points: Sequence[Separator],
    options: Options,
    cost: Costs,
    steps: Steps,
    naming: Naming,
    main: frozenset[fx.Node],
) -> Partition:
    if options.regions == 1 and len(points) < 2:
        # one region is the whole model: it needs no separator
        first = next(node for node in live.live if is_float_tensor(node))
        sink, _ = main_path(live, cost.flops)
        whole = cut(live, main=main, canvas=first, lanes=(), ends=(sink,))
        return Partition(whole, (), (Decision("boundaries", "none", "one region"),))
    wanted: Any = options.regions
    starts: tuple[fx.Node, ...] = ()
    if isinstance(options.regions, tuple):
        wanted = [naming.before_module(path, points) for path in options.regions]
        starts = tuple(naming.start_of(path, main) for path in options.regions)
    return partition(
        live,
        points,
        regions=wanted,
        cost={node: cost.flops[node] + cost.bytes[node] for node in live.live},
        flops=cost.flops,
        leaves_finish=steps.position_wise,
        describe=naming.point,
        starts=starts,
        one_lane=options.interface in ONE_LANE,
    )


def _with_numbers(live: Liveness, inside: Sequence[fx.Node], source: fx.Node, sink: fx.Node) -> list[fx.Node]:
    """Nodes of a region with the sizes they use, in program order."""
    kept = set(inside)
    return [node for node in sink.graph.nodes if node in kept or live.kind.get(node) == NUMBER]


def _batch_dims(source: Layout, sink: Layout) -> dict[str, int]:
    """Arguments for ``batch_coupling`` where samples are not counted by dim 0."""
    return {} if source.batch == sink.batch == 0 else {"axis_in": source.batch, "axis_out": sink.batch}


def _length(found: Cut, cost: Costs, outputs: Sequence[Outputs], lanes: Sequence[Lane]) -> int:
    """Length at the example inputs of the position axis that causal lanes have, else the canvas."""
    for node, lane in zip(found.crossers, lanes, strict=False):
        if lane.causal:
            sizes = [str(size) for size in node.meta["val"].shape]
            return next(one.length for one in outputs if one.size in sizes[1:])
    shape = cost.shape.get(found.canvas) or (0, 0)
    return shape[1] if len(shape) > 1 else 1


def _of_canvas(outputs: Sequence[Outputs]) -> Outputs | None:
    """The first output with the positions of the canvas."""
    return next((one for one in outputs if one.canvas is not None), None)


def _by_inputs(found: Cut, outputs: Sequence[Outputs]) -> bool:
    """Positions enter by other ways than the canvas too."""
    return not found.uniform or bool(found.shared) or _of_canvas(outputs) is None


def _dependence(
    evaluator: Evaluator, found: Cut, outputs: Sequence[Outputs]
) -> tuple[str | None, frozenset[tuple[int, int]]]:
    """How outputs depend on positions, and pairs of output and input that see no later ones (where inputs count)."""
    nothing: frozenset[tuple[int, int]] = frozenset()
    if not outputs or not evaluator.has_numbers:
        return None, nothing
    kind, along = "position-wise", _of_canvas(outputs)
    if along is not None and found.uniform:
        function = evaluator.function(found.canvas, along.sink)
        kind = _measure(function, evaluator.values[found.canvas], along)
    if kind not in NOT_LATER or not _by_inputs(found, outputs):
        return kind, nothing
    _, blind = later_inputs(evaluator.outputs, evaluator.leaves, outputs)
    return "causal" if blind else "mixed", blind


def _measure(function: Callable[[Tensor], Tensor], canvas: Tensor, outputs: Outputs) -> str:
    """Dependence by gradient, and where that finds none on later positions, by value."""
    form = outputs.canvas
    assert form is not None

    def folded(x: Tensor) -> Tensor:
        return outputs.fold(function(form.unfold(x, canvas.shape)))

    example = form.fold(canvas)
    kind = axes.probe_axis(folded, example, axis_in=1, axis_out=1).kind
    if kind in NOT_LATER and axes.sees_later(folded, example, axis_in=1, axis_out=1):
        return "mixed"
    return kind
