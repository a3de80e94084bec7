"""Compare local credit with backpropagation on one trunk: ``python examples/local_credit.py``.

The task is scikit-learn's digits, turned, resized, shifted and with noise, classified by a residual MLP of eight
blocks, one a region. Every arm chooses its settings on a validation split with one seed and correct classes; three
other seeds are then judged on a test split, with 0, 20 and 40 % of the training pictures under a wrong class. Rows go
to ``rows.jsonl`` as they are made, so that a run that was stopped goes on; ``table.md`` and, with ``--plot``,
``figure.png`` are made of them.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from choosing import choose
from cifar import CifarPictures
from command import Say, add_sizes, at_least_one, parser_of, study
from data import package
from local_arms import ARMS, Budget, candidate, run
from local_report import draw, table
from result_rows import Rows

HOME = Path(__file__).parent / "results" / "local_credit"
CHOICE_SEED, WRONG = 100, (0.0, 0.2, 0.4)


def study_arm(
    name: str, budget: Budget, rows: Rows, *, seeds: int, wrong: Sequence[float], folder: Path | None, say: Say
) -> None:
    """Choose the settings of an arm, then judge it.

    Args:
        name: Name of the arm.
        budget: What all arms share.
        rows: Where runs are kept.
        seeds: How many are judged.
        wrong: Shares of wrong classes.
        folder: Of CIFAR, in place of the digits.
        say: Prints a line.
    """
    arm = ARMS[name]

    def once(chosen: dict[str, Any], *, seed: int, wrong: float, judge: str) -> float:
        where = {"seed": seed, "wrong": wrong, "judge": judge}
        # what is given too: rows of an arm that was another one are none of this one
        what = {"arm": name, "fixed": dict(arm.fixed), "chosen": chosen, **dataclasses.asdict(budget), **where}
        if folder is not None:
            what["task"] = CifarPictures(folder=folder).name
        measure = functools.partial(run, arm, chosen, budget, **where, folder=folder)
        found = rows.measured(what, functools.partial(candidate, measure) if judge == "validation" else measure)
        say(f"{arm.label}, {chosen}, {wrong:.0%} wrong, seed {seed}: {found['accuracy']:.1f} on {judge}")
        return found["accuracy"]

    chosen = choose(arm.choices, lambda tried: once(tried, seed=CHOICE_SEED, wrong=0.0, judge="validation"))
    for share in wrong if arm.noisy else [share for share in wrong if not share]:
        for seed in range(seeds):
            once(chosen, seed=seed, wrong=share, judge="test")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = parser_of(__doc__, home=HOME)
    made.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="all by default")
    made.add_argument("--seeds", type=int, default=3, metavar="N", help="seeds that are judged (%(default)s)")
    made.add_argument("--wrong", type=float, nargs="+", default=list(WRONG), help="shares of wrong classes")
    add_sizes(made, Budget())
    made.add_argument("--cifar", type=Path, metavar="DIR", help="pictures of CIFAR in this folder, not the digits")
    made.add_argument("--plot", action="store_true", help="draw figure.png")
    return made


def compare(options: argparse.Namespace, rows: Rows, say: Say) -> str:
    """Study all arms that are asked for; returns the table."""
    budget = Budget(**{field.name: getattr(options, field.name) for field in dataclasses.fields(Budget)})
    at_least_one(options.seeds, *dataclasses.astuple(budget))
    if options.plot:
        package("matplotlib", needed_for="the figure")
    for name in options.arms:
        study_arm(name, budget, rows, seeds=options.seeds, wrong=options.wrong, folder=options.cifar, say=say)
    if options.plot:
        draw(rows.asked(), options.out / "figure.png")
    return table(rows.asked())


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns its exit code."""
    return study("local_credit", parser(), arguments, compare)


if __name__ == "__main__":
    torch.set_num_threads(1)  # the nets are too small for more
    sys.exit(main())
