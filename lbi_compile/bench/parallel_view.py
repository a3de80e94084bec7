"""The record of ``bench parallel``, as JSON and as tables."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from lbi_compile.quantities import seconds, size, times
from lbi_compile.render.text import facts

from .measure import Spread
from .parallel import Line, Meeting


@dataclass(frozen=True, slots=True)
class Record:
    """One run.

    Attributes:
        command: What was typed.
        date: When, in UTC.
        machine: Processor, cores, memory.
        versions: Of torch and others.
        settings: Sizes, ranks, rounds.
        meetings: One for each batch.
    """

    command: str
    date: str
    machine: Mapping[str, Any]
    versions: Mapping[str, str | None]
    settings: Mapping[str, Any]
    meetings: tuple[Meeting, ...]

    @property
    def ok(self) -> bool:
        """All gradients were right."""
        return all(meeting.ok for meeting in self.meetings)

    def write(self, path: Path) -> None:
        """Write all of it as JSON, each number of each round too."""
        record = {"bench": "parallel", "ok": self.ok, **dataclasses.asdict(self)}
        path.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")


class RecordView:
    """A record as something rich can print, readable at 80 columns."""

    def __init__(self, record: Record) -> None:
        self.record = record

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        record, settings = self.record, self.record.settings
        yield Text.assemble(("bench parallel: ", "bold"), ("ok", "green") if record.ok else ("FAILED", "red"))
        sizes = ", ".join(f"{name} {settings[name]}" for name in ("kind", "layers", "width", "length", "regions", "r"))
        yield facts(
            [
                ("machine", f"{record.machine['processor']}, {record.machine['cores']} cores"),
                ("model", sizes),
                (
                    "run",
                    f"{settings['ranks']} ranks of one thread, {settings['rounds']} rounds",
                ),
                ("ratios", "one process over ranks, same model, within each round: median, below it least-largest"),
                ("form", "the same ratio by closed forms, of parts and link as measured in this run"),
                ("sent", "bytes handed to process groups in a step, as rings send them; != where the form differs"),
            ]
        )
        for meeting in record.meetings:
            link = meeting.link
            samples = f"{meeting.samples} sample{'s'[: meeting.samples > 1]}"
            yield Text(f"\n{samples}{_limit(meeting)}", style="bold")
            measured = f"link {size(link.bandwidth)}/s, {seconds(link.latency)} a message"
            if link.crossing > 1:
                measured += f" ({times(link.crossing)} times as long where two cross)"
            measured += "; while all ranks compute"
            yield Text(f"  measured: {measured}, each takes {times(meeting.crowding)} times as long", style="dim")
            yield _table(meeting)
            yield from _beside_pipelines(meeting)
        yield from _lost(record.meetings)


def _limit(meeting: Meeting) -> str:
    speed = "" if meeting.mbit is None else f", links limited to {meeting.mbit:g} Mb/s"
    return speed + (f", {seconds(meeting.delay)} later" if meeting.delay else "")


def _lost(meetings: Sequence[Meeting]) -> Iterator[Text | Table]:
    """What the slower links cost each schedule, beside the first ones."""
    for samples in dict.fromkeys(meeting.samples for meeting in meetings):
        first, *others = [meeting for meeting in meetings if meeting.samples == samples]
        for other in others:
            yield Text(f"\n{samples} samples: what a step loses by{_limit(other).removeprefix(',')}", style="bold")
            table = Table.grid(padding=(0, 2, 0, 0), pad_edge=False)
            for i in range(7):
                table.add_column(justify="right" if i else "left", no_wrap=True)
            heads = ("  schedule", "before", "after", "lost", "least to most", "form", "sent")
            table.add_row(*(Text(head, style="dim") for head in heads))
            found = {line.name: line for line in first.lines}
            for line in other.lines:
                before = found[line.name]
                if line.baseline and line.seconds is not None and before.seconds is not None:
                    cells = (seconds(before.seconds.median), seconds(line.seconds.median))
                    paired = Spread.of([b / a for a, b in zip(before.seconds.all, line.seconds.all, strict=True)])
                    lost = f"{paired.median - 1:+.0%}"
                    spread = f"{paired.min - 1:+.0%} to {paired.max - 1:+.0%}"
                    form = ""
                    if line.predicted is not None and before.predicted is not None:
                        form = f"{before.predicted / line.predicted - 1:+.0%}"
                    table.add_row(f"  {line.name}", *cells, lost, Text(spread, style="dim"), form, size(line.sent))
            yield table


def _table(meeting: Meeting) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0), pad_edge=False)
    heads = ("  schedule", "error", "step", "ratio", "form", "off", "sent")
    for i, _ in enumerate(heads):
        table.add_column(justify="right" if i else "left", no_wrap=True)
    table.add_row(*(Text(head, style="dim") for head in heads))
    for line in meeting.lines:
        error = Text(f"{line.error:.0e}", style="" if line.ok else "red")
        took = Text("wrong" if line.seconds is None else seconds(line.seconds.median))
        table.add_row(f"  {line.name}", error, took, *_compared(line))
    return table


def _beside_pipelines(meeting: Meeting) -> Iterator[Text]:
    """How many times as fast as the best pipeline the schedules of regions are, round by round."""
    pipes = [line for line in meeting.lines if line.form in ("gpipe", "1f1b") and line.seconds is not None]
    regions = [line for line in meeting.lines if line.baseline and line.form not in ("one", "data", "gpipe", "1f1b")]
    if not pipes:
        return
    best = min(pipes, key=lambda line: line.seconds.median if line.seconds else 0.0)
    for line in regions:
        if line.seconds is not None and best.seconds is not None:
            found = Spread.of([b / a for a, b in zip(line.seconds.all, best.seconds.all, strict=True)])
            spread = f"{times(found.median)} ({times(found.min)}-{times(found.max)})"
            yield Text(f"  {line.name}: {spread} times as fast as the best pipeline, {best.name}", style="dim")


def _compared(line: Line) -> tuple[Text, ...]:
    if not line.baseline:
        return ()
    differs = abs(line.sent - line.form_sent) > 0.5
    sent = Text(size(line.sent) + (f" != {size(line.form_sent)}" if differs else ""))
    if line.ratio is None or line.predicted is None:
        return Text(""), Text(""), Text(""), sent
    spread = Text.assemble(times(line.ratio.median), (f"\n{times(line.ratio.min)}-{times(line.ratio.max)}", "dim"))
    off = f"{line.predicted / line.ratio.median - 1:+.0%}"
    return spread, Text(times(line.predicted)), Text(off), sent
