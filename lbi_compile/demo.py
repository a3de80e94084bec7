"""``lbi-compile demo``: cut a causal transformer into regions, verify it, train it on Python's standard library."""

from __future__ import annotations

import math
import sysconfig
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from rich.console import Console, Group
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text
from torch import Tensor

from .bounded import BoundedModule
from .demo_model import CausalTransformer
from .errors import CorpusError
from .quantities import count
from .render.report import ReportView
from .render.text import facts, show
from .render.tree import PlanView
from .report import Report

LENGTH = 128
_MOST_BYTES = 4_000_000
_HELD_OUT_WINDOWS, _HELD_OUT_BATCH = 256, 64
_LINES = 10  # lines of progress where there is no terminal to draw a bar on


class Corpus(NamedTuple):
    """Bytes to train on and bytes to judge by, from different files; ``uint8`` vectors."""

    train: Tensor
    held_out: Tensor
    files: int


@dataclass(frozen=True, slots=True)
class Training:
    """How the demo trains.

    Attributes:
        steps: Optimizer steps to make.
        seconds: No step starts later than this many seconds after the demo did.
        batch: Windows in a step.
        learning_rate: Highest rate of AdamW; it warms up and falls to zero over ``steps``.
        seed: Decides weights and batches: equal seeds give equal runs unless ``seconds`` cuts one short.
    """

    steps: int = 700
    seconds: float = 150.0
    batch: int = 16
    learning_rate: float = 6e-3
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Trained:
    """How training went.

    Attributes:
        steps: Optimizer steps made.
        tokens_per_second: After the first step, which compiles.
        engine: What solved the adjoints, and why.
    """

    steps: int
    tokens_per_second: float
    engine: str


@dataclass(frozen=True, slots=True)
class Result:
    """What a run of the demo came to; losses are on the held-out bytes, in nats per byte.

    Attributes:
        plan: Hash of the plan.
        report: What ``verify`` found before training.
        trained: How training went; ``None`` where ``report`` is not ``ok``, for then nothing is trained.
        before: Loss of the bounded model before training.
        frequencies: Loss of a table of byte frequencies.
        after: Loss of the bounded model after training.
        seconds: From start to end, compilation and verification included.
    """

    plan: str
    report: Report
    trained: Trained | None
    before: float
    frequencies: float
    after: float
    seconds: float

    @property
    def ok(self) -> bool:
        """The gradients are right, and training took the model below what byte frequencies alone give."""
        return self.report.ok and self.after < self.frequencies


def corpus(folder: Path | None = None, *, most: int = _MOST_BYTES) -> Corpus:
    """Read the top-level modules of the standard library; every tenth file is held out.

    Args:
        folder: Where the ``*.py`` files are; by default the running Python's own library.
        most: Bytes to read at most.

    Raises:
        CorpusError: The files do not fill one window of each part.
    """
    folder = folder or Path(sysconfig.get_paths()["stdlib"])
    train, held_out, files = bytearray(), bytearray(), 0
    for path in sorted(folder.glob("*.py")):
        if len(train) + len(held_out) >= most:
            break
        files += 1
        (held_out if files % 10 == 0 else train).extend(path.read_bytes())
    if min(len(train), len(held_out)) <= LENGTH:
        raise CorpusError(
            f"{files} Python files with {len(train) + len(held_out)} bytes in {folder}",
            expected="a standard library that lies there as source files",
            do="run the demo with a Python installation that is not packed into a zip file",
        )
    return Corpus(torch.frombuffer(train, dtype=torch.uint8), torch.frombuffer(held_out, dtype=torch.uint8), files)


def windows(data: Tensor, starts: Tensor, *, length: int = LENGTH) -> tuple[Tensor, Tensor]:
    """Cut inputs and next-byte targets, both `[B, T]`.

    Args:
        data: Bytes.
        starts: First position of each window, `[B]`.
        length: Positions T.
    """
    index = starts[:, None] + torch.arange(length + 1)
    cut = data[index].long()
    return cut[:, :-1], cut[:, 1:]


