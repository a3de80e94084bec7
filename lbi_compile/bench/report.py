"""Tables of a run of ``bench``, readable at 80 columns."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from lbi_compile.quantities import seconds, size, times
from lbi_compile.render.text import facts

from .compare import OK, Cell, Row
from .measure import Spread
from .record import Record
from .step import ENGINES

_PARTS = {
    "forward": "forward",
    "backward": "backward alone, gradients delivered to the parameters",
    "gradients": "backward function alone, gradients returned and not delivered",
    "step": "whole step: forward and backward",
}


class RecordView:
    """A record as something rich can print."""

    def __init__(self, record: Record) -> None:
        self.record = record

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        record = self.record
        yield Text.assemble((f"bench {record.bench}: ", "bold"), ("ok", "green") if record.ok else ("FAILED", "red"))
        yield facts(_header(record))
        for cell in record.cells:
            yield Text(f"\n{describe(cell)}", style="bold")
            yield _rows(cell)
            for part in dict.fromkeys(part for row in cell.rows for part in row.seconds):
                yield Text(f"\n{_PARTS.get(part, part)}", style="italic")
                yield _times(cell, part, record.copy_bandwidth)
            if (choice := chosen(cell, "step")) is not None:
                yield choice
        if record.costs:
            yield _costs(record)


def describe(cell: Cell) -> str:
    """The case in one line."""
    about = dict(cell.case)
    return f"{about.pop('name')}: " + ", ".join(f"{key} {value}" for key, value in about.items() if value is not None)


def _header(record: Record) -> Iterator[tuple[str, str]]:
    machine, settings, versions = record.machine, record.settings, record.versions
    gpu = machine["gpu"]
    yield "machine", f"{machine['processor']}, {machine['cores']} cores" + (f", {gpu['name']}" if gpu else "")
    yield "versions", ", ".join(f"{name} {value}" for name, value in versions.items() if value is not None)
    yield "run", ", ".join(f"{name} {value}" for name, value in settings.items() if value is not False)
    if record.copy_bandwidth is not None:
        yield "copy", f"{record.copy_bandwidth / 1e9:.0f} GB/s read and written"
    if record.cells:
        yield "ratios", "baseline over variant within each round: median, below it least-largest"


def _rows(cell: Cell) -> Table:
    """What each variant is, its check, and what it costs to compile."""
    memory = any(row.peak_bytes is not None for row in cell.rows)
    table = _grid("variant", "check", "error", "compile", *(["memory"] if memory else []), "what it is")
    for row in cell.rows:
        error = "" if row.check is None else f"{row.check.error:.0e}"
        compiled = "" if row.compile_seconds is None else f"{row.compile_seconds:.1f} s"
        used = [] if not memory else ["" if row.peak_bytes is None else size(row.peak_bytes)]
        style = "" if row.status == OK else "red"
        what = row.what if not row.note else f"{row.what}: {row.note}"
        table.add_row(row.name, Text(row.status, style=style), error, compiled, *used, Text(what))
    return table


def _times(cell: Cell, part: str, bandwidth: float | None) -> Table:
    baselines = [row.name for row in cell.rows if row.baseline and part in row.seconds]
    ratios = {(one.variant, one.baseline): one.ratio for one in cell.ratios if one.part == part}
    moved = any(row.moved for row in cell.rows)
    table = _grid("variant", "median", *(f"/ {name}" for name in baselines), *(["GB/s"] if moved else []))
    for row in cell.rows:
        if part not in row.seconds:
            continue
        cells = [_ratio(ratios.get((row.name, name))) for name in baselines]
        rate = [_rate(row, row.seconds[part].median, bandwidth)] if moved else []
        table.add_row(row.name, seconds(row.seconds[part].median), *cells, *rate)
    return table


def chosen(cell: Cell, part: str) -> Text | None:
    """How the engine that ``auto`` took compares with the one that proved the fastest; ``None`` where neither ran.

    Args:
        cell: Of a training step.
        part: What was timed.
    """
    seconds = {row.name: row.seconds[part] for row in cell.rows if part in row.seconds}
    engines = [name for name in ENGINES if name in seconds]
    if "auto" not in seconds or not engines:
        return None
    best = min(engines, key=lambda name: seconds[name].median)
    within = Spread.of([a / b for a, b in zip(seconds[best].all, seconds["auto"].all, strict=True)])
    return Text.assemble(f"auto: {times(within.median)} of the best engine, {best}", (f"  {_span(within)}", "dim"))


def _ratio(ratio: Spread | None) -> Text:
    if ratio is None:
        return Text("")
    return Text.assemble(times(ratio.median), (f"\n{_span(ratio)}", "dim"))


def _span(ratio: Spread) -> str:
    return f"{times(ratio.min)}-{times(ratio.max)}"


def _rate(row: Row, median: float, bandwidth: float | None) -> str:
    rate = row.moved / median
    share = "" if bandwidth is None else f"\n{rate / bandwidth:.0%}"
    return f"{times(rate / 1e9)}{share}"


def _costs(record: Record) -> Table:
    table = _grid("stage", "seconds", "memory", "result")
    for cost in record.costs:
        memory = "" if cost.peak_bytes is None else size(cost.peak_bytes)
        table.add_row(cost.stage, seconds(cost.seconds), memory, Text(cost.result))
    return table


def _grid(*heads: str) -> Table:
    table = Table.grid(padding=(0, 1, 0, 0), pad_edge=False)
    for i, head in enumerate(heads):
        last = i == len(heads) - 1 and head in ("what it is", "result")
        table.add_column(justify="left" if i == 0 or last else "right", no_wrap=not last, overflow="fold")
    table.add_row(*(Text(f"  {head}" if i == 0 else head, style="dim") for i, head in enumerate(heads)))
    table.columns[0].min_width = 12
    return table
