"""Train with a parallel forward beside the sequential one: ``python examples/parallel_forward.py``.

A parallel forward solves for all latents at once. Two tasks: scikit-learn's digits, turned and with noise, by a
residual MLP with one latent a sample, and bytes of the standard library by a narrow transformer with latents of chunks;
one block a region. Every seed is trained with both forwards on the same batches from the same weights. What is told is
how many iterations the forward takes once training is under way, and how far the two losses come apart, beside how far
they lie apart between seeds. Rows go to ``rows.jsonl`` as they are made; a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import itertools
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from command import Say, add_sizes, at_least_one, parser_of, study
from data import ByteTokens, Windows, corpus, library
from digits import CLASSES, Split, TurnedDigits
from models import build, preset
from models.residual import ResidualMLP
from result_rows import Rows
from torch import Tensor, nn

import lbi_compile
from lbi_compile.errors import OptionError
from lbi_compile.forward_check import solved_to

HOME = Path(__file__).parent / "results" / "parallel_forward"
FORWARDS = ("sequential", "parallel")
_TEXT = 1_000_000  # bytes
_EXACT = 1e-10  # residual at which both forwards are compared
_NORMS = 10  # steps from one product of Jacobians to the next


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What decides the numbers of a run.

    Attributes:
        task: ``"digits"`` or ``"bytes"``.
        regions: Regions K, of one block each.
        forward: Of ``transform``.
        steps: Optimizer steps.
        warmup: Steps whose iterations are not counted.
        seed: Of weights and batches.
        width: Width D.
        r: Latent width R.
        batch: Samples in a step B.
        length: Positions T of a sample of ``"bytes"``.
        tol: Residual at which an iteration ends.
        learning_rate: Of Adam.
    """

    task: str
    regions: int
    forward: str
    steps: int
    warmup: int
    seed: int = 0
    width: int = 32
    r: int = 16
    batch: int = 32
    length: int = 32
    tol: float = 1e-4
    learning_rate: float = 3e-3


def prepared(setting: Setting) -> tuple[nn.Module, Callable[[int], tuple[Tensor, Tensor]]]:
    """The model of a run, and what gives the inputs and classes of a step."""
    if setting.task == "digits":
        task = TurnedDigits(copies=10)
        data = task.split("train")
        model: nn.Module = ResidualMLP(task.features, width=setting.width, depth=setting.regions, classes=CLASSES)
        return model, functools.partial(_drawn, data, setting)
    size = dataclasses.replace(preset("transformer"), layers=setting.regions, width=setting.width)
    tokens = corpus(library(most=_TEXT), ByteTokens())
    windows = Windows(tokens.train, length=setting.length, seed=setting.seed)
    model = build("transformer", size, vocabulary=tokens.vocabulary)
    return model, lambda step: windows.batch(step * setting.batch, setting.batch)


