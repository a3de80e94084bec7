"""Arms of the studies of model quality: dense models, bounded ones, and controls; and one run of an arm."""

from __future__ import annotations

import dataclasses
import functools
import math
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from result_rows import Rows
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from training import DENSE, DivergedError, Settings, Source, evaluate, make_model, train

from lbi_compile import BoundedModule
from lbi_compile.errors import LBIError
from lbi_compile.interfaces import build_interface


@dataclass(frozen=True, slots=True)
class Arm:
    """One model of a comparison.

    Attributes:
        label: Its name in tables.
        options: Of ``Settings``.
        shallow: A dense model with the layers of one region.
    """

    label: str
    options: Mapping[str, Any] = field(default_factory=dict)
    shallow: bool = False


ARMS = {
    "dense": Arm("dense", {"interface": DENSE}),
    "shallow": Arm("shallow: layers of one region, dense", {"interface": DENSE}, shallow=True),
    "zero": Arm("zero: nothing crosses", {"interface": "zero"}),
    "self": Arm("self: own words only", {"interface": "self"}),
    "paper": Arm(
        "pooled, leaks, last readout (the paper)", {"interface": "pooled", "readout": "last", "allow_leak": True}
    ),
    "chunked": Arm("chunked", {"interface": "chunked", "readout": "sum"}),
    "token-gru": Arm("token, GRU cell", {"interface": "token", "cell": "gru"}),
    "token": Arm("token, linear cell (default)", {"interface": "token", "cell": "linear"}),
    "token-own": Arm("token, linear cell, own finish", {"interface": "token", "cell": "linear", "finish": "own"}),
    "both": Arm("token+chunked, linear cell", {"interface": "token+chunked", "cell": "linear"}),
}


