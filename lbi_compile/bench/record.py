"""The record of a run of ``bench``: what is written as JSON, drawn as a table and plotted."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .compare import Cell
from .transform import Cost


@dataclass(frozen=True, slots=True)
class Record:
    """One run.

    Attributes:
        bench: ``"scan"``, ``"step"`` or ``"transform"``.
        ok: Every check passed.
        command: What was typed.
        date: When, in UTC.
        machine: Processor, cores, memory, GPU.
        versions: Of torch, triton, Python and this package.
        settings: Device, dtype, threads, rounds and limits.
        cells: What was compared; empty for ``"transform"``.
        costs: Stages of ``transform``; empty for the others.
        copy_bandwidth: Bytes per second that a copy reads and writes; ``None`` where it was not measured.
    """

    bench: str
    ok: bool
    command: str
    date: str
    machine: Mapping[str, Any]
    versions: Mapping[str, str | None]
    settings: Mapping[str, Any]
    cells: tuple[Cell, ...] = ()
    costs: tuple[Cost, ...] = ()
    copy_bandwidth: float | None = None

    def write(self, path: Path) -> None:
        """Write all of it as JSON, each number of each round too."""
        path.write_text(json.dumps(dataclasses.asdict(self), indent=1, allow_nan=False) + "\n")
