"""What a bounded model keeps of a trained dense one: ``python examples/warm_start.py``.

A dense model is trained and then cut. Its regions now read what they never read before: the canvas, and a latent. How
much of its loss that keeps, and how fast it returns, is measured against the same bounded model from scratch and
against the dense model itself, all with the same further steps. Boundaries can be distilled first: for a part of those
steps each region's place in the stream is pulled towards what crosses there in the dense model. Every arm chooses its
learning rate on a validation split with seed 0. Rows are kept, so that a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import json
import math
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import command
import torch
from choosing import with_best_rate
from command import Say, add_sizes, at_least_one, parser_of
from data import ByteTokens, Corpus, Windows, corpus, library, package
from figures import figure
from local_report import mean
from models import LanguageModel
from result_rows import Rows
from run_folder import METRICS
from torch import Tensor
from training import DENSE, Settings, Source, evaluate, make_model, make_optimizer, rate_at, train, transform_options

import lbi_compile
from lbi_compile import BoundedModule

HOME = Path(__file__).parent / "results" / "warm_start"
_SIZES = ("steps", "distill", "batch", "judged", "seeds")
ARMS = {
    "dense": "the dense model, trained on",
    "scratch": "bounded, from scratch",
    "warm": "bounded, from the dense model",
    "distilled": "bounded, from the dense model, boundaries distilled first",
}


@dataclass(frozen=True, slots=True)
class Ahead:
    """Data from a position on.

    Attributes:
        source: The data.
        start: Sequences that are passed over.
    """

    source: Source
    start: int

    def batch(self, position: int, size: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets, both `[B, T]`."""
        return self.source.batch(self.start + position, size)


class Trained:
    """Dense models that were trained before, one for each seed; made when they are first asked for.

    Args:
        settings: Of their training.
        text: What they are trained on.
    """

    def __init__(self, settings: Settings, text: Corpus) -> None:
        self.settings, self.text = dataclasses.replace(settings, interface=DENSE), text
        self._made: dict[int, Any] = {}

    def __call__(self, seed: int) -> Any:
        """A copy of the model of a seed."""
        if seed not in self._made:
            settings = dataclasses.replace(self.settings, seed=seed)
            data = Windows(self.text.train, length=settings.positions, seed=seed)
            model = make_model(settings, data.batch(0, 2)[0], vocabulary=self.text.vocabulary)
            with tempfile.TemporaryDirectory() as folder:
                train(model, data, data, settings, folder=Path(folder), quiet=True)
            self._made[seed] = model
        return copy.deepcopy(self._made[seed])


