"""How the examples train: settings, the loop, and the judging of a model."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from models import Preset, build, preset
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from run_folder import CHECKPOINT, Log, State
from torch import Tensor, nn

import lbi_compile
from lbi_compile import SID, BoundedModule
from lbi_compile.diagnostics import jacobian_norms
from lbi_compile.errors import LBIError, OptionError

DENSE = "dense"
# alone: every region reads the canvas and nothing of the region before, and learns from the target only
CREDITS: dict[str, str | SID] = {
    "exact": "exact",
    "sid": "sid",
    "sid-add": SID(update="add"),
    "hbll": "hbll",
    "alone": SID(alpha=1.0, belief="none"),
}
_LINES = 20  # lines of progress where there is no terminal to draw a bar on


class DivergedError(LBIError):
    """The loss is no number any more."""


class Source(Protocol):
    """Where batches come from: what a position holds depends on the position alone."""

    def batch(self, position: int, size: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets, both `[B, T]`; targets are -100 where nothing is asked."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What decides the numbers of a run.

    Attributes:
        architecture: One of ``models.ARCHITECTURES``.
        size: One of ``models.PRESETS``.
        layers: Blocks; by default those of the size.
        length: Positions T; by default those of the size.
        interface: Of ``transform``, or ``dense``: train the model itself.
        credit: How regions are taught: ``exact``, or a local rule of ``CREDITS``; the training loss is then the sum of
            the regions' own losses.
        regions: Regions K; by default those of the size.
        r: Latent width R.
        readout: Of ``transform``, like ``cell``, ``finish``, ``backward``, ``forward``, ``tol`` and ``allow_leak``.
        steps: Optimizer steps of the whole run, over which the learning rate falls.
        batch: Sequences in a forward.
        accumulate: Forwards in a step.
        learning_rate: Highest rate of AdamW.
        warmup: Steps in which the rate rises.
        last_rate: What the rate falls to, as a part of the highest.
        weight_decay: Of matrices; vectors, biases and scales have none.
        clip: Largest norm of a gradient.
        bf16: Autocast to bfloat16.
        seed: Decides weights and the order of the data.
        evaluate_every: Steps between evaluations.
        evaluate_on: Held-out sequences of an evaluation.
    """

    architecture: str = "transformer"
    size: str = "tiny"
    layers: int | None = None
    length: int | None = None
    interface: str = "auto"
    credit: str = "exact"
    regions: int | None = None
    r: int = 16
    cell: str = "auto"
    finish: str = "auto"
    readout: str = "auto"
    backward: str = "auto"
    forward: str = "sequential"
    tol: float | None = None
    allow_leak: bool = False
    steps: int = 1000
    batch: int = 16
    accumulate: int = 1
    learning_rate: float = 3e-3
    warmup: int = 50
    last_rate: float = 0.1
    weight_decay: float = 0.1
    clip: float = 1.0
    bf16: bool = False
    seed: int = 0
    evaluate_every: int = 250
    evaluate_on: int = 256

    @property
    def preset(self) -> Preset:
        """The size."""
        return preset(self.architecture, self.size)

    @property
    def positions(self) -> int:
        """Positions T of a sequence."""
        return self.length or self.preset.length

    @property
    def cut(self) -> int:
        """Regions K."""
        return self.regions or self.preset.regions


@dataclass(frozen=True, slots=True)
class Result:
    """What a run came to.

    Attributes:
        step: Steps made.
        loss: Training loss of the last step, nats per token.
        held_out: Last evaluation, as in ``metrics.jsonl``.
        seconds: Time in training steps and evaluations, over all parts of the run.
        engine: What solved the adjoints; ``autograd`` for a dense model, empty where no step was left to make.
    """

    step: int
    loss: float
    held_out: dict[str, float]
    seconds: float
    engine: str


def make_model(settings: Settings, example: Tensor, *, vocabulary: int) -> nn.Module:
    """The model of a run: the architecture itself, or bounded.

    Args:
        settings: Of the run.
        example: Tokens, `[B, T]`.
        vocabulary: Number of tokens V.
    """
    size = preset(settings.architecture, settings.size)
    size = dataclasses.replace(size, layers=settings.layers or size.layers)
    torch.manual_seed(settings.seed)
    model = build(settings.architecture, size, vocabulary=vocabulary).to(example.device)
    if settings.interface == DENSE:
        if settings.credit != "exact":
            raise OptionError(
                f"credit={settings.credit!r} of a dense model", expected="a bounded one", do='leave interface "auto"'
            )
        return model
    return lbi_compile.transform(model, example, **transform_options(settings))


def transform_options(settings: Settings) -> dict[str, Any]:
    """Everything ``transform`` is told.

    Args:
        settings: Of the run.
    """
    names = ("r", "interface", "cell", "finish", "readout", "backward", "forward", "tol", "allow_leak", "seed")
    named = {name: getattr(settings, name) for name in names}
    return {"regions": settings.cut, "credit": CREDITS[settings.credit], **named}


