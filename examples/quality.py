"""What a bounded model loses and gains: ``python examples/quality.py``.

Every arm chooses its learning rate from one grid by the loss on a validation split with one seed; then its seeds are
judged on a test split. Arms are dense models, bounded ones and controls, for four architectures. Rows go to
``rows.jsonl`` as they are made, so that a run that was stopped goes on; ``table.md`` and, with ``--plot``,
``figure.png`` are made of them, with ``--only-report`` of what there is.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import command
import torch
from command import Say, add_sizes, at_least_one, parser_of
from data import ByteTokens, Corpus, Windows, corpus, library, package
from models import ARCHITECTURES, PRESETS
from quality_arms import ARMS, Study
from quality_report import best, draw, table
from result_rows import Rows
from training import Settings

from lbi_compile.errors import OptionError

HOME = Path(__file__).parent / "results" / "quality"
_SIZES = ("steps", "batch", "bytes", "judged")
SHOWN = ("transformer", "mamba2", "mamba3", "hybrid")
# three seeds where the claim is made, one where it is looked at
SEEDS = {"transformer": 3, "mamba2": 3}


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """What all arms share.

    Attributes:
        size: One of ``models.PRESETS``.
        steps: Optimizer steps.
        batch: Sequences in a step B.
        bytes: Bytes of text, about.
        judged: Held-out sequences of either split.
    """

    size: str = "nano"
    steps: int = 800
    batch: int = 8
    bytes: int = 4_000_000
    judged: int = 512


def study_of(
    architecture: str, budget: Budget, text: Corpus, rows: Rows, *, rates: tuple[float, ...], say: Any
) -> Study:
    """All runs of one architecture.

    Args:
        architecture: Which.
        budget: What all arms share.
        text: The text in tokens.
        rows: Where runs are kept.
        rates: The grid of learning rates.
        say: Prints a line.
    """
    common = Settings(
        architecture=architecture,
        size=budget.size,
        steps=budget.steps,
        batch=budget.batch,
        evaluate_every=budget.steps,
        evaluate_on=budget.judged,
    )
    half = len(text.held_out) // 2
    parts = {"validation": text.held_out[:half], "test": text.held_out[half:]}
    return Study(
        {"architecture": architecture, **dataclasses.asdict(budget)},
        common,
        data=lambda seed: Windows(text.train, length=common.positions, seed=seed),
        judges={name: Windows(part, length=common.positions) for name, part in parts.items()},
        vocabulary=text.vocabulary,
        lengths=text.lengths,
        rows=rows,
        rates=rates,
        say=say,
    )


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = parser_of(__doc__, home=HOME)
    made.add_argument("architectures", nargs="*", metavar="ARCHITECTURE", help=f"by default {', '.join(SHOWN)}")
    made.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="all by default")
    made.add_argument("--seeds", type=int, metavar="N", help="seeds that are judged (3, or 1 for mamba3 and hybrid)")
    made.add_argument("--rates", type=float, nargs="+", default=[5e-3, 1e-2, 2e-2], help="grid of learning rates")
    made.add_argument("--vary", action="store_true", help="other latent widths and region sizes of the best arm too")
    made.add_argument("--size", choices=PRESETS, default=Budget().size, help="default %(default)s")
    add_sizes(made, Budget(), _SIZES)
    made.add_argument("--plot", action="store_true", help="draw figure.png")
    made.add_argument("--only-report", action="store_true", help="run nothing, make table and figure of the rows")
    return made


def compare(options: argparse.Namespace, rows: Rows, say: Say) -> str:
    """Run what the options ask for, with table and figure after every arm; returns the table."""
    names = options.architectures or list(SHOWN)
    for name in names:
        if name not in ARCHITECTURES:
            raise OptionError(f"architecture {name!r}", expected=f"of {', '.join(ARCHITECTURES)}", do="name one")
    budget = Budget(**{field.name: getattr(options, field.name) for field in dataclasses.fields(Budget)})
    at_least_one(*(getattr(budget, name) for name in _SIZES), 1 if options.seeds is None else options.seeds)
    if options.plot:
        package("matplotlib", needed_for="the figure")

    def report() -> str:
        mine = [row for row in rows.all() if dataclasses.asdict(budget).items() <= row["what"].items()]
        text = table(mine)
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "table.md").write_text(text)
        if options.plot:
            draw(mine, options.out / "figure.png")
        return text

    if not options.only_report:
        text = corpus(library(most=budget.bytes), ByteTokens())
        for name in names:
            seeds = options.seeds or SEEDS.get(name, 1)
            study = study_of(name, budget, text, rows, rates=tuple(options.rates), say=say)
            for judged in dict.fromkeys((1, seeds)):  # rates of all arms first: an early stop leaves a comparison
                for arm in options.arms:
                    study.arm(arm, seeds=judged)
                    report()
            if options.vary:
                vary(study, best(rows.all(), name), seeds=seeds)
    return report()


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns its exit code."""
    return command.study("quality", parser(), arguments, compare)


def vary(study: Study, arm: str, *, seeds: int) -> None:
    """Run the best arm with other latent widths, and with other numbers of layers in a region.

    Args:
        study: Of an architecture.
        arm: Which arm.
        seeds: How many are judged.
    """
    for r in (4, 32, 64):
        study.arm(arm, seeds=seeds, options={"r": r})
    layers = study.common.preset.layers
    for size in range(1, 5):
        regions = layers // size
        if regions > 1 and layers % size == 0 and regions != study.common.cut:
            study.arm(arm, seeds=seeds, options={"regions": regions})


if __name__ == "__main__":
    torch.set_num_threads(1)  # the models are too small for more
    sys.exit(main())