def stream(model: LanguageModel, tokens: Tensor, *, regions: int) -> list[Tensor]:
    """What a dense model's stream holds where each of its regions ends, `[B, T, D]` by region.

    Args:
        model: Dense; every region has as many of its blocks.
        tokens: `[B, T]`.
        regions: Number of regions K.
    """
    x, ends = model.embedding(tokens), []
    for number, block in enumerate(model.blocks, 1):
        x = block(x)
        if number % (len(model.blocks) // regions) == 0:
            ends.append(x)
    return ends


def reached(bounded: BoundedModule, tokens: Tensor) -> list[Tensor]:
    """What a bounded model has added up where each of its regions ends, `[B, T, D]` by region.

    With a summed readout that is the canvas and all that regions 0..k have added to what they read.

    Args:
        bounded: With a summed readout.
        tokens: `[B, T]`.
    """
    _, taps = bounded.forward_regions(tokens)
    source: Any = bounded.source
    canvas = source.embedding(tokens)
    total, ends = canvas, []
    for k, (h, m) in enumerate(zip(taps.h, taps.m, strict=True)):
        total = total + h - bounded.interface.enter(k, canvas, m)
        ends.append(total)
    return ends


def boundary_loss(bounded: BoundedModule, teacher: LanguageModel, tokens: Tensor) -> Tensor:
    """Mean square of the distance between both models' streams where regions end, in parts of the dense model's.

    Args:
        bounded: With a summed readout.
        teacher: The dense model it is made of, with its own parameters.
        tokens: `[B, T]`.
    """
    with torch.no_grad():
        wanted = stream(teacher, tokens, regions=len(bounded.plan.regions))
    pairs = zip(reached(bounded, tokens), wanted, strict=True)
    return torch.stack([(ours - goal).square().mean() / goal.square().mean() for ours, goal in pairs]).mean()


def distill(bounded: BoundedModule, teacher: LanguageModel, data: Source, settings: Settings, *, steps: int) -> float:
    """Train every parameter of a bounded model by ``boundary_loss``.

    Args:
        bounded: What to train.
        teacher: The dense model.
        data: What to read.
        settings: Of the run.
        steps: Steps, over which the rate falls.

    Returns:
        The last loss.
    """
    settings = dataclasses.replace(settings, steps=steps)
    optimizer = make_optimizer(bounded, settings)
    loss = math.nan
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step, settings)
        tokens, _ = data.batch(step * settings.batch, settings.batch)
        found = boundary_loss(bounded, teacher, tokens)
        found.backward()
        torch.nn.utils.clip_grad_norm_(bounded.parameters(), settings.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss = found.item()
    return loss


def run(
    arm: str, settings: Settings, trained: Trained, *, steps: int, distilled: int, judges: Mapping[str, Windows]
) -> dict[str, Any]:
    """Train an arm once and judge it.

    Args:
        arm: One of ``ARMS``.
        settings: Of the run.
        trained: The dense models.
        steps: All further steps.
        distilled: How many of them go to the boundaries, where the arm distils.
        judges: The splits ``"validation"`` and ``"test"``.

    Returns:
        Losses in nats per token: ``dense``, on the test split, of the dense model as it was trained; ``cut``, on the
        test split, before any further step; ``curve``, pairs of further steps and validation loss; ``validation`` and
        ``test`` at the end.
    """
    text, seed = trained.text, settings.seed
    teacher = trained(seed)
    # text that follows what the dense model has read, in the same order for all arms
    data = Ahead(
        Windows(text.train, length=settings.positions, seed=seed), trained.settings.steps * trained.settings.batch
    )
    example = judges["test"].batch(0, 2)[0]
    if arm == "dense":
        model: Any = trained(seed)
    elif arm == "scratch":
        model = make_model(settings, example, vocabulary=text.vocabulary)
    else:
        model = lbi_compile.transform(trained(seed), example, **transform_options(settings))
    found: dict[str, Any] = {
        "dense": evaluate(teacher, judges["test"], settings)["held_out"],
        "cut": evaluate(model, judges["test"], settings)["held_out"],
    }
    curve = [(0, evaluate(model, judges["validation"], settings)["held_out"])]
    done = distilled if arm == "distilled" else 0
    if done:
        found["boundaries"] = distill(model, teacher, data, settings, steps=done)
        curve.append((done, evaluate(model, judges["validation"], settings)["held_out"]))
        data = Ahead(data, done * settings.batch)
    settings = dataclasses.replace(settings, steps=steps - done)
    with tempfile.TemporaryDirectory() as folder:
        train(model, data, judges["validation"], settings, folder=Path(folder), quiet=True)
        lines = [json.loads(line) for line in (Path(folder) / METRICS).read_text().splitlines()]
    curve += [(done + line["step"], line["held_out"]) for line in lines if "held_out" in line]
    found |= {"curve": curve, "validation": curve[-1][1]}
    return found | {"test": evaluate(model, judges["test"], settings)["held_out"]}


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: test losses by architecture, interface and arm, with the rate that is best on the validation split.

    Args:
        rows: Of one budget.
    """
    heads = ["model", "arm", "rate", "seeds", "dense before", "right after", "at the end", "- dense trained on"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for name in dict.fromkeys((row["what"]["architecture"], row["what"]["interface"]) for row in rows):
        here = [row for row in rows if (row["what"]["architecture"], row["what"]["interface"]) == name]
        beside = [row for row in rows if row["what"]["architecture"] == name[0]]
        dense = _chosen(beside, "dense")
        for arm, label in ARMS.items():
            found = _chosen(here, arm)
            if found:
                gaps = [found[seed]["test"] - dense[seed]["test"] for seed in found.keys() & dense.keys()]
                columns = [[one[key] for one in found.values()] for key in ("dense", "cut", "test")]
                cells = [mean(column, digits=4) for column in (*columns, gaps)]
                rate = next(iter(found.values()))["rate"]
                lines.append(f"| {' '.join(name)} | {label} | {rate:g} | {len(found)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _chosen(rows: Sequence[Mapping[str, Any]], arm: str) -> dict[int, dict[str, Any]]:
    """What was found by seed, with the best rate."""
    return with_best_rate([row for row in rows if row["what"]["arm"] == arm], lambda found: found["validation"])


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw validation losses over further steps, seed 0.

    Args:
        rows: As for ``table``.
        path: The PNG file.

    Raises:
        PackageError: ``matplotlib`` is not installed.
    """
    names = list(dict.fromkeys((row["what"]["architecture"], row["what"]["interface"]) for row in rows))
    names = [name for name in names if name[1] != DENSE]
    drawn = figure(1.0 + 3.8 * len(names), 3.6)
    for place, name in enumerate(names):
        axes = drawn.add_subplot(1, len(names), place + 1, title=" ".join(name), xlabel="further steps")
        for number, (arm, label) in enumerate(ARMS.items()):
            wanted = (name[0], DENSE) if arm == "dense" else name
            here = [row for row in rows if (row["what"]["architecture"], row["what"]["interface"]) == wanted]
            found = _chosen(here, arm)
            if 0 in found:
                axes.plot(*zip(*found[0]["curve"], strict=True), color=f"C{number}", label=label if not place else None)
        axes.set_ylabel("validation, nats per byte" if place == 0 else "")
        axes.set_ylim(top=min(axes.get_ylim()[1], 3.2))
        axes.grid(alpha=0.3)
    drawn.legend(loc="outside lower center", ncols=2)
    drawn.savefig(path, dpi=130)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = parser_of(__doc__, home=HOME)
    made.add_argument("architectures", nargs="*", metavar="ARCHITECTURE", help="by default transformer")
    made.add_argument("--interfaces", nargs="+", default=["token", "chunked"], help="of transform")
    made.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="all by default")
    made.add_argument("--size", default="nano", help="default %(default)s")
    made.add_argument("--rates", type=float, nargs="+", default=[3e-3, 1e-2], help="grid of learning rates")
    made.add_argument("--bytes", type=int, default=4_000_000, metavar="N", help="bytes of text (%(default)s)")
    made.add_argument("--first-steps", type=int, default=800, metavar="N", help="of the dense model (%(default)s)")
    made.add_argument("--first-rate", type=float, default=1e-2, help="of the dense model (%(default)s)")
    add_sizes(made, argparse.Namespace(steps=800, distill=200, batch=8, judged=512, seeds=3), _SIZES)
    made.add_argument("--plot", action="store_true", help="draw figure.png")
    return made