def rate_at(step: int, settings: Settings) -> float:
    """Learning rate of step 0, 1, ...: a linear rise, then half a cosine.

    Args:
        step: Steps made before.
        settings: Of the run.

    Example:
        >>> rate_at(0, Settings(learning_rate=1.0, warmup=4))
        0.25
    """
    if step < settings.warmup:
        return settings.learning_rate * (step + 1) / settings.warmup
    part = (step - settings.warmup) / max(settings.steps - settings.warmup, 1)
    down = (1 + math.cos(math.pi * min(part, 1.0))) / 2
    return settings.learning_rate * (settings.last_rate + (1 - settings.last_rate) * down)


def make_optimizer(model: nn.Module, settings: Settings) -> torch.optim.AdamW:
    """AdamW that pulls matrices towards zero and nothing else.

    Args:
        model: What to train.
        settings: Of the run.
    """
    pulled, free = [], []
    for name, parameter in model.named_parameters():
        matrix = parameter.dim() > 1 and not name.endswith(("bias", "scale"))
        (pulled if matrix else free).append(parameter)
    groups = [{"params": pulled, "weight_decay": settings.weight_decay}, {"params": free, "weight_decay": 0.0}]
    # fused: with many small parameters the steps would cost as much as the gradients
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.95), fused=True)


def train(
    model: nn.Module,
    data: Source,
    held_out: Source,
    settings: Settings,
    *,
    folder: Path,
    resume: bool = False,
    lengths: Tensor | None = None,
    fingerprint: str = "",
    stop_after: int | None = None,
    checkpoint_every: int = 500,
    run: Callable[[Tensor], Tensor] | None = None,
    norms_every: int = 0,
    quiet: bool = False,
) -> Result:
    """Train, evaluate, and keep both in a folder.

    Args:
        model: Tokens `[B, T]` -> logits `[B, T, V]`.
        data: What to train on.
        held_out: What to judge by.
        settings: Of the run.
        folder: Where its files go.
        resume: Go on from the folder's checkpoint where it has one.
        lengths: Bytes each token stands for, `[V]`; without them losses are per token only.
        fingerprint: Of the data; a run goes on only with that it began with.
        stop_after: Make no more than this many steps of ``settings.steps`` now.
        checkpoint_every: Steps between checkpoints.
        run: What runs ``model``, where it is compiled.
        norms_every: Steps between records of the spectral norms of all interface Jacobians, on the first held-out
            sequences; 0 for none.
        quiet: Print nothing.

    Returns:
        How it went.

    Raises:
        OptionError: The folder holds a run and ``resume`` is false, or the checkpoint is of another run; or norms of a
            model without interface Jacobians are asked for.
        DivergedError: The loss is no number any more.
    """
    run = run or model
    teach = _teacher(model, run)
    device = next(model.parameters()).device
    optimizer = make_optimizer(model, settings)
    log = Log(folder)
    state = State(model, optimizer, {**dataclasses.asdict(settings), "data": fingerprint})
    if resume and (folder / CHECKPOINT).exists():
        state.load(folder / CHECKPOINT)
    elif log.path.exists() and not resume:
        raise OptionError(f"a run in {folder}", expected="a new folder", do="add --resume, or name another --out")
    log.keep(state.step)

    last = min(settings.steps, stop_after or settings.steps)
    loss, engine, began = math.nan, "", time.monotonic() - state.seconds
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    lengths = None if lengths is None else lengths.to(device)
    with _progress(settings.steps, quiet=quiet) as advance:
        while state.step < last:
            rate = rate_at(state.step, settings)
            for group in optimizer.param_groups:
                group["lr"] = rate
            loss = _accumulate(teach, data, settings, state.position, device)
            engine = engine or str(getattr(model, "engine", "autograd"))
            norm = nn.utils.clip_grad_norm_(parameters, settings.clip).item()
            if not math.isfinite(loss) or not math.isfinite(norm):
                raise DivergedError(
                    f"loss {loss} and gradient norm {norm} at step {state.step + 1}",
                    expected="finite numbers",
                    do="lower the learning rate, or lengthen the warmup",
                )
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            state.step += 1
            state.position += settings.batch * settings.accumulate
            log.write(step=state.step, loss=loss, rate=rate, norm=norm, **_solve_of(model, settings))
            if state.step % settings.evaluate_every == 0 or state.step == settings.steps:
                state.held_out = evaluate(model, held_out, settings, run=run, lengths=lengths)
                log.write(step=state.step, **state.held_out)
            if norms_every and state.step % norms_every == 0:
                log.write(step=state.step, jacobians=_norms(model, held_out.batch(0, 2)[0].to(device)))
            state.seconds = time.monotonic() - began
            if state.step % checkpoint_every == 0 or state.step == last:
                state.save(folder / CHECKPOINT)
            advance(state.step, loss, state.held_out)
    return Result(state.step, loss, state.held_out, state.seconds, engine)


def _norms(model: nn.Module, inputs: Tensor) -> dict[str, dict[str, Any]]:
    """Spectral norms of the interface Jacobians and of their running products, by kind of latent."""
    if not isinstance(model, BoundedModule) or model.credit is not None or model.boundaries < 2:
        raise OptionError(
            "norms of interface Jacobians of a model that has none",
            expected="a bounded model with exact credit, through which at least two latents pass",
            do="leave them out, or take another interface or more regions",
        )
    return {
        one.latent: {"first": one.first, "norms": one.norms, "products": one.products}
        for one in jacobian_norms(model, inputs)
    }


