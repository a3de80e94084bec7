"""Where mixing depth matters: ``python examples/mixing.py``.

A token latent adds depth at a position and no mixing between positions: with it, K regions are K shallow mixers side by
side. Here are tasks that need mixers one after another (k hops along a random permutation, products in the group S5,
recall by way of a bridge), and which arms solve them. Rates are chosen on a validation split; rows, table and resuming
are those of ``quality.py``.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import command
import torch
from command import Say, add_sizes, at_least_one, parser_of
from local_report import mean
from quality_arms import ARMS, Study
from quality_report import chosen
from result_rows import Rows
from tasks import PointerChasing, Task, TwoHopRecall, WordProblem
from training import Settings

HOME = Path(__file__).parent / "results" / "mixing"
_SIZES = ("steps", "batch", "judged", "r", "seeds")
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
    made = parser_of(__doc__, home=HOME)
    made.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="all by default")
    made.add_argument("--arms", nargs="+", choices=COMPARED, default=list(COMPARED), help="all by default")
    made.add_argument("--architecture", default="transformer", help="default %(default)s")
    made.add_argument("--size", default="nano", help="default %(default)s")
    made.add_argument("--rates", type=float, nargs="+", default=[3e-3, 1e-2], help="grid of learning rates")
    add_sizes(made, argparse.Namespace(steps=2000, batch=32, judged=512, r=16, seeds=1), _SIZES)
    return made


def compare(options: argparse.Namespace, rows: Rows, say: Say) -> str:
    """Run all arms on all tasks that are asked for; returns the table."""
    at_least_one(*(getattr(options, name) for name in _SIZES))
    for task in options.tasks:
        study = study_of(task, options, rows, say=say)
        for arm in options.arms:
            study.arm(arm, seeds=options.seeds)
    return table(rows.asked())


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns its exit code."""
    return command.study("mixing", parser(), arguments, compare)


if __name__ == "__main__":
    torch.set_num_threads(1)  # the models are too small for more
    sys.exit(main())
