"""Where mixing depth matters: ``python examples/mixing.py``.

A token latent adds depth at a position and no mixing between positions: with it, K regions are K shallow mixers side by
side. Here are tasks that need mixers one after another (k hops along a random permutation, products in the group S5,
recall by way of a bridge), and which arms solve them. Rates are chosen on a validation split; rows, table and resuming
are those of ``quality.py``.
"""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from local_report import mean
from quality_arms import ARMS, Study
from quality_report import chosen
from result_rows import Rows
from rich.console import Console
from tasks import PointerChasing, Task, TwoHopRecall, WordProblem
from training import Settings

from lbi_compile.errors import LBIError, OptionError

HOME = Path(__file__).parent / "results" / "mixing"
COMPARED = ("dense", "shallow", "self", "chunked", "token", "both")
TASKS: dict[str, tuple[str, Task]] = {
    "1 hop": ("one hop in a permutation of 6", PointerChasing(nodes=6, hops=1, queries=6)),
    "2 hops": ("two hops", PointerChasing(nodes=6, hops=2, queries=6)),
    "3 hops": ("three hops", PointerChasing(nodes=6, hops=3, queries=6)),
    "S5": ("products of 8 exchanges of neighbours in S5", WordProblem(letters=8, swaps=True)),
    "recall": ("value of a key by way of a bridge, 4 keys", TwoHopRecall(keys=4, values=6, queries=4)),
}


def study_of(task: str, options: argparse.Namespace, rows: Rows, *, say: Any) -> Study:
    """All runs on one task.

    Args:
        task: One of ``TASKS``.
        options: Of the command line.
        rows: Where runs are kept.
        say: Prints a line.
    """
    _, source = TASKS[task]
    common = Settings(
        architecture=options.architecture,
        size=options.size,
        length=source.length,
        steps=options.steps,
        batch=options.batch,
        evaluate_every=options.steps,
        evaluate_on=options.judged,
        r=options.r,
    )
    validation = source.held_out()
    budget = {name: getattr(options, name) for name in ("size", "steps", "batch", "judged", "r")}
    return Study(
        {"task": task, "architecture": options.architecture, **budget, **dataclasses.asdict(source)},
        common,
        data=lambda seed: dataclasses.replace(source, seed=seed),
        judges={"validation": validation, "test": validation.held_out()},
        vocabulary=source.vocabulary,
        rows=rows,
        rates=tuple(options.rates),
        say=say,
    )


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: accuracy on the test split by arm and task.

    Args:
        rows: Of one size and budget.
    """
    tasks = [name for name in TASKS if any(row["what"]["task"] == name for row in rows)]
    lines = ["| arm | " + " | ".join(TASKS[name][0] for name in tasks) + " |", "|---" * (len(tasks) + 1) + "|"]
    for arm in COMPARED:
        cells = []
        for task in tasks:
            mine = [row for row in rows if row["what"]["task"] == task]
            architecture = mine[0]["what"]["architecture"]
            found = chosen([_without_r(row) for row in mine], architecture, arm)
            cells.append(mean([100 * one["test"]["accuracy"] for one in found.values()]))
        if any(cells):
            lines.append(f"| {ARMS[arm].label} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _without_r(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row whose latent width, the same for all, is no variation."""
    return {**row, "what": {name: value for name, value in row["what"].items() if name != "r"}}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    made.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="all by default")
    made.add_argument("--arms", nargs="+", choices=COMPARED, default=list(COMPARED), help="all by default")
    made.add_argument("--architecture", default="transformer", help="default %(default)s")
    made.add_argument("--size", default="nano", help="default %(default)s")
    made.add_argument("--rates", type=float, nargs="+", default=[3e-3, 1e-2], help="grid of learning rates")
    for name, value in (("steps", 2000), ("batch", 32), ("judged", 512), ("r", 16), ("seeds", 1)):
        made.add_argument(f"--{name}", type=int, default=value, metavar="N", help="default %(default)s")
    made.add_argument("--out", type=Path, default=HOME, help="folder of rows and table")
    return made


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns its exit code."""
    given = sys.argv[1:] if arguments is None else arguments
    options = parser().parse_args(given)
    say = Console(highlight=False, soft_wrap=True).print
    try:
        if min(options.steps, options.batch, options.judged, options.seeds) < 1:
            raise OptionError("a number below 1", expected="sizes and seeds from 1 on", do="pass larger numbers")
        rows = Rows(options.out / "rows.jsonl", command=shlex.join(["python", "examples/mixing.py", *given]))
        for task in options.tasks:
            study = study_of(task, options, rows, say=say)
            for arm in options.arms:
                study.arm(arm, seeds=options.seeds)
        text = table(rows.asked())
        (options.out / "table.md").write_text(text)
        say(text)
    except LBIError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)  # the models are too small for more
    sys.exit(main())
