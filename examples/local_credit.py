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
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from choosing import choose
from data import package
from local_arms import ARMS, Budget, candidate, run
from local_report import draw, table
from result_rows import Rows
from rich.console import Console

from lbi_compile.errors import LBIError, OptionError

HOME = Path(__file__).parent / "results" / "local_credit"
CHOICE_SEED, WRONG = 100, (0.0, 0.2, 0.4)


def study(name: str, budget: Budget, rows: Rows, *, seeds: int, wrong: Sequence[float], say: Any) -> None:
    """Choose the settings of an arm, then judge it.

    Args:
        name: Name of the arm.
        budget: What all arms share.
        rows: Where runs are kept.
        seeds: How many are judged.
        wrong: Shares of wrong classes.
        say: Prints a line.
    """
    arm = ARMS[name]

    def once(chosen: dict[str, Any], *, seed: int, wrong: float, judge: str) -> float:
        where = {"seed": seed, "wrong": wrong, "judge": judge}
        what = {"arm": name, "chosen": chosen, **dataclasses.asdict(budget), **where}
        measure = functools.partial(run, arm, chosen, budget, **where)
        found = rows.measured(what, functools.partial(candidate, measure) if judge == "validation" else measure)
        say(f"{arm.label}, {chosen}, {wrong:.0%} wrong, seed {seed}: {found['accuracy']:.1f} on {judge}")
        return found["accuracy"]

    chosen = choose(arm.choices, lambda tried: once(tried, seed=CHOICE_SEED, wrong=0.0, judge="validation"))
    for share in wrong:
        for seed in range(seeds):
            once(chosen, seed=seed, wrong=share, judge="test")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    made.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="all by default")
    made.add_argument("--seeds", type=int, default=3, metavar="N", help="seeds that are judged (%(default)s)")
    made.add_argument("--wrong", type=float, nargs="+", default=list(WRONG), help="shares of wrong classes")
    for field in dataclasses.fields(Budget):
        made.add_argument(f"--{field.name}", type=int, default=field.default, metavar="N", help="default %(default)s")
    made.add_argument("--out", type=Path, default=HOME, help="folder of rows, table and figure")
    made.add_argument("--plot", action="store_true", help="draw figure.png")
    return made


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns its exit code."""
    given = sys.argv[1:] if arguments is None else arguments
    options = parser().parse_args(given)
    say = Console(highlight=False, soft_wrap=True).print
    budget = Budget(**{field.name: getattr(options, field.name) for field in dataclasses.fields(Budget)})
    try:
        if options.seeds < 1 or min(dataclasses.astuple(budget)) < 1:
            raise OptionError("a number below 1", expected="sizes and seeds from 1 on", do="pass larger numbers")
        if options.plot:
            package("matplotlib", needed_for="the figure")
        rows = Rows(options.out / "rows.jsonl", command=shlex.join(["python", "examples/local_credit.py", *given]))
        for name in options.arms:
            study(name, budget, rows, seeds=options.seeds, wrong=options.wrong, say=say)
        text = table(rows.asked())
        (options.out / "table.md").write_text(text)
        say(text)
        if options.plot:
            draw(rows.asked(), options.out / "figure.png")
    except LBIError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)  # the nets are too small for more
    sys.exit(main())