@contextmanager
def _one_thread() -> Iterator[None]:
    """Layers this narrow gain little from more threads, which on a busy machine wait for each other at every op."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@_one_thread()
def run(training: Training, *, quiet: bool = False, **options: Any) -> Result:
    """Run the demo.

    Args:
        training: How to train.
        quiet: Print nothing.
        options: Passed on to ``transform``.

    Returns:
        The figures it prints at the end.
    """
    from . import transform, verify

    start = time.monotonic()
    say: Callable[[Any], None] = (lambda _: None) if quiet else show
    torch.manual_seed(training.seed)
    draw = torch.Generator().manual_seed(training.seed)
    data = corpus()
    read, kept = count(len(data.train)), count(len(data.held_out))
    say(f"{data.files} files of Python's standard library: {read} bytes to train on, {kept} held out\n")

    example, _ = _batch(data.train, 2, draw)
    bounded = transform(CausalTransformer(length=LENGTH), example, seed=training.seed, **options)
    say(PlanView(bounded.plan))
    say("\nverifying ...")
    report = verify(bounded, example)
    say(ReportView(report))

    before, frequencies = _held_out_loss(bounded, data.held_out), _frequency_loss(data)
    trained, after = None, before
    if report.ok:
        say(f"\ntraining {training.steps} steps of {training.batch} x {LENGTH} bytes; the first one compiles")
        trained = _train(bounded, data.train, training, draw, deadline=start + training.seconds, quiet=quiet)
        if trained.steps < training.steps:
            say(f"stopped after {trained.steps} of {training.steps} steps: {training.seconds:.0f} seconds are used up")
        after = _held_out_loss(bounded, data.held_out)
    result = Result(bounded.plan.hash, report, trained, before, frequencies, after, time.monotonic() - start)
    say(_summary(result))
    return result


def _train(
    bounded: BoundedModule, data: Tensor, training: Training, draw: torch.Generator, *, deadline: float, quiet: bool
) -> Trained:
    optimizer = torch.optim.AdamW(bounded.parameters(), lr=training.learning_rate, weight_decay=0.01)
    rate = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, training.learning_rate, total_steps=training.steps, pct_start=0.1, cycle_momentum=False
    )
    done, speed, compiled = 0, 0.0, time.monotonic()
    with _progress(training.steps, quiet=quiet) as advance:
        while done < training.steps and (done == 0 or time.monotonic() < deadline):
            tokens, targets = _batch(data, training.batch, draw)
            loss = F.cross_entropy(bounded(tokens).flatten(0, 1), targets.flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rate.step()
            if done == 0:
                compiled = time.monotonic()
            else:
                speed = done * tokens.numel() / (time.monotonic() - compiled)
            done += 1
            advance(done, loss.item(), speed)
    return Trained(done, speed, str(bounded.engine))


@contextmanager
def _progress(steps: int, *, quiet: bool) -> Iterator[Callable[[int, float, float], None]]:
    """A function of (steps done, loss, tokens per second) that draws a bar, or prints lines where no terminal is."""
    console = Console(highlight=False, quiet=quiet)
    if not console.is_terminal:

        def line(done: int, loss: float, speed: float) -> None:
            if done % max(steps // _LINES, 1) == 0 or done == steps:
                console.print(f"step {done:>6}/{steps}  loss {loss:.3f}  {count(speed)} tokens/s")

        yield line
        return
    columns = (
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]}"),
        TextColumn("{task.fields[speed]} tokens/s"),
        TextColumn("ETA"),
        TimeRemainingColumn(compact=True),
    )
    with Progress(*columns, console=console, expand=True) as progress:
        task = progress.add_task("", total=steps, loss="-", speed="-")
        yield lambda done, loss, speed: progress.update(task, completed=done, loss=f"{loss:.3f}", speed=count(speed))


def _batch(data: Tensor, batch: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    return windows(data, torch.randint(len(data) - LENGTH, (batch,), generator=draw))


@torch.no_grad()
def _held_out_loss(bounded: BoundedModule, data: Tensor) -> float:
    """Mean loss over windows spread evenly over ``data``, nats per byte."""
    was_training = bounded.training
    bounded.eval()
    starts = torch.linspace(0, len(data) - LENGTH - 1, _HELD_OUT_WINDOWS).long()
    total = 0.0
    for part in starts.split(_HELD_OUT_BATCH):
        tokens, targets = windows(data, part)
        total += F.cross_entropy(bounded(tokens).flatten(0, 1), targets.flatten()).item() * len(part)
    bounded.train(was_training)
    return total / len(starts)


def _frequency_loss(data: Corpus) -> float:
    """Loss of predicting every held-out byte by its frequency in the training bytes (plus one), nats per byte."""
    frequency = data.train.bincount(minlength=256) + 1
    return F.nll_loss((frequency / frequency.sum()).log().expand(len(data.held_out), 256), data.held_out.long()).item()


def _summary(result: Result) -> Group:
    def loss(nats: float) -> str:
        return f"{nats:.3f} nats per byte = {nats / math.log(2):.3f} bits per byte"

    rows = [
        ("byte frequencies", loss(result.frequencies)),
        ("before training", loss(result.before)),
        ("after training", loss(result.after)),
        ("time", f"{result.seconds:.0f} s in all"),
    ]
    if result.trained:
        rows += [("engine", result.trained.engine), ("speed", f"{count(result.trained.tokens_per_second)} tokens/s")]
    return Group(Text("\nbounded model on held-out bytes", style="bold"), facts(rows))