def _drawn(data: Split, setting: Setting, step: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(setting.seed * 1_000_003 + step)
    chosen = torch.randint(len(data.y), (setting.batch,), generator=draw)
    return data.x[chosen], data.y[chosen]


def run(setting: Setting) -> dict[str, Any]:
    """Train once.

    Returns:
        ``losses`` of all steps; for a parallel forward ``iterations`` of all steps, ``fallbacks``, and the largest
        ``residual`` and ``product_norm`` (of every tenth step); and the
        ``exactness`` of the trained model.
    """
    torch.manual_seed(setting.seed)
    model, batch = prepared(setting)
    bounded = lbi_compile.transform(
        model,
        batch(0)[0],
        regions=setting.regions,
        r=setting.r,
        interface="pooled" if setting.task == "digits" else "chunked",
        forward=setting.forward,
        tol=setting.tol if setting.forward == "parallel" else None,
        backward="autograd",  # the engines' gradients are equal, and this one needs no compilation
        seed=setting.seed,
    )
    optimizer = torch.optim.Adam(bounded.parameters(), setting.learning_rate, fused=True)
    losses: list[float] = []
    solves = []
    for step in range(setting.steps):
        inputs, targets = batch(step)
        loss = F.cross_entropy(bounded(inputs).flatten(0, -2), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(round(loss.item(), 5))
        solve = bounded.solve
        norm = solve.product_norm if step % _NORMS == 0 else 1.0
        solves.append((solve.iterations, solve.residual, solve.fallback, norm))
    found: dict[str, Any] = {"losses": losses}
    if setting.forward == "parallel":
        iterations, residuals, fallbacks, norms = zip(*solves, strict=True)
        found |= {
            "iterations": list(iterations),
            "fallbacks": sum(fallback is not None for fallback in fallbacks),
            "residual": max(residuals),
            "product_norm": max(norms),
        }
        found["exactness"] = exactness(bounded, *batch(0))
    return found


def exactness(bounded: lbi_compile.BoundedModule, inputs: Tensor, targets: Tensor) -> dict[str, float]:
    """Compare both forwards in float64, solved to a residual of 1e-10.

    Returns:
        ``error``, the largest relative one of the output and of a parameter's gradient, what is ``allowed`` (ten times
        the residual times the largest norm of a running product of Jacobians), and ``iterations``.
    """
    twin = copy.deepcopy(bounded).double()
    inputs = inputs.double() if inputs.is_floating_point() else inputs

    def gradients(forward: str) -> list[Tensor]:
        with solved_to(twin, _EXACT), twin.with_forward(forward):
            out = twin(inputs)
            loss = F.cross_entropy(out.flatten(0, -2), targets.flatten())
            given = torch.autograd.grad(loss, list(twin.parameters()), allow_unused=True)
        return [out.detach(), *(gradient for gradient in given if gradient is not None)]

    expected, found = gradients("sequential"), gradients("parallel")
    size = torch.stack([value.norm() for value in expected[1:]]).norm()  # a gradient may be zero by itself
    errors = [(a - b).norm() / (b.norm() + 1e-6 * size) for a, b in zip(found, expected, strict=True)]
    solve = twin.solve
    allowed = 10 * _EXACT * solve.product_norm if solve.fallback is None else 0.0
    return {"error": float(max(errors)), "allowed": allowed, "iterations": solve.iterations}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """What was found, by task and number of regions, as markdown."""
    lines = [
        "| task | K | steps | seeds | iterations: median (most) | fallbacks | loss, sequential | loss, parallel"
        " | apart, same seed | apart, other seeds | trained: error |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    named = {tuple(row["what"][name] for name in ("task", "regions", "forward", "seed")): row for row in rows}
    for task, regions in dict.fromkeys(key[:2] for key in named):
        seeds = sorted({key[3] for key in named if key[:2] == (task, regions)})
        seeds = [seed for seed in seeds if all((task, regions, forward, seed) in named for forward in FORWARDS)]
        if not seeds:
            continue
        one, other = ([named[task, regions, forward, seed] for seed in seeds] for forward in FORWARDS)
        warmup = one[0]["what"]["warmup"]
        counts = [count for row in other for count in row["found"]["iterations"][warmup:]]
        curves = [[_means(row["found"]["losses"]) for row in arm] for arm in (one, other)]
        same = max(_apart(a, b) for a, b in zip(*curves, strict=True))
        between = [_apart(a, b) for a, b in itertools.combinations(curves[0], 2)]
        cells = [
            task,
            regions,
            one[0]["what"]["steps"],
            len(seeds),
            f"{statistics.median(counts):g} ({max(counts)})",
            sum(row["found"]["fallbacks"] for row in other),
            *(f"{statistics.mean(curve[-1] for curve in arm):.3f}" for arm in curves),
            f"{same:.1e}",
            f"{min(between):.1e}" if between else "",
            f"{max(row['found']['exactness']['error'] for row in other):.0e}"
            f" of {min(row['found']['exactness']['allowed'] for row in other):.0e}",
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def _means(losses: Sequence[float]) -> list[float]:
    """Means of ten steps each."""
    return [statistics.mean(losses[at : at + 10]) for at in range(0, len(losses), 10)]


def _apart(a: Sequence[float], b: Sequence[float]) -> float:
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = parser_of(__doc__, home=HOME)
    made.add_argument("--tasks", nargs="+", choices=("digits", "bytes"), default=["digits", "bytes"])
    made.add_argument("--regions", type=int, nargs="+", default=[16, 64], metavar="K", help="default 16 and 64")
    made.add_argument("--seeds", type=int, default=2, metavar="N", help="runs of each (%(default)s)")
    made.add_argument("--warmup", type=int, default=30, metavar="N", help="steps not counted (%(default)s)")
    made.add_argument("--tol", type=float, default=1e-4, metavar="X", help="residual (%(default)s)")
    add_sizes(made, argparse.Namespace(steps=80, width=32, r=16, batch=32), ("steps", "width", "r", "batch"))
    return made


def body(options: argparse.Namespace, rows: Rows, say: Say) -> str:
    """Make the runs that the options describe; gives the table of all runs of these sizes."""
    at_least_one(options.seeds, options.steps, options.width, options.r, *options.regions, options.batch // 8)
    if not 0 <= options.warmup < options.steps:
        raise OptionError(f"warmup {options.warmup}", expected="fewer than --steps", do="pass a smaller number")
    shared = {name: getattr(options, name) for name in ("steps", "warmup", "width", "r", "tol")}
    # a sample of text is a sequence, with a loss at every position
    batches = {"digits": options.batch, "bytes": options.batch // 8}
    for task, regions, seed, forward in itertools.product(
        options.tasks, options.regions, range(options.seeds), FORWARDS
    ):
        setting = Setting(task=task, regions=regions, forward=forward, seed=seed, batch=batches[task], **shared)
        found = rows.measured(dataclasses.asdict(setting), functools.partial(run, setting))
        told = f", iterations {found['iterations'][-1]}" if "iterations" in found else ""
        say(f"{task}, K={regions}, seed {seed}, {forward}: loss {found['losses'][-1]:.3f}{told}")
    wanted = [{**shared, "task": task, "batch": batch} for task, batch in batches.items()]
    return table([row for row in rows.all() if any(one.items() <= row["what"].items() for one in wanted)])


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns its exit code."""
    return study("parallel_forward", parser(), arguments, body)


if __name__ == "__main__":
    torch.set_num_threads(1)  # the nets are too small for more
    sys.exit(main())
