"""Cut models of published sizes into even regions, without the memory to hold them: ``python examples/balance.py``.

Each model is made on the meta device (shapes without numbers) in a process of its own, captured and planned. The table
says how many values cross each boundary and how even the regions are.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

HOME = Path(__file__).resolve().parents[1]
MODELS = ("gpt2-xl", "llama3-8b", "vit-l16", "resnet50", "mamba2-2.7b", "t5-large", "unet-sd15")


def measure(name: str, regions: list[int]) -> dict[str, Any]:
    """Plan one model in a process of its own, so that its peak memory is its own."""
    command = [sys.executable, "-m", "tests.zoo_wide.run", name, "--regions", *map(str, regions)]
    done = subprocess.run(command, cwd=HOME, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        return {"model": name, "error": last[0]}
    return json.loads(done.stdout)


def rows(record: dict[str, Any]) -> list[tuple[str, ...]]:
    """One row for each plan."""
    if "error" in record:
        return [(record["model"], *[""] * 9, record["error"])]
    made = []
    for plan in record["plans"]:
        shown = (record["model"], _big(record["parameters"])) if plan is record["plans"][0] else ("", "")
        if "error" in plan:
            made.append((*shown, "", str(plan["regions"]), *[""] * 6, plan["error"].replace("\n", " ")))
            continue
        made.append(
            (
                *shown,
                f"{plan['nodes']:,}",
                str(plan["regions"]),
                " ".join(map(str, plan["lanes"])),
                f"{plan['balance']:.2f}",
                f"{plan['inside']:.0%}",
                f"{plan['capture_seconds']:.1f}",
                f"{sum(plan['passes'].values()):.1f}",
                f"{record['mib']:,}",
                f"{plan['interface']}, {plan['readout']}",
            )
        )
    return made


def _big(count: int) -> str:
    return f"{count / 1e9:.2f}B" if count >= 1e9 else f"{count / 1e6:.1f}M"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS, metavar="NAME", help=", ".join(MODELS))
    parser.add_argument("--regions", type=int, nargs="+", default=[4, 8], metavar="K")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all that was measured there too")
    asked = parser.parse_args()
    table = Table(
        "model", "parameters", "nodes", "K", "lanes", "max/mean", "inside", "capture s", "passes s", "MiB", ""
    )
    records = []
    for name in asked.models:
        print(f"{name} ...", file=sys.stderr)
        records.append(measure(name, asked.regions))
        for row in rows(records[-1]):
            table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 150).print(table)
    print("lanes: values that cross each boundary; max/mean: FLOPs of the largest region over those of the mean one")
    print("inside: share of all FLOPs that lies in regions; MiB: peak memory of the process, PyTorch included")
    if asked.json:
        asked.json.write_text(json.dumps(records, indent=2) + "\n")
    plans = [plan for record in records for plan in record.get("plans", [record])]
    return 1 if any("error" in plan for plan in plans) else 0


if __name__ == "__main__":
    sys.exit(main())