def compare(options: argparse.Namespace, rows: Rows, say: Say) -> str:
    """Run all arms that are asked for; returns the table."""
    at_least_one(*(getattr(options, name) for name in _SIZES), options.first_steps, options.steps - options.distill)
    if options.plot:
        package("matplotlib", needed_for="the figure")
    text = corpus(library(most=options.bytes), ByteTokens())
    for architecture in options.architectures or ["transformer"]:
        _one(architecture, options, rows, text, say)
    if options.plot:
        draw(rows.asked(), options.out / "figure.png")
    return table(rows.asked())


def _one(architecture: str, options: argparse.Namespace, rows: Rows, text: Corpus, say: Say) -> None:
    """All runs of one architecture."""
    first = Settings(
        architecture=architecture,
        size=options.size,
        steps=options.first_steps,
        batch=options.batch,
        learning_rate=options.first_rate,
        evaluate_every=options.first_steps,
        evaluate_on=options.batch,
        backward="autograd",
    )
    trained = Trained(first, text)
    half = len(text.held_out) // 2
    parts = {"validation": text.held_out[:half], "test": text.held_out[half:]}
    judges = {name: Windows(part, length=first.positions) for name, part in parts.items()}
    again = dataclasses.replace(
        first, steps=options.steps, evaluate_every=max(options.steps // 8, 1), evaluate_on=options.judged
    )
    budget = {name: getattr(options, name) for name in ("size", "bytes", "first_steps", "first_rate", *_SIZES[:-1])}

    def validation(arm: str, interface: str, rate: float, seed: int) -> float:
        settings = dataclasses.replace(again, interface=interface, learning_rate=rate, seed=seed)
        what = {"architecture": architecture, "interface": interface, "arm": arm, "rate": rate, "seed": seed}
        measure = functools.partial(
            run, arm, settings, trained, steps=options.steps, distilled=options.distill, judges=judges
        )
        found = rows.measured({**what, **budget}, measure)
        told = f"{found['cut']:.4f} -> {found['test']:.4f}"
        say(f"{architecture} {interface}, {ARMS[arm]}, rate {rate:g}, seed {seed}: {told}")
        return found["validation"]

    for arm in options.arms:
        for interface in [DENSE] if arm == "dense" else options.interfaces:
            losses = [validation(arm, interface, rate, 0) for rate in options.rates]
            for seed in range(1, options.seeds):
                validation(arm, interface, options.rates[losses.index(min(losses))], seed)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns its exit code."""
    return command.study("warm_start", parser(), arguments, compare)


if __name__ == "__main__":
    torch.set_num_threads(1)  # the models are too small for more
    sys.exit(main())
