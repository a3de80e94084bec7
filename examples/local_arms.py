"""Ways of teaching one trunk, side by side: what each is, what it may choose from, and one run of it.

An arm is trained by plain backpropagation, or by a local rule of ``transform``. Everything else (trunk, data, batches,
steps, falling learning rate) is the same for all.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from choosing import Choice
from cifar import CifarPictures
from digits import Split, TurnedDigits
from models.residual import ResidualMLP
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from training import DivergedError

import lbi_compile
from lbi_compile import HBLL, SID, BoundedModule

_ADAM: Choice = ("learning_rate", (1e-2, 3e-3, 2e-2))
# one value for both: a rate belongs to its optimizer
_EITHER: Choice = (
    "step",
    (("adam", 1e-3), ("adam", 3e-3), ("adam", 1e-2), ("adam", 2e-2), ("sgd", 0.01), ("sgd", 0.03), ("sgd", 0.1)),
)


@dataclass(frozen=True, slots=True)
class Arm:
    """One way of teaching.

    Attributes:
        label: Its name in tables.
        rule: ``"backprop"``, ``"sid"`` or ``"hbll"``.
        fixed: Settings that are given: ``depth`` of the trunk, or options of the rule.
        choices: Settings that are chosen on the validation split, one after another, each with its candidates; the
            first candidate holds until then.
        noisy: Judged with wrong classes too.
    """

    label: str
    rule: str = "backprop"
    fixed: Mapping[str, Any] = field(default_factory=dict)
    choices: tuple[Choice, ...] = (_EITHER,)
    noisy: bool = True


ARMS = {
    "bp": Arm("backprop, 8 blocks"),
    "smooth": Arm("backprop, label smoothing", choices=(_EITHER, ("smoothing", (0.1, 0.3, 0.5)))),
    "bp0": Arm("backprop, 0 blocks", fixed={"depth": 0}, noisy=False),
    "bp1": Arm("backprop, 1 block", fixed={"depth": 1}, noisy=False),
    "alone": Arm("regions alone, no latent", "sid", {"belief": "none", "alpha": 1.0}, (_ADAM,), noisy=False),
    "blind": Arm("SID, belief multiplied, not read", "sid", {"update": "add", "belief": "none"}, (_ADAM,), noisy=False),
    "sid": Arm("SID", "sid", {}, (_ADAM, ("update", ("add", "replace")), ("alpha", (0.5, 0.25, 1.0)))),
    # given, not chosen: what hops read and how latents are read tells the paths apart, not the full path
    "hbll": Arm(
        "HBLL",
        "hbll",
        {"hops": "canvas", "readout": "shared", "sweeps": 3, "r": 32, "match": 0.3},
        (("learning_rate", (1e-2, 3e-3)),),
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """What all arms share.

    Attributes:
        width: Width of the trunk D.
        depth: Its blocks, one a region.
        steps: Optimizer steps.
        batch: Pictures in a step B.
        copies: Variants of each picture to train on.
    """

    width: int = 64
    depth: int = 8
    steps: int = 1500
    batch: int = 128
    copies: int = 40


class Task(Protocol):
    """What is learned: pictures as features F of C classes; see ``TurnedDigits`` and ``CifarPictures``."""

    @property
    def features(self) -> int: ...
    @property
    def classes(self) -> int: ...
    def split(self, name: str) -> Split: ...


def run(
    arm: Arm,
    chosen: Mapping[str, Any],
    budget: Budget,
    *,
    seed: int,
    wrong: float,
    judge: str,
    folder: Path | None = None,
) -> dict[str, Any]:
    """Train an arm once and judge it.

    Args:
        arm: The arm.
        chosen: A value for each of its choices.
        budget: What all share.
        seed: Of weights, order of batches and wrong classes.
        wrong: Share of the training pictures with a wrong class.
        judge: Split to judge by.
        folder: Of CIFAR, in place of the digits.

    Returns:
        ``accuracy`` in percent, and for HBLL ``paths`` (accuracy by hops), ``flops`` (by hops, of one picture) and
        ``probe`` (accuracy of a linear classifier on the canvas); for SID ``regions`` (accuracy by region).

    Raises:
        DivergedError: The loss is no number any more.
    """
    task: Task = TurnedDigits(copies=budget.copies, wrong=wrong, seed=seed)
    if folder is not None:
        task = CifarPictures(folder=folder, wrong=wrong, seed=seed)
    data, held_out = task.split("train"), task.split(judge)
    settings = {**arm.fixed, **chosen}
    optimizer, rate = settings.pop("step", None) or ("adam", settings.pop("learning_rate"))
    torch.manual_seed(seed)
    depth = settings.pop("depth", budget.depth)
    model: Any = ResidualMLP(task.features, width=budget.width, depth=depth, classes=task.classes)
    smoothing = settings.pop("smoothing", 0.0)
    if arm.rule != "backprop":
        r, make = settings.pop("r", 16), {"sid": SID, "hbll": HBLL}[arm.rule]
        model = lbi_compile.transform(model, data.x[:4], regions=budget.depth, r=r, credit=make(**settings), seed=seed)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        if isinstance(model, BoundedModule):
            return model.local_loss(x, target=y)
        return F.cross_entropy(model(x), y, label_smoothing=smoothing)

    fit(model, loss, data, optimizer=optimizer, rate=rate, steps=budget.steps, batch=budget.batch, seed=seed)
    with torch.no_grad():
        return judged(model, data, held_out)


def candidate(measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What a run found, or that it diverged: that ends a run, but not the choice it is part of.

    Args:
        measure: Makes the run.
    """
    try:
        return measure()
    except DivergedError as error:
        return {"accuracy": 0.0, "diverged": error.found}


