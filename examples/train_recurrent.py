"""Teach a recurrent net without backpropagation through time: ``python examples/train_recurrent.py``.

A GRU reads scikit-learn's digits row by row, eight steps; every step is a region, so that the binary tree of HBLL lies
over time. Beside it: backpropagation through time; every step taught by its own cross entropy, with nothing that comes
back from later steps (what the tree has to beat); and a build that leaks on purpose, in which regions are fed the
posteriors, which hold the label. It learns to read the label instead of the rows and must fail on the test split.
All settings are chosen on a validation split. Rows go to ``rows.jsonl`` as they are made, so that a run that was
stopped goes on.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import statistics
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from choosing import Choice, choose
from command import Say, add_sizes, at_least_one, parser_of, study
from digits import CLASSES, Split, rows
from local_arms import accuracy, candidate, fit
from local_report import mean
from result_rows import Rows
from torch import Tensor, nn

import lbi_compile
from lbi_compile import HBLL
from lbi_compile.credit.base import Credit
from lbi_compile.credit.hbll import Hbll
from lbi_compile.credit.site import Site

HOME = Path(__file__).parent / "results" / "recurrent"
CHOICE_SEED = 100
_RATES: Choice = ("learning_rate", (3e-3, 1e-3, 1e-2))


class RowGRU(nn.Module):
    """A GRU cell over rows `[B, T, F]`, unrolled, read out after the last one.

    Args:
        features: Features of a row F.
        width: Width of the state.
    """

    def __init__(self, features: int, *, width: int) -> None:
        super().__init__()
        self.embed, self.width = nn.Linear(features, width), width
        self.cell = nn.GRUCell(width, width)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.states(x)[-1])

    def states(self, x: Tensor, *, detached: bool = False) -> list[Tensor]:
        """The state after every row; ``detached``: no gradient from one step to the step before."""
        embedded = self.embed(x)
        h, found = embedded.new_zeros(x.shape[0], self.width), []
        for t in range(x.shape[1]):
            h = self.cell(embedded[:, t], h.detach() if detached else h)
            found.append(h)
        return found


class _Leaking(Hbll):
    def leaf_inputs(self, proposals: list[Tensor], posteriors: list[Tensor]) -> list[Tensor]:
        return posteriors[:-1]


@dataclass(frozen=True, eq=False)
class LeakingHBLL(HBLL):
    """HBLL done wrong: regions are fed posteriors. To show what the tests of a leak have to catch; never to be used."""

    def build(self, site: Site) -> Hbll:
        return _Leaking(site, self)


@dataclass(frozen=True, slots=True)
class Arm:
    """One way of teaching.

    Attributes:
        label: Its name in the table.
        rule: The local rule, or ``None``.
        detached: Without a rule: every step by itself.
        choices: As in ``choosing.choose``.
        like: Takes the settings that another arm chose.
    """

    label: str
    rule: type[Credit] | None = None
    detached: bool = False
    choices: tuple[Choice, ...] = (_RATES,)
    like: str | None = None


_TREE = (
    ("learning_rate", (3e-3, 1e-2)),
    ("latent", ("bottleneck", "state")),
    ("r", (32, 64)),
    ("match", (0.3, 1.0, 0.0)),
)
ARMS = {
    "bptt": Arm("backpropagation through time"),
    "detached": Arm("each step by itself", detached=True),
    "hbll": Arm("HBLL", HBLL, choices=_TREE),
    "leaking": Arm("HBLL that leaks on purpose", LeakingHBLL, like="hbll"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """What all arms share.

    Attributes:
        width: Width of the state.
        steps: Optimizer steps.
        batch: Digits in a step B.
    """

    width: int = 64
    steps: int = 1000
    batch: int = 64


def run(arm: Arm, chosen: Mapping[str, Any], budget: Budget, *, seed: int, judge: str) -> dict[str, Any]:
    """Train an arm once and judge it.

    Args:
        arm: The arm.
        chosen: A value for each of its choices.
        budget: What all share.
        seed: Of weights and of the order of batches.
        judge: Split to judge by.

    Returns:
        ``accuracy`` in percent, and for a tree ``paths``: accuracy by hops.
    """
    data, held_out = rows("train"), rows(judge)
    settings = dict(chosen)
    rate, r = settings.pop("learning_rate"), settings.pop("r", 0)
    torch.manual_seed(seed)
    model = RowGRU(data.x.shape[2], width=budget.width)
    steps = data.x.shape[1]
    if arm.rule is not None:
        rule: Any = arm.rule
        # as many sweeps as the bound on dependent steps allows: regions learn on what they will be fed
        credit = rule(tied=True, sweeps=(steps - 1).bit_length(), **settings)
        bounded = lbi_compile.transform(model, data.x[:4], regions=steps, r=r, credit=credit, seed=seed)
        _fit(bounded, lambda x, y: bounded.local_loss(x, target=y), data, rate, budget, seed)
        with torch.no_grad():
            paths = {str(n): accuracy(bounded.forward_path(held_out.x, hops=n), held_out.y) for n in (1, 2, 4, steps)}
            return {"accuracy": accuracy(bounded(held_out.x), held_out.y), "paths": paths}

    def loss(x: Tensor, y: Tensor) -> Tensor:
        if not arm.detached:
            return F.cross_entropy(model(x), y)
        return torch.stack([F.cross_entropy(model.head(h), y) for h in model.states(x, detached=True)]).sum()

    _fit(model, loss, data, rate, budget, seed)
    with torch.no_grad():
        return {"accuracy": accuracy(model(held_out.x), held_out.y)}


def _fit(model: nn.Module, loss: Any, data: Split, rate: float, budget: Budget, seed: int) -> None:
    fit(model, loss, data, optimizer="adam", rate=rate, steps=budget.steps, batch=budget.batch, seed=seed)


def table(found: Mapping[str, list[dict[str, Any]]], chosen: Mapping[str, dict[str, Any]]) -> str:
    """Markdown: accuracy of the arms, paths of the tree, and what was aimed at."""
    lines = ["| arm | chosen | test accuracy |", "|---|---|---|"]
    for name, results in found.items():
        settings = ", ".join(f"{setting} {value}" for setting, value in chosen[name].items())
        lines.append(f"| {ARMS[name].label} | {settings} | {mean([one['accuracy'] for one in results])} |")
    if "hbll" in found:
        paths = found["hbll"][0]["paths"]
        lines += ["", "| hops of HBLL | " + " | ".join(paths) + " |", "|---|" + "---|" * len(paths)]
        cells = [mean([one["paths"][hops] for one in found["hbll"]]) for hops in paths]
        lines.append(f"| test accuracy | {' | '.join(cells)} |")
    lines += ["", "| aim | found | |", "|---|---|---|"]
    at = {name: statistics.fmean(one["accuracy"] for one in results) for name, results in found.items()}
    for words, names, reached in (
        ("HBLL at least 93", ("hbll",), lambda h: h >= 93),
        ("HBLL at most 5 below backpropagation through time", ("hbll", "bptt"), lambda h, b: h >= b - 5),
        ("HBLL above each step by itself", ("hbll", "detached"), lambda h, d: h > d),
        ("the leak falls below 60", ("leaking",), lambda leak: leak < 60),
    ):
        if all(name in at for name in names):
            values = [at[name] for name in names]
            shown = ", ".join(f"{value:.1f}" for value in values)
            lines.append(f"| {words} | {shown} | {'reached' if reached(*values) else 'missed'} |")
    return "\n".join(lines) + "\n"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = parser_of(__doc__, home=HOME)
    made.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="all by default")
    made.add_argument("--seeds", type=int, default=3, metavar="N", help="seeds that are judged (%(default)s)")
    add_sizes(made, Budget())
    return made


def compare(options: argparse.Namespace, kept: Rows, say: Say) -> str:
    """Study all arms that are asked for; returns the table."""
    budget = Budget(**{own.name: getattr(options, own.name) for own in dataclasses.fields(Budget)})
    at_least_one(options.seeds, *dataclasses.astuple(budget))
    found: dict[str, list[dict[str, Any]]] = {}
    chosen: dict[str, dict[str, Any]] = {}

    def once(name: str, settings: dict[str, Any], *, seed: int, judge: str) -> dict[str, Any]:
        what = {"arm": name, "chosen": settings, **dataclasses.asdict(budget), "seed": seed, "judge": judge}
        measure = functools.partial(run, ARMS[name], settings, budget, seed=seed, judge=judge)
        result = kept.measured(what, functools.partial(candidate, measure) if judge == "validation" else measure)
        say(f"{ARMS[name].label}, {settings}, seed {seed}: {result['accuracy']:.1f} on {judge}")
        return result

    for name in options.arms:
        # an arm that takes another one's settings makes that one's choice first
        source = ARMS[name].like or name
        chosen[name] = choose(
            ARMS[source].choices,
            lambda tried, source=source: once(source, tried, seed=CHOICE_SEED, judge="validation")["accuracy"],
        )
        found[name] = [once(name, chosen[name], seed=seed, judge="test") for seed in range(options.seeds)]
    return table(found, chosen)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns its exit code."""
    return study("train_recurrent", parser(), arguments, compare)


if __name__ == "__main__":
    torch.set_num_threads(1)  # the net is too small for more
    sys.exit(main())
