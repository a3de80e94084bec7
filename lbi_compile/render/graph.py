"""A partition as plain data that can be drawn: nodes with their part and role, edges, parts and boundaries.

``picture`` is the only function that knows about captured graphs; everything that draws reads its ``Picture``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from lbi_compile.naming import Naming
from lbi_compile.passes.liveness import CONSTANT, INPUT, LIVE, PARAMETER_ONLY, is_float_tensor
from lbi_compile.passes.names import module_path, operator_name
from lbi_compile.plan import EXACT, Lane, Part, Plan, RegionPlan
from lbi_compile.quantities import count, size

from .text import shape

if TYPE_CHECKING:  # the record itself needs no torch
    from torch import fx

    from lbi_compile.analysis import Analysis

PROLOGUE, STEM, HEAD = "prologue", "stem", "head"
# what a node can be, besides an operator, and what that means
ROLES = {
    "input": "input of the model",
    "canvas": "canvas: every region may read it",
    "shared": "shared source: next to free to compute, so every region may read it",
    "lane": "lane: crosses a boundary as a latent",
    "finish": "finish: from here on the region is position-wise",
    "tap": "tap: the head or the output reads it past a boundary, which makes it no lane",
    "output": "output of the model",
}


class Scope(NamedTuple):
    """One call of a module that was running.

    Attributes:
        path: Path of the module; repeated calls of one module end in ``@1``, ``@2`` and so on.
        kind: Name of its class.
    """

    path: str
    kind: str


@dataclass(frozen=True, slots=True)
class Node:
    """One operator (or input) of the captured program.

    Attributes:
        name: Readable name, for example ``blocks.3:add[1]``.
        operator: For example ``aten.add``; ``input`` for an input of the model.
        scope: The modules whose forward was running, outermost first.
        module: Path of the innermost of them.
        shape: Type and sizes, for example ``float32 [B, T, 64]``; empty where it gives no single tensor.
        flops: Forward FLOPs at the example shapes.
        bytes: Bytes of what it gives.
        kind: As in ``passes.liveness``: ``live``, ``input``, ``constant`` or ``parameter-only``.
        part: Label of its part.
        roles: Keys of ``ROLES``.
        reads: Names of the parameters and buffers it reads.
        reasons: Why it has its roles, one sentence each.
    """

    name: str
    operator: str
    scope: tuple[Scope, ...]
    module: str
    shape: str
    flops: int
    bytes: int
    kind: str
    part: str
    roles: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Edge:
    """One node reads another.

    Attributes:
        source: Index of the node that is read.
        target: Index of the node that reads it.
        crossing: ``lane`` where a boundary is crossed as a latent, ``tap`` where a region is read by the head past a
            boundary, ``shared`` where a value is read that every region may read; else empty.
    """

    source: int
    target: int
    crossing: str = ""

    @property
    def crosses(self) -> bool:
        """It leads past a boundary."""
        return bool(self.crossing)


@dataclass(frozen=True, slots=True)
class PartCounts:
    """One band of the drawing.

    Attributes:
        label: ``prologue``, ``stem``, ``region 0`` ... or ``head``.
        flops: Forward FLOPs.
        share: Of the whole model's FLOPs.
        nodes: Graph nodes, with those the drawing leaves out (sizes, checks).
        parameters: Trainable numbers it reads.
        modules: Paths of the layers that make it up.
    """

    label: str
    flops: int
    share: float
    nodes: int
    parameters: int
    modules: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class LaneRow:
    """One value at one boundary.

    Attributes:
        node: Index of the node.
        name: Its name.
        shape: Its type and sizes.
        first, last: The boundaries it crosses.
        source: Label of the part that makes it.
        readers: Labels of the regions that read it.
        details: Further facts, name and value: the slot of the latent it has, the base it is added to.
    """

    node: int
    name: str
    shape: str
    first: int
    last: int
    source: str
    readers: tuple[str, ...]
    details: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Boundary:
    """What crosses between two regions.

    Attributes:
        index: Position ``k``: it lies between region ``k - 1`` and region ``k``.
        crossing: What crosses, and how much, for example ``token, 4.0 KiB``.
        lanes: The values that crossed in the original model.
    """

    index: int
    crossing: str
    lanes: tuple[LaneRow, ...]


@dataclass(frozen=True, slots=True)
class Picture:
    """A partition as plain data.

    Attributes:
        title: Name of the model.
        summary: Facts about the plan, name and value.
        parts: The parts from top to bottom.
        nodes: Operators and inputs in program order.
        edges: Who reads whom, by index into ``nodes``.
        boundaries: What crosses between regions.
        why: Decisions: about, choice, reason.
    """

    title: str
    summary: tuple[tuple[str, str], ...]
    parts: tuple[PartCounts, ...]
    nodes: tuple[Node, ...]
    edges: tuple[Edge, ...]
    boundaries: tuple[Boundary, ...] = ()
    why: tuple[tuple[str, str, str], ...] = ()

    @property
    def regions(self) -> tuple[PartCounts, ...]:
        """The parts that are regions."""
        return tuple(part for part in self.parts if is_region(part.label))


def is_region(label: str) -> bool:
    """The label is that of a region.

    Example:
        >>> is_region("region 3"), is_region("head")
        (True, False)
    """
    return label.startswith("region ")


def balance(flops: Sequence[int]) -> float:
    """Largest over mean; 1 is even.

    Example:
        >>> balance([10, 10, 40])
        2.0
    """
    return max(flops) * len(flops) / sum(flops) if sum(flops) else 1.0


def part_of(analysis: Analysis) -> Mapping[fx.Node, str]:
    """The part of every node that is drawn; parameter-only nodes belong to the first part that reads them."""
    found = dict(analysis.where)
    labels = _labels(analysis)
    kind = analysis.live.kind
    for node in reversed(analysis.capture.graph_module.graph.nodes):
        if kind.get(node) == PARAMETER_ONLY:
            readers = [labels.index(found[user]) for user in node.users if user in found]
            found[node] = labels[min(readers, default=1)]
        elif kind.get(node) in (INPUT, CONSTANT):
            found[node] = PROLOGUE
    return found


def _labels(analysis: Analysis) -> list[str]:
    return [PROLOGUE, STEM, *(f"region {k}" for k in range(len(analysis.ends))), HEAD]


def picture(analysis: Analysis, *, engine: str | None = None) -> Picture:
    """Write an analysed model down as what the drawings need.

    Args:
        analysis: The model and where it is cut.
        engine: What solves the adjoints, and why; left out where nothing was transformed.

    Example:
        >>> picture(analyse(model, capture(model, as_inputs(model, x)), options)).parts[0].label  # doctest: +SKIP
        'prologue'
    """
    return _Pictured(analysis).picture(engine)


class _Pictured:
    """Collects the records of one analysis."""

    def __init__(self, analysis: Analysis) -> None:
        self.analysis, self.plan = analysis, analysis.plan
        self.gm = analysis.capture.graph_module
        self.kind = analysis.live.kind
        self.naming = Naming(self.gm, analysis.capture)
        self.part = part_of(analysis)
        self.labels = _labels(analysis)
        self.place = {node: self.labels.index(label) for node, label in self.part.items()}
        self.drawn = self._drawn()
        self.index = {node: i for i, node in enumerate(self.drawn)}
        self.readers: dict[fx.Node, list[fx.Node]] = {node: [] for node in self.drawn}
        for node in self.drawn:
            for before in analysis.live.waits[node]:
                if before in self.readers:
                    self.readers[before].append(node)
        self.shared = {analysis.canvas, *analysis.cut.shared}
        self.crossings = {node: self._crossings(node) for node in self.drawn}

    def picture(self, engine: str | None) -> Picture:
        lanes = self._lanes()
        edges = [
            Edge(self.index[node], self.index[user], crossing)
            for node, users in self.readers.items()
            for user, crossing in zip(users, self.crossings[node], strict=True)
        ]
        reasons = self._reasons(lanes)
        return Picture(
            title=self.plan.model,
            summary=tuple(summary(self.plan, engine)),
            parts=tuple(_counts(label, part) for label, part in _parts(self.plan)),
            nodes=tuple(self._node(node, reasons.get(node, ())) for node in self.drawn),
            edges=tuple(edges),
            boundaries=tuple(self._boundary(region, lanes) for region in self.plan.regions[:-1]),
            why=tuple(_decisions(self.plan)),
        )

    def _drawn(self) -> list[fx.Node]:
        """Live nodes, and those without gradient that lead to one or to an output; no sizes, checks, parameters."""
        wanted = set(self.gm.graph.output_node().all_input_nodes)
        drawn = []
        for node in reversed(self.gm.graph.nodes):
            kind = self.kind.get(node)
            if node.op in ("placeholder", "call_function") and (
                kind == LIVE or (node in wanted and kind in (INPUT, CONSTANT, PARAMETER_ONLY))
            ):
                drawn.append(node)
                wanted.update(self.analysis.live.waits[node])
        return drawn[::-1]

    def _has_point(self, node: fx.Node) -> bool:
        return is_float_tensor(node) and node.op in ("placeholder", "call_function")

    def _crossings(self, node: fx.Node) -> tuple[str, ...]:
        return tuple(self._crossing(node, user) for user in self.readers[node])

    def _crossing(self, node: fx.Node, user: fx.Node) -> str:
        here, there = self.place[node], self.place[user]
        first, head = 2, len(self.labels) - 1
        everywhere = node in self.shared or self.kind[node] in (INPUT, CONSTANT, PARAMETER_ONLY)
        # what the stem gives enters region 0 without crossing a boundary
        if there <= max(here, first) or (here == head - 1 and there == head):
            return "shared" if self.kind[node] == PARAMETER_ONLY and here != there else ""
        if everywhere:
            return "shared"
        return "tap" if there == head else "lane"

    def _lanes(self) -> dict[fx.Node, LaneRow]:
        found: dict[fx.Node, LaneRow] = {}
        for node in self.drawn:
            across = [u for u, how in zip(self.readers[node], self.crossings[node], strict=True) if how == "lane"]
            if across:
                places = sorted({self.place[user] for user in across})
                found[node] = LaneRow(
                    node=self.index[node],
                    name=self._name(node),
                    shape=self._shape(node),
                    # boundary k is the border above region k, whose place is k + 2
                    first=max(1, self.place[node] - 1),
                    last=places[-1] - 2,
                    source=self.part[node],
                    readers=tuple(self.labels[place] for place in places),
                    details=self._lane_details(node),
                )
        return found

    def _lane_details(self, node: fx.Node) -> tuple[tuple[str, str], ...]:
        """Slot and base, where the plan has a record of the lane."""
        if self._has_point(node):
            for lane in self.plan.lanes:
                if lane.point == self.naming.point(node):
                    return ("slot", str(lane.slot)), ("base", self._base(lane))
        return ()

    def _base(self, lane: Lane) -> str:
        if lane.base != "source":
            return lane.base
        return "canvas" if lane.source == 0 else self.plan.shared[lane.source - 1].name

    def _boundary(self, region: RegionPlan, lanes: Mapping[fx.Node, LaneRow]) -> Boundary:
        k = region.index + 1
        rows = tuple(row for row in lanes.values() if row.first <= k <= row.last)
        sent, back = size(region.forward_bytes), size(region.backward_bytes)
        amount = f"{sent} each way" if sent == back else f"{sent} forward, {back} backward"
        return Boundary(k, f"{crossing(self.plan)}, {amount}", rows)

    def _node(self, node: fx.Node, reasons: Iterable[tuple[str, str]]) -> Node:
        cost = self.analysis.costs
        reasons = tuple(reasons)
        return Node(
            name=self._name(node),
            operator="input" if node.op == "placeholder" else operator_name(node),
            scope=_scope(node),
            module=module_path(node) if node.op != "placeholder" else "",
            shape=self._shape(node),
            flops=cost.flops.get(node, 0),
            bytes=cost.bytes.get(node, 0),
            kind=self.kind[node],
            part=self.part[node],
            roles=tuple(dict.fromkeys(role for role, _ in reasons if role)),
            reads=tuple(str(before.target) for before in node.all_input_nodes if before.op == "get_attr"),
            reasons=tuple(dict.fromkeys(reason for _, reason in reasons if reason)),
        )

    def _name(self, node: fx.Node) -> str:
        if node.op == "placeholder":
            return str(node.target)
        return (
            self.naming.point(node).name if self._has_point(node) else f"{module_path(node) or '<model>'}:{node.name}"
        )

    def _shape(self, node: fx.Node) -> str:
        if self._has_point(node):
            return shape(self.naming.point(node))
        sizes, dtype = self.analysis.costs.shape.get(node), self.analysis.costs.dtype.get(node)
        return "" if sizes is None else f"{str(dtype).removeprefix('torch.')} [{', '.join(map(str, sizes))}]"

    def _reasons(self, lanes: Mapping[fx.Node, LaneRow]) -> dict[fx.Node, list[tuple[str, str]]]:
        """Per node its roles, each with a reason; a reason without a role has an empty one."""
        analysis, found = self.analysis, {node: list[tuple[str, str]]() for node in self.drawn}
        why = {decision.about: decision.why for decision in self.plan.why}
        outputs = set(self.gm.graph.output_node().all_input_nodes)
        for node in self.drawn:
            add = found[node].append
            if node.op == "placeholder":
                add(("input", ROLES["input"]))
            elif self.part[node] == PROLOGUE:
                add(("", "no trainable input: runs once, without grad, and every region may read it"))
            elif self.kind[node] == PARAMETER_ONLY:
                add(("", "made of parameters alone: every region that reads it has its own copy"))
            if node is analysis.canvas:
                add(("canvas", ROLES["canvas"]))
                add(("", why.get("canvas", "")))
            elif node in self.shared:
                add(("shared", ROLES["shared"]))
            if node in lanes:
                row = lanes[node]
                at = f"boundary {row.first}" if row.first == row.last else f"boundaries {row.first} to {row.last}"
                add(("lane", f"lane of {at}, read by {', '.join(row.readers)}"))
                add(("", why.get("boundaries", "")))
                add(("", why.get(f"lane {row.name}", "")))
            early = is_region(self.part[node]) and self.part[node] != self.labels[-2]
            if "tap" in self.crossings[node] or (early and node in outputs):
                add(("tap", ROLES["tap"]))
        for region, finish in zip(self.plan.regions, analysis.finishes, strict=True):
            if finish is not None and finish in found and not region.own_finish:
                reason = {decision.about: decision.why for decision in region.why}.get("finish", "")
                found[finish].append(("finish", f"the finish of region {region.index} begins here: {reason}"))
        for node in outputs & found.keys():
            found[node].append(("output", ROLES["output"]))
        return found


def summary(plan: Plan, engine: str | None = None) -> Iterable[tuple[str, str]]:
    """Facts about a plan, name and value, for the head of a page."""
    reasons = {decision.about: decision.why for decision in plan.why}

    def because(choice: str, about: str) -> str:
        return f"{choice} ({reasons[about]})" if about in reasons else choice

    work = [region.part.flops for region in plan.regions]
    yield "regions", f"{len(plan.regions)}, latent width r = {plan.r}"
    yield "interface", because(crossing(plan), "interface")
    yield "readout", because(plan.readout, "readout")
    if plan.credit != EXACT:
        yield "credit", because(plan.credit, "credit")
    if engine:
        yield "engine", engine
    yield "balance", f"largest over mean region {balance(work):.2f}"
    yield "canvas", f"{plan.canvas.name}  {shape(plan.canvas)}"
    yield "inputs", ", ".join(f"{name} [{', '.join(map(str, sizes))}]" for name, sizes in plan.inputs)
    yield "dynamic", ", ".join(plan.dynamic) or "none: every call must have the shapes of the example inputs"
    if plan.causal is not None:
        yield "causal", "yes" if plan.causal else "no: output positions depend on later ones"
    yield "work", f"{count(sum(part.flops for _, part in _parts(plan)))} FLOPs in a forward at these inputs"
    yield "hash", plan.hash


def crossing(plan: Plan) -> str:
    """What crosses a boundary, in a few words."""
    extra = [f"{plan.cell} cell"] if plan.cell else []
    extra += [f"{plan.chunk} positions a chunk"] if plan.chunk else []
    return ", ".join([plan.interface, *extra])


def _parts(plan: Plan) -> Iterable[tuple[str, Part]]:
    regions = ((f"region {region.index}", region.part) for region in plan.regions)
    return ((PROLOGUE, plan.prologue), (STEM, plan.stem), *regions, (HEAD, plan.head))


def _counts(label: str, part: Part) -> PartCounts:
    return PartCounts(label, part.flops, part.share, part.nodes, part.parameters, part.modules)


def _decisions(plan: Plan) -> Iterable[tuple[str, str, str]]:
    for decision in plan.why:
        yield decision.about, decision.choice, decision.why
    for region in plan.regions:
        for decision in region.why:
            yield f"region {region.index} {decision.about}", decision.choice, decision.why


def _scope(node: fx.Node) -> tuple[Scope, ...]:
    stack = node.meta.get("nn_module_stack") or {}
    return tuple(
        Scope(path, str(getattr(kind, "__name__", kind)).rpartition(".")[2])
        for path, kind in stack.values()
        if path and not path.startswith("_empty")
    )
