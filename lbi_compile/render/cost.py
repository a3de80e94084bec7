"""The ``plan --devices`` view: schedules in numbers, a sweep, and advice."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from lbi_compile.bench.plot import library
from lbi_compile.cost.advice import Advice, Point, Row, best
from lbi_compile.cost.form import DENSE
from lbi_compile.cost.symbols import Workload, meaning
from lbi_compile.quantities import count, seconds, size, times
from lbi_compile.simulate import Link

from .text import facts


@dataclass(frozen=True, slots=True)
class Outlook:
    """What the planner found.

    Attributes:
        work: Numbers of the step.
        link: Between devices.
        source: Where the numbers come from.
        rows: Schedules.
        sweep: Points over K and r; empty where none were asked for.
        advice: What to do.
    """

    work: Workload
    link: Link
    source: str
    rows: tuple[Row, ...]
    sweep: tuple[Point, ...]
    advice: Advice

    def record(self) -> dict[str, Any]:
        """All of it for JSON, with what every letter means."""
        letters = dataclasses.asdict(self.work)
        return {
            "letters": {name: {"value": value, "meaning": meaning(name)} for name, value in letters.items()},
            "link": self.link._asdict(),
            "source": self.source,
            "schedules": [_row_record(row) for row in self.rows],
            "sweep": [dataclasses.asdict(point) for point in self.sweep],
            "advice": dataclasses.asdict(self.advice),
        }


def _row_record(row: Row) -> Mapping[str, Any]:
    estimate = row.estimate
    shown = None if estimate is None else {**estimate._asdict(), "waiting": estimate.waiting}
    return {**dataclasses.asdict(row), "estimate": shown}


class OutlookView:
    """An outlook as something rich can print, readable at 80 columns."""

    def __init__(self, outlook: Outlook) -> None:
        self.outlook = outlook

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        outlook = self.outlook
        yield Text(f"\none training step on {outlook.work.n} devices", style="bold")
        yield facts(_header(outlook))
        yield Text("")
        yield _schedules(outlook)
        for row in outlook.rows:
            if row.estimate is None:
                yield Text(f"  {row.title}: not possible, {row.refusal}", style="dim")
        if outlook.sweep:
            yield Text("\nsweep: step of the fastest schedule of exact credit", style="bold")
            yield Text("  below it, how many times as fast as the fastest schedule of the model as it is", style="dim")
            yield _sweep(outlook.sweep)
        yield Text("\nadvice", style="bold")
        yield _point(" ", outlook.advice.text, "green" if outlook.advice.use else "yellow")
        for reason in outlook.advice.why:
            yield _point("  -", reason)


def _point(mark: str, text: str, style: str = "") -> Table:
    table = Table.grid(padding=(0, 1, 0, 0))
    table.add_row(Text(mark), Text(text, style=style))
    return table


def _header(outlook: Outlook) -> Iterator[tuple[str, str]]:
    work, link = outlook.work, outlook.link
    yield "link", f"{size(link.bandwidth)}/s in each direction, latency {seconds(link.latency)}"
    yield "device", f"{count(work.s)} FLOP/s, backward {work.g:.2g} times a forward; {outlook.source}"
    yield "batch", f"{work.B} samples, canvas {work.T} x {work.D}, {work.L} layers, {count(work.parameters)} parameters"
    yield "cut", f"K = {work.K}, r = {work.r}, largest region {work.u:.2f} times the mean one"


def _schedules(outlook: Outlook) -> Table:
    simulated = any(row.simulated is not None for row in outlook.rows)
    heads = ["schedule", "step", *(["simulated"] if simulated else []), "/ best", "micro", "waits", "sent", "memory"]
    table = Table.grid(padding=(0, 1, 0, 0), pad_edge=False)
    for i in range(len(heads)):
        table.add_column(justify="right" if i else "left", no_wrap=True)
    table.add_row(*(Text(f"  {head}" if i == 0 else head, style="dim") for i, head in enumerate(heads)))
    found = [(row, row.estimate) for row in outlook.rows if row.estimate is not None]
    top = min(one.seconds for _, one in found)
    for row, one in found:
        extra = ["" if row.simulated is None else seconds(row.simulated)] if simulated else []
        table.add_row(
            Text(f"  {row.title}", style="bold" if row.name == outlook.advice.choice else ""),
            seconds(one.seconds),
            *extra,
            times(one.seconds / top),
            str(row.micro_batches) if row.micro_batches > 1 else "",
            f"{one.waiting:.0%}",
            size(one.sent),
            size(one.memory),
        )
    return table


def _sweep(points: Sequence[Point]) -> Table:
    rs = list(dict.fromkeys(point.r for point in points))
    table = Table.grid(padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column(justify="right")
    for _ in rs:
        table.add_column(justify="right", no_wrap=True)
    table.add_row(Text("  K", style="dim"), *(Text(f"r = {r}", style="dim") for r in rs))
    for K in dict.fromkeys(point.K for point in points):
        row = [point for point in points if point.K == K]
        table.add_row(f"  {K}", *(_cell(point) for point in row))
    return table


def _cell(point: Point) -> Text:
    if point.seconds is None:
        return Text("not possible", style="dim")
    ratio = "" if point.ratio is None else f"\n{times(point.ratio)}"
    return Text.assemble(f"{point.name} {seconds(point.seconds)}", (ratio, "dim"))


def draw(outlook: Outlook, path: Path) -> None:
    """Write a picture: steps of all schedules, and the sweep where there is one.

    Args:
        outlook: What the planner found.
        path: A ``.png`` file.
    """
    pyplot = library()
    panels = 2 if outlook.sweep else 1
    figure, axes = pyplot.subplots(1, panels, squeeze=False, figsize=(7 * panels, 4.5))
    found = [(row, row.estimate) for row in outlook.rows if row.estimate is not None]
    axis, names = axes[0, 0], [row.title for row, _ in found]
    axis.barh(names, [one.busy for _, one in found], color="tab:blue", label="computing")
    waits = [one.seconds - one.busy for _, one in found]
    axis.barh(names, waits, left=[one.busy for _, one in found], color="tab:orange", label="waiting")
    axis.invert_yaxis()
    axis.set(xlabel="seconds of a step", title=f"{outlook.work.n} devices")
    axis.legend(loc="lower right", fontsize=8)
    if outlook.sweep:
        axis = axes[0, 1]
        for r in dict.fromkeys(point.r for point in outlook.sweep):
            line = [(point.K, point.seconds) for point in outlook.sweep if point.r == r and point.seconds is not None]
            if line:
                axis.plot(*zip(*line, strict=True), marker="o", label=f"r = {r}")
        dense = best(outlook.rows, DENSE)
        if dense is not None and dense.estimate is not None:
            axis.axhline(dense.estimate.seconds, color="black", linestyle="--", label=dense.title)
        Ks = list(dict.fromkeys(point.K for point in outlook.sweep))
        axis.set_xscale("log", base=2)
        axis.set_xticks(Ks, [str(K) for K in Ks])
        axis.set(xlabel="regions K", ylabel="seconds of a step", title="fastest schedule of exact credit")
        axis.set_ylim(bottom=0)
        axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120, format="png")
    pyplot.close(figure)
