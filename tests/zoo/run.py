"""Measure the zoo: ``python tests/zoo/run.py --only NAME ... --json OUT.json``; ``--table`` prints what OUT.json holds.

Each model runs in a process of its own, on one thread, with a time limit. Rows that OUT.json already has are kept.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    os.environ["OMP_NUM_THREADS"] = "1"

from tests.zoo.models import ZOO
from tests.zoo.table import Row, table

TIME_LIMIT = 900


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; 0 where every row in the file is as the zoo expects it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=list(ZOO), default=list(ZOO), metavar="NAME", help="models")
    parser.add_argument("--json", type=Path, required=True, help="file of the rows, kept up to date")
    parser.add_argument("--engines", nargs="+", choices=["scan", "chain"], default=["scan", "chain"], help="in turn")
    parser.add_argument("--again", action="store_true", help="measure models anew that the file has rows of")
    parser.add_argument("--table", action="store_true", help="measure nothing, print the table")
    parser.add_argument("--timeout", type=int, default=TIME_LIMIT, help="seconds for one model")
    options = parser.parse_args(arguments)
    rows = {row["name"]: row for row in (json.loads(options.json.read_text()) if options.json.exists() else [])}
    for name in () if options.table else options.only:
        if name in rows and not options.again:
            continue
        rows[name] = run(name, engines=options.engines, timeout=options.timeout)
        _write(options.json, [rows[known] for known in ZOO if known in rows])
        print(f"{name:20s} {rows[name]['seconds']:6.1f} s  {rows[name]['status']}", flush=True)
    print(table(list(rows.values())))
    return int(any(surprise(row) for row in rows.values()))


def run(name: str, *, engines: Sequence[str] = ("scan", "chain"), timeout: int = TIME_LIMIT) -> Row:
    """The row of one model, measured in a process of its own.

    Args:
        name: Name in the zoo.
        engines: Engines to try in turn until one is exact.
        timeout: Seconds after which the process is ended.
    """
    command = [sys.executable, "-W", "ignore", "-m", "tests.zoo.measure", name, *engines]
    root = Path(__file__).resolve().parents[2]
    empty: Row = {"name": name, "family": ZOO[name].family, "seconds": float(timeout)}
    try:
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=timeout, check=False)
    except subprocess.TimeoutExpired:
        return {**empty, "status": f"red: not done after {timeout} s"}
    try:
        return json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        last = (done.stderr.strip() or "no message").splitlines()[-1]
        return {**empty, "seconds": 0.0, "status": f"red: exit code {done.returncode}: {last}"}


def surprise(row: Row) -> str:
    """How a row differs from what the zoo expects of its model; empty where it does not."""
    expect = ZOO[row["name"]].expect
    if expect in ("scan", "chain"):
        found = row.get("engine") if row["status"] == "green" else row["status"]
    else:
        found = row["status"].removeprefix("refused: ").partition(":")[0]
    return "" if found == expect else f"{found}, expected {expect}"


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(rows, indent=1) + "\n")
    partial.replace(path)


if __name__ == "__main__":
    sys.exit(main())
