"""Results of an example as rows of a file, so that a run that was stopped goes on where it was."""

from __future__ import annotations

import datetime
import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from lbi_compile.bench.environment import machine, versions
from lbi_compile.errors import OptionError


class Rows:
    """Rows of results, one JSON object a line: what was measured, what was found, and where, when and with what.

    Args:
        path: The file; made with the first row.
        command: The command line that writes it.

    Example:
        >>> rows = Rows(Path("rows.jsonl"), command="python examples/local_credit.py")
        >>> rows.measured({"arm": "BP", "seed": 0}, lambda: {"accuracy": 0.9})["accuracy"]
        0.9
    """

    def __init__(self, path: Path, *, command: str) -> None:
        self.path, self.command = path, command
        self._known = {_key(row["what"]): row for row in self._read()}
        self._asked: dict[str, dict[str, Any]] = {}

    def _read(self) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        lines = self.path.read_text().splitlines(keepends=True)
        if lines and not lines[-1].endswith("\n"):  # cut off while it was written
            self.path.write_text("".join(lines[:-1]))
            lines.pop()
        try:
            rows = [json.loads(line) for line in lines]
            if any(not {"what", "found"} <= row.keys() for row in rows):
                raise KeyError("what, found")
        except (ValueError, KeyError, AttributeError) as error:
            raise OptionError(
                f"{self.path}, which holds other rows ({error!r})",
                expected="a file that this command wrote, or none",
                do="name another --out",
            ) from error
        return rows

    def all(self) -> list[dict[str, Any]]:
        """All rows, in the order in which they were made."""
        return list(self._known.values())

    def asked(self) -> list[dict[str, Any]]:
        """The rows that ``measured`` was asked for since this was made: those of another budget are not among them."""
        return list(self._asked.values())

    def measured(self, what: Mapping[str, Any], measure: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """What was found for ``what``; measured and written where there is no such row.

        Args:
            what: What tells the measurement from others, of plain values.
            measure: Makes it; gives plain values too.
        """
        key = _key(what)
        if key not in self._known:
            # of this process: others may have the machine
            began = time.process_time()
            found = dict(measure())
            at = machine(torch.device("cpu"))
            row = {
                "what": json.loads(key),
                "found": found,
                "cpu_seconds": round(time.process_time() - began, 1),
                "command": self.command,
                "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
                "versions": versions(),
                "machine": {"processor": at["processor"], "cores": at["cores"], "threads": torch.get_num_threads()},
            }
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as file:
                file.write(json.dumps(row) + "\n")
                file.flush()
                os.fsync(file.fileno())
            self._known[key] = row
        self._asked[key] = self._known[key]
        return self._known[key]["found"]


def _key(what: Mapping[str, Any]) -> str:
    return json.dumps(what, sort_keys=True)