def settings_of(arm: Arm, common: Settings) -> Settings:
    """The settings of an arm: those that all share, and its own.

    Args:
        arm: The arm.
        common: What all arms share. Gradients are plain autograd's: every engine gives the same, and at these sizes
            none is faster.
    """
    settings = dataclasses.replace(common, backward="autograd", **arm.options)
    if not arm.shallow:
        return settings
    layers = settings.layers or settings.preset.layers
    return dataclasses.replace(settings, layers=max(layers // settings.cut, 1))


class Drawn:
    """Models of one arm, drawn anew from a seed; a bounded model is captured and cut once for all seeds.

    Args:
        settings: Of the arm.
        example: Tokens `[B, T]`.
        vocabulary: Number of tokens V.
    """

    def __init__(self, settings: Settings, example: Tensor, *, vocabulary: int) -> None:
        self.settings, self.example, self.vocabulary = settings, example, vocabulary
        self._bounded: BoundedModule | None = None

    def __call__(self, seed: int) -> nn.Module:
        """The model that ``make_model`` makes with this seed, weight for weight.

        Args:
            seed: Of the model's weights and the interface's.
        """
        settings = dataclasses.replace(self.settings, seed=seed)
        if self._bounded is None:
            made = make_model(settings, self.example, vocabulary=self.vocabulary)
            self._bounded = made if isinstance(made, BoundedModule) else None
            return made
        dense: Any = make_model(
            dataclasses.replace(settings, interface=DENSE), self.example, vocabulary=self.vocabulary
        )
        bounded, plan = self._bounded, self._bounded.plan
        bounded.source.load_state_dict(dense.state_dict())
        width = dense.embedding.weight.shape[1]
        finishes = [region.finish for region in plan.regions]
        with torch.no_grad():
            interface = build_interface(
                plan.interface,
                regions=len(plan.regions),
                width=width,
                r=plan.r,
                canvas=dense.embedding(self.example),
                cell=plan.cell,
                chunk=plan.chunk,
                own_finish=[region.own_finish for region in plan.regions],
                widths=[int(finish.shape[-1]) if finish else width for finish in finishes],
                seed=seed,
            )
        bounded.interface.load_state_dict(interface.state_dict())
        bounded.zero_grad()
        return bounded


def run(
    drawn: Drawn, rate: float, seed: int, *, data: Source, judges: Mapping[str, Source], lengths: Tensor | None = None
) -> dict[str, Any]:
    """Train an arm once and judge it.

    Args:
        drawn: Makes its model.
        rate: Learning rate.
        seed: Of the weights.
        data: What to train on.
        judges: Held-out data by name.
        lengths: Bytes each token stands for, `[V]`.

    Returns:
        ``training`` loss, and by name of a judge its ``evaluate``; ``diverged`` where the loss became no number.
        ``parameters``, and ``flops`` of the forward of one sequence. For a bounded model that leaks, ``prefix`` too:
        see ``prefix_losses``.
    """
    settings = dataclasses.replace(drawn.settings, learning_rate=rate, seed=seed)
    model = drawn(seed)
    inputs, _ = data.batch(0, 1)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(inputs)
    found: dict[str, Any] = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "flops": counter.get_total_flops(),
    }
    with tempfile.TemporaryDirectory() as folder:
        try:
            first = next(iter(judges.values()))
            result = train(model, data, first, settings, folder=Path(folder), lengths=lengths, quiet=True)
        except DivergedError as error:
            return found | {"diverged": error.found}
    found["training"] = result.loss
    for name, source in judges.items():
        told = evaluate(model, source, settings, lengths=lengths)
        if not math.isfinite(told["held_out"]):
            return found | {"diverged": f"held-out loss {told['held_out']}"}
        found[name] = told
    if settings.allow_leak:
        found["prefix"] = prefix_losses(model, judges["test"], windows=64)
    return found


class Study:
    """Arms on the same data: each chooses its rate, then its other seeds are run.

    Args:
        what: Tells the study's rows from others.
        common: What all arms share.
        data: What to train on, by seed.
        judges: The splits ``"validation"`` and ``"test"``.
        vocabulary: Number of tokens V.
        lengths: Bytes each token stands for, `[V]`.
        rows: Where runs are kept.
        rates: The grid of learning rates.
        say: Prints a line.
    """

    def __init__(
        self,
        what: Mapping[str, Any],
        common: Settings,
        *,
        data: Callable[[int], Source],
        judges: Mapping[str, Source],
        vocabulary: int,
        lengths: Tensor | None = None,
        rows: Rows,
        rates: tuple[float, ...],
        say: Callable[[str], Any],
    ) -> None:
        self.what, self.common, self.data, self.judges = what, common, data, judges
        self.vocabulary, self.lengths, self.rows, self.rates, self.say = vocabulary, lengths, rows, rates, say
        self._drawn: dict[Settings, Drawn] = {}

    def arm(self, name: str, *, seeds: int, options: Mapping[str, Any] | None = None) -> None:
        """Choose an arm's rate by the validation loss with seed 0, then run its other seeds with it.

        Args:
            name: Of the arm.
            seeds: How many are judged.
            options: Of ``Settings``, in which it differs from the arm.
        """
        arm, varied = ARMS[name], dict(options or {})
        settings = settings_of(Arm(arm.label, {**arm.options, **varied}, arm.shallow), self.common)
        if settings not in self._drawn:
            example, _ = self.judges["test"].batch(0, 2)
            self._drawn[settings] = Drawn(settings, example, vocabulary=self.vocabulary)
        drawn = self._drawn[settings]
        losses = [self._loss(drawn, name, varied, rate, 0) for rate in self.rates]
        rate = self.rates[losses.index(min(losses))]
        for seed in range(1, seeds):
            self._loss(drawn, name, varied, rate, seed)

    def _loss(self, drawn: Drawn, name: str, varied: dict[str, Any], rate: float, seed: int) -> float:
        """Loss on the validation split."""
        measure = functools.partial(
            run, drawn, rate, seed, data=self.data(seed), judges=self.judges, lengths=self.lengths
        )
        found = self.rows.measured({**self.what, "arm": name, **varied, "rate": rate, "seed": seed}, measure)
        told = found.get("diverged") or "loss {held_out:.4f}, accuracy {accuracy:.4f}".format(**found["validation"])
        which = " ".join(f"{key}={value}" for key, value in varied.items())
        self.say(f"{self.common.architecture}, {ARMS[name].label} {which}, rate {rate:g}, seed {seed}: {told}")
        return math.inf if "diverged" in found else found["validation"]["held_out"]


@torch.no_grad()
def prefix_losses(model: nn.Module, source: Source, *, windows: int) -> dict[str, Any]:
    """What a model's leak is worth: its loss as published, and with nothing to read but the prefix.

    Published: one forward over the whole sequence, whose latent is a mean over all positions, later ones too. Prefix:
    for every position a forward over the tokens up to it, as it would be used to generate. Position 0 is left out: a
    captured model takes no sequence of one position.

    Args:
        model: Tokens `[B, T]` -> logits `[B, T, V]`.
        source: Held-out sequences.
        windows: How many.

    Returns:
        ``published`` and ``prefix``, nats per token over the same positions; ``failed`` where the model takes no
        shorter sequence.
    """
    inputs, targets = source.batch(0, windows)
    whole = F.cross_entropy(model(inputs)[:, 1:].flatten(0, 1), targets[:, 1:].flatten())
    ends = []
    try:
        for last in range(1, inputs.shape[1]):
            ends.append(F.cross_entropy(model(inputs[:, : last + 1])[:, -1], targets[:, last]))
    except LBIError as error:
        return {"published": float(whole), "failed": error.found}
    return {"published": float(whole), "prefix": float(torch.stack(ends).mean())}