def _teacher(model: nn.Module, run: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """What gives the loss of inputs and targets, a sum over all that is asked."""

    def end_to_end(inputs: Tensor, targets: Tensor) -> Tensor:
        return _losses(run(inputs), targets).sum()

    def local(inputs: Tensor, targets: Tensor) -> Tensor:
        return bounded.local_loss(inputs, target=targets) * (targets >= 0).sum()

    bounded: Any = model
    if not isinstance(model, BoundedModule) or model.credit is None:
        return end_to_end
    if run is not model:
        raise OptionError(
            "a compiled model under a local rule",
            expected="the model itself, taught region by region",
            do="compile none",
        )
    return local


def _solve_of(model: nn.Module, settings: Settings) -> dict[str, Any]:
    """What a step's record says of the last forward, where latents were solved for."""
    if not isinstance(model, BoundedModule) or settings.forward == "sequential":
        return {}
    solve = model.solve
    told = {"iterations": solve.iterations, "residual": solve.residual}
    return told if solve.fallback is None else {**told, "fallback": solve.fallback}


def _accumulate(
    teach: Callable[[Tensor, Tensor], Tensor], data: Source, settings: Settings, position: int, device: torch.device
) -> float:
    """Gradients of the mean loss over all that is asked in a step, whatever part of it a forward holds."""
    parts = [data.batch(position + i * settings.batch, settings.batch) for i in range(settings.accumulate)]
    asked = sum(int((targets >= 0).sum()) for _, targets in parts)
    total = torch.zeros((), device=device)
    for inputs, targets in parts:
        with torch.autocast(device.type, torch.bfloat16, enabled=settings.bf16):
            loss = teach(inputs.to(device), targets.to(device)) / asked
        loss.backward()
        total += loss.detach()
    return total.item()


def _losses(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")


@torch.no_grad()
def evaluate(
    model: nn.Module,
    source: Source,
    settings: Settings,
    *,
    run: Callable[[Tensor], Tensor] | None = None,
    lengths: Tensor | None = None,
) -> dict[str, float]:
    """Judge a model by the first sequences of ``source``.

    Args:
        model: Tokens `[B, T]` -> logits `[B, T, V]`. It is judged in the mode it is in: the models here have no dropout
            and no batch statistics, and a bounded model would be captured once more for the other mode.
        source: Sequences it was not trained on.
        settings: Of the run.
        run: What runs ``model``, where it is compiled.
        lengths: Bytes each token stands for, `[V]`.

    Returns:
        ``held_out``, nats per token; ``accuracy``; with ``lengths`` also ``bits_per_byte``, over the bytes of the
        targets, and ``nats_per_byte``.
    """
    run = run or model
    device = next(model.parameters()).device
    nats = right = asked = size = 0.0
    count = min(settings.evaluate_on, getattr(source, "epoch", settings.evaluate_on))
    for position in range(0, count, settings.batch):
        inputs, targets = (part.to(device) for part in source.batch(position, settings.batch))
        with torch.autocast(device.type, torch.bfloat16, enabled=settings.bf16):
            logits = run(inputs)
        # the last batch is as large as the others: its surplus is not counted
        row = torch.arange(len(targets), device=device)[:, None]
        counted = (targets >= 0) & (row < count - position)
        nats += _losses(logits, targets)[counted.flatten()].double().sum().item()
        right += (logits.argmax(-1) == targets)[counted].sum().item()
        asked += counted.sum().item()
        if lengths is not None:
            size += lengths[targets[counted]].sum().item()
    found = {"held_out": nats / asked, "accuracy": right / asked}
    if lengths is not None:
        found |= {"nats_per_byte": nats / size, "bits_per_byte": nats / size / math.log(2)}
    return found


@contextmanager
def _progress(steps: int, *, quiet: bool) -> Iterator[Callable[[int, float, dict[str, float]], None]]:
    """A function of (steps done, loss, last evaluation) that draws a bar, or prints lines where no terminal is."""
    console = Console(highlight=False, quiet=quiet)

    def figure(held_out: dict[str, float]) -> str:
        return f"{held_out['held_out']:.3f}" if held_out else "-"

    if not console.is_terminal:

        def line(step: int, loss: float, held_out: dict[str, float]) -> None:
            if step % max(steps // _LINES, 1) == 0 or step == steps:
                console.print(f"step {step:>6}/{steps}  loss {loss:.3f}  held out {figure(held_out)}", soft_wrap=True)

        yield line
        return
    columns = (
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]}  held out {task.fields[held_out]}"),
        TimeRemainingColumn(compact=True),
    )
    with Progress(*columns, console=console, expand=True) as progress:
        task = progress.add_task("", total=steps, loss="-", held_out="-")
        yield lambda step, loss, held_out: progress.update(
            task, completed=step, loss=f"{loss:.3f}", held_out=figure(held_out)
        )