def fit(
    model: nn.Module, loss: Any, data: Split, *, optimizer: str, rate: float, steps: int, batch: int, seed: int
) -> None:
    """Train by Adam, or by SGD with momentum 0.9, with a learning rate that falls to zero along a cosine.

    Args:
        model: Whose parameters learn.
        loss: Of pictures and classes.
        data: What to draw batches from.
        optimizer: ``"adam"`` or ``"sgd"``.
        rate: Highest learning rate.
        steps: Optimizer steps.
        batch: Samples in a step B.
        seed: Of the order of batches.

    Raises:
        DivergedError: The loss is no number any more.
    """
    own = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # fused: many small parameters, whose steps would cost more than the gradients
    kind: Any = torch.optim.Adam if optimizer == "adam" else functools.partial(torch.optim.SGD, momentum=0.9)
    made = kind(own, rate, fused=True)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(made, steps)
    order = torch.Generator().manual_seed(seed)
    value = torch.zeros(())
    for _ in range(steps):
        drawn = torch.randint(len(data.y), (batch,), generator=order)
        value = loss(data.x[drawn], data.y[drawn])
        made.zero_grad()
        value.backward()
        made.step()
        falling.step()
    if not value.isfinite():
        raise DivergedError(
            f"{optimizer} at {rate} diverged", expected="a loss that stays a number", do="lower the rate"
        )


def judged(model: nn.Module, data: Split, held_out: Split) -> dict[str, Any]:
    """What ``run`` gives of a trained model."""
    found: dict[str, Any] = {"accuracy": accuracy(model(held_out.x), held_out.y)}
    if not isinstance(model, BoundedModule):
        return found
    if model.plan.credit == "sid":
        _, taps = model.forward_regions(held_out.x)
        found["regions"] = [accuracy(belief, held_out.y) for belief in taps.m if belief is not None] + [
            found["accuracy"]
        ]
    else:
        hops = [1, 2, 4, 8] if len(model.regions) == 8 else sorted({1, len(model.regions)})
        found["paths"] = {str(n): accuracy(model.forward_path(held_out.x, hops=n), held_out.y) for n in hops}
        found["flops"] = {str(n): _flops(model, held_out.x[:1], n) for n in hops}
        stem: Any = model.source.stem
        found["probe"] = probed(stem(data.x), data.y, stem(held_out.x), held_out.y)
    return found


def accuracy(logits: Tensor, y: Tensor) -> float:
    """Percent of rows of `[N, C]` whose largest logit is that of their class."""
    return round(float((logits.argmax(-1) == y).double().mean()) * 100, 2)


def _flops(model: BoundedModule, x: Tensor, hops: int) -> int:
    with FlopCounterMode(display=False) as counter:
        model.forward_path(x, hops=hops)
    return counter.get_total_flops()


def probed(x: Tensor, y: Tensor, held_out: Tensor, expected: Tensor) -> float:
    """Accuracy of a linear classifier that is fitted to features `[N, D]` to the end."""
    line = nn.Linear(x.shape[1], int(y.max()) + 1)
    search = torch.optim.LBFGS(line.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        search.zero_grad()
        loss = F.cross_entropy(line(x), y)
        loss.backward()
        return loss

    with torch.enable_grad():
        search.step(closure)  # pyright: ignore[reportArgumentType]
    return accuracy(line(held_out), expected)
