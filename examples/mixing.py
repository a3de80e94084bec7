"""Where mixing depth matters: ``python examples/mixing.py``.

A token latent adds depth at a position and no mixing between positions: with it, K regions are K shallow mixers side by
side. Here are tasks that need mixers one after another (k hops along a random permutation, products in the group S5,
recall by way of a bridge), and which arms solve them. Rates are chosen on a validation split; rows, table and resuming
are those of ``quality.py``.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import command
import torch
from command import Say, add_sizes, at_least_one, parser_of
from data import package
from figures import figure
from local_report import mean
from quality_arms import ARMS, Study
from quality_report import chosen
from result_rows import Rows
from tasks import LastAsked, PointerChasing, Task, TwoHopRecall, WordProblem
from training import Settings

HOME = Path(__file__).parent / "results" / "mixing"
_SIZES = ("steps", "batch", "judged", "r", "seeds")
_BUDGET = ("size", "steps", "batch", "judged", "r")
COMPARED = ("dense", "shallow", "self", "chunked", "token", "both")
TASKS: dict[str, tuple[str, Task]] = {
    "1 hop": ("one hop in a permutation of 6", PointerChasing(nodes=6, hops=1, queries=6)),
    "2 hops": ("two hops", PointerChasing(nodes=6, hops=2, queries=6)),
    "3 hops": ("three hops", PointerChasing(nodes=6, hops=3, queries=6)),
    "S5": ("products of 8 exchanges of neighbours in S5", WordProblem(letters=8, swaps=True)),
    "recall": ("value of a key by way of a bridge, 4 keys", TwoHopRecall(keys=4, values=6, queries=4)),
}
# of these the last answer alone is judged too: the earlier ones need less depth, and hide what is missing
WHOLE = {"S5": "the product of all 8 alone"}
LAST = "last"


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
    test = validation.held_out()
    budget = {name: getattr(options, name) for name in _BUDGET}
    return Study(
        {"task": task, "architecture": options.architecture, **budget, **dataclasses.asdict(source)},
        common,
        data=lambda seed: dataclasses.replace(source, seed=seed),
        judges={"validation": validation, "test": test, **({LAST: LastAsked(test, 1)} if task in WHOLE else {})},
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
    shown = _columns(rows)
    lines = ["| arm | " + " | ".join(label for _, label, _ in shown) + " |", "|---" * (len(shown) + 1) + "|"]
    for arm in COMPARED:
        cells = [mean(_accuracies(rows, arm, task, judge)) for task, _, judge in shown]
        if any(cells):
            lines.append(f"| {ARMS[arm].label} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _columns(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, str]]:
    """Task, label and name of the judge."""
    columns = []
    for name, (label, _) in TASKS.items():
        if any(row["what"]["task"] == name for row in rows):
            columns.append((name, label, "test"))
            columns += [(name, WHOLE[name], LAST)] if name in WHOLE else []
    return columns


def _accuracies(rows: Sequence[Mapping[str, Any]], arm: str, task: str, judge: str) -> list[float]:
    """In percent, one for each seed."""
    mine = [_without_r(row) for row in rows if row["what"]["task"] == task]
    found = chosen(mine, mine[0]["what"]["architecture"], arm)
    return [100 * one[judge]["accuracy"] for one in found.values()]


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw accuracies on the test split by arm, one panel a column of the table.

    Args:
        rows: As for ``table``.
        path: The PNG file.

    Raises:
        PackageError: ``matplotlib`` is not installed.
    """
    shown = _columns(rows)
    drawn = figure(1.8 + 3.4 * len(shown), 2.8)
    for place, (task, label, judge) in enumerate(shown):
        axes = drawn.add_subplot(1, len(shown), place + 1, xlabel="test accuracy, %")
        axes.set_title("\n".join(textwrap.wrap(label, 42)), fontsize=9)
        for height, arm in enumerate(reversed(COMPARED)):
            values = _accuracies(rows, arm, task, judge)
            if values:
                axes.barh(height, statistics.fmean(values), color="C0" if arm in ("dense", "shallow") else "C1")
                axes.plot(values, [height] * len(values), "k|")
        labels = [ARMS[arm].label for arm in reversed(COMPARED)]
        axes.set_yticks(range(len(COMPARED)), labels if place == 0 else [""] * len(COMPARED))
        axes.set_xlim(0, 100)
        axes.grid(axis="x", alpha=0.3)
    drawn.savefig(path, dpi=130)


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
    made.add_argument("--plot", action="store_true", help="draw figure.png")
    made.add_argument("--only-report", action="store_true", help="run nothing, make table and figure of the rows")
    return made


def compare(options: argparse.Namespace, rows: Rows, say: Say) -> str:
    """Run all arms on all tasks that are asked for; returns the table."""
    at_least_one(*(getattr(options, name) for name in _SIZES))
    if options.plot:
        package("matplotlib", needed_for="the figure")
    for task in [] if options.only_report else options.tasks:
        study = study_of(task, options, rows, say=say)
        for arm in options.arms:
            study.arm(arm, seeds=options.seeds)
    budget = {name: getattr(options, name) for name in ("architecture", *_BUDGET)}
    shown = [row for row in rows.all() if budget.items() <= row["what"].items()]
    if options.plot:
        draw(shown, options.out / "figure.png")
    return table(shown)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns its exit code."""
    return command.study("mixing", parser(), arguments, compare)


if __name__ == "__main__":
    torch.set_num_threads(1)  # the models are too small for more
    sys.exit(main())
