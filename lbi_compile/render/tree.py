"""The ``inspect`` view: a plan as a tree of its parts."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.text import Text
from rich.tree import Tree

from lbi_compile.newton import SEQUENTIAL
from lbi_compile.plan import EXACT, Decision, Part, Plan, RegionPlan
from lbi_compile.quantities import count, size

from .text import bar, facts, layers, plain, shape

_HEADS = ("nodes", "params", "FLOPs", "share")
_WIDTHS = (6, 8, 8, 7)
_NAME = len("region 00")
_GUIDE = 4


def page(plan: Plan, width: int | None = None, *, why: bool = False) -> str:
    """The plan as plain text, ``width`` columns wide; by default as wide as the terminal, or 80 where there is none.

    Example:
        >>> print(page(bounded.plan, width=80))  # doctest: +SKIP
    """
    return plain(PlanView(plan, why=why), width)


class PlanView:
    """A plan as something rich can print, fitted to the width of the console.

    Args:
        plan: The plan.
        engine: What solves the adjoints, and why; left out where nothing was transformed.
        why: Print every decision with its reason, and the passes that ran, below the tree.
    """

    def __init__(self, plan: Plan, *, engine: str | None = None, why: bool = False) -> None:
        self.plan, self.engine, self.why = plan, engine, why

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        plan = self.plan
        yield Text(f"{plan.model}: {_many(len(plan.regions), 'region')}, latent width r = {plan.r}", style="bold")
        yield facts(_header(plan, self.engine))
        yield Text("")
        parts = [("prologue", plan.prologue, []), ("stem", plan.stem, [])]
        parts += [(f"region {region.index}", region.part, list(_details(plan, region))) for region in plan.regions]
        parts += [("head", plan.head, [])]
        columns = _Columns(options, longest=max(len(layers(part.modules)) for _, part, _ in parts))
        tree = Tree(columns.heads(), guide_style="dim")
        for name, part, details in parts:
            tree.add(columns.row(name, part, details))
        yield tree
        if self.why:
            yield from _reasons(plan)


class _Columns:
    """Widths of the columns: the layers take what their names need, the bar what is left."""

    def __init__(self, options: ConsoleOptions, *, longest: int) -> None:
        free = options.max_width - _GUIDE - _NAME - 2 - sum(_WIDTHS) - 2
        self.layers = max(len("layers"), min(longest, free - 8, 40))
        self.bar = max(0, min(32, free - self.layers))
        self.ascii_only = options.ascii_only

    def heads(self) -> Text:
        names = "".join(f"{head:>{width}}" for head, width in zip(_HEADS, _WIDTHS, strict=True))
        return Text(f"{'part':<{_GUIDE + _NAME}}  {'layers':<{self.layers}}{names}", style="dim", no_wrap=True)

    def row(self, name: str, part: Part, details: list[tuple[str, RenderableType]]) -> RenderableType:
        listed = layers(part.modules)
        if len(listed) > self.layers:
            details = [("layers", listed), *details]
            listed = listed[: self.layers - 3] + "..."
        numbers = (str(part.nodes), count(part.parameters), count(part.flops), f"{100 * part.share:.1f}%")
        cells = "".join(f"{number:>{width}}" for number, width in zip(numbers, _WIDTHS, strict=True))
        line = Text.assemble(
            (f"{name:<{_NAME}}", "bold"),
            f"  {listed:<{self.layers}}{cells}  ",
            (bar(part.share, self.bar, ascii_only=self.ascii_only), "cyan"),
            no_wrap=True,
        )
        return Group(line, facts(details)) if details else line


def _header(plan: Plan, engine: str | None) -> Iterator[tuple[str, RenderableType]]:
    reasons = {decision.about: decision.why for decision in plan.why}
    if "capture" in reasons:
        yield "capture", _because("child modules, opaque", reasons["capture"])
    yield "interface", _because(_crossing(plan), reasons.get("interface"))
    yield "readout", _because(plan.readout, reasons.get("readout"))
    if plan.credit != EXACT:
        yield "credit", _because(plan.credit, reasons.get("credit"))
    if plan.forward != SEQUENTIAL:
        yield "forward", _forward(plan)
    if engine:
        yield "engine", engine
    yield "canvas", f"{plan.canvas.name}  {shape(plan.canvas)}"
    for point in plan.shared:
        yield "shared", f"{point.name}  {shape(point)}"
    yield "inputs", ", ".join(f"{name} [{', '.join(map(str, sizes))}]" for name, sizes in plan.inputs)
    yield "dynamic", ", ".join(plan.dynamic) or "none: every call must have the shapes of the example inputs"
    if plan.causal is not None:
        yield "causal", "yes" if plan.causal else "no: output positions depend on later ones"
    yield "work", f"{count(sum(part.flops for part in _parts(plan)))} FLOPs in a forward at these inputs"
    yield "hash", plan.hash


def _parts(plan: Plan) -> tuple[Part, ...]:
    return (plan.prologue, plan.stem, *(region.part for region in plan.regions), plan.head)


def _because(choice: str, why: str | None) -> Text:
    return Text.assemble(choice, (f"  ({why})", "dim")) if why else Text(choice)


def _crossing(plan: Plan) -> str:
    extra = [f"{plan.cell} cell"] if plan.cell else []
    extra += [f"{plan.chunk} positions a chunk"] if plan.chunk else []
    return ", ".join([plan.interface, *extra])


def _forward(plan: Plan) -> str:
    asked = [f"tol {plan.tol:.0e}"] if plan.tol else []
    asked += [f"at most {plan.max_iters} iterations"] if plan.max_iters else []
    return ", ".join([plan.forward, *asked])


def _details(plan: Plan, region: RegionPlan) -> Iterator[tuple[str, RenderableType]]:
    last = region.index == len(plan.regions) - 1
    if last or not plan.lanes:
        yield "output   " if last else "separator", f"{region.end.name}  {shape(region.end)}"
    else:
        yield from _lanes(plan, region.index + 1)
    if region.own_finish:
        yield "finish", "a small MLP of the interface: the region ends in an op that mixes positions"
    elif region.finish:
        yield "finish", f"from {region.finish.name} on"
    if not last:
        sent, back = size(region.forward_bytes), size(region.backward_bytes)
        yield "crossing", f"m_{region.index + 1} ({_crossing(plan)}): {sent} forward, {back} backward"


def _lanes(plan: Plan, boundary: int) -> Iterator[tuple[str, RenderableType]]:
    """The lanes that cross a boundary; one that has crossed before passes on in its slot."""
    for lane in plan.lanes:
        if lane.first <= boundary <= lane.last:
            held = "passes on in" if lane.first < boundary else "into"
            yield "lane", f"{lane.point.name}  {shape(lane.point)}  {held} slot {lane.slot}"


def _reasons(plan: Plan) -> Iterator[RenderableType]:
    yield Text("\nwhy", style="bold")
    for decision in plan.why:
        yield _reason(decision.about, decision)
    for region in plan.regions:
        for decision in region.why:
            yield _reason(f"region {region.index} {decision.about}", decision)
    if plan.passes:
        yield Text("\npasses", style="bold")
        yield facts((record.name, f"{record.seconds:6.2f} s  {record.result}") for record in plan.passes)


def _reason(about: str, decision: Decision) -> RenderableType:
    head = Text.assemble(f"  {about}: ", (decision.choice, "bold"))
    return Group(head, facts([("", decision.why)], indent=2))


def _many(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
