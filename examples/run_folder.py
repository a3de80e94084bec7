"""The folder of a training run: its checkpoint, its figures step by step, and their curves."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from figures import figure
from torch import nn

from lbi_compile.errors import OptionError

CHECKPOINT, METRICS, CURVES = "checkpoint.pt", "metrics.jsonl", "curves.png"


class State:
    """Everything a run needs to go on: weights, moments of the optimizer, random states, and how far it is.

    Args:
        model: What is trained.
        optimizer: Its optimizer.
        identity: What the run is; another one's checkpoint is refused.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, identity: dict[str, Any]) -> None:
        self.model, self.optimizer, self.identity = model, optimizer, identity
        self.step, self.position, self.seconds = 0, 0, 0.0
        self.held_out: dict[str, float] = {}

    def save(self, path: Path) -> None:
        """Write a checkpoint that ``torch.load(path, weights_only=True)`` reads; the old one stands until it is whole.

        Args:
            path: Where to.
        """
        part = path.with_suffix(".part")
        with part.open("wb") as file:
            torch.save(
                {
                    "model": self.model.state_dict(),
                    "optimizer": self.optimizer.state_dict(),
                    "random": torch.get_rng_state(),
                    "random_cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
                    "step": self.step,
                    "position": self.position,
                    "seconds": self.seconds,
                    "held_out": self.held_out,
                    "identity": self.identity,
                },
                file,
            )
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)

    def load(self, path: Path) -> None:
        """Take the state of a checkpoint.

        Args:
            path: Where from.

        Raises:
            OptionError: It is of a run with other settings or data.
        """
        # on the CPU: random states live there, and what is loaded into the model and optimizer is copied to them
        saved = torch.load(path, weights_only=True, map_location="cpu")
        other = [
            f"{name}={saved['identity'].get(name)!r} (now {value!r})"
            for name, value in self.identity.items()
            if saved["identity"].get(name) != value
        ]
        if other:
            raise OptionError(
                f"{path} of a run with {', '.join(other)}",
                expected="the run that is to go on",
                do="give the same options, or name another --out",
            )
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        torch.set_rng_state(saved["random"])
        if saved["random_cuda"]:
            torch.cuda.set_rng_state_all(saved["random_cuda"])
        self.step, self.position, self.seconds = saved["step"], saved["position"], saved["seconds"]
        self.held_out = saved["held_out"]


class Log:
    """Rows of figures, one JSON object a line.

    Training rows have ``loss``, evaluations ``held_out``, records of interface Jacobians ``jacobians``.

    Args:
        folder: Where ``metrics.jsonl`` stands.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / METRICS

    def keep(self, step: int) -> None:
        """Drop what was written after ``step``: those steps are made again."""
        part = self.path.with_suffix(".part")
        part.write_text("".join(json.dumps(row) + "\n" for row in self.rows() if row["step"] <= step))
        part.replace(self.path)

    def write(self, **row: Any) -> None:
        """Append a row."""
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def rows(self) -> list[dict[str, Any]]:
        """All rows; a last line that was cut off is no row."""
        if not self.path.exists():
            return []
        return [json.loads(line) for line in self.path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def draw_curves(folder: Path) -> Path:
    """Draw training and held-out loss over steps.

    Args:
        folder: Of a run.

    Returns:
        The PNG file.

    Raises:
        PackageError: ``matplotlib`` is not installed.
    """
    rows = Log(folder).rows()
    drawn = figure(7, 4)
    axes = drawn.add_subplot(xlabel="step", ylabel="nats per token", title=folder.name)
    for name, style in (("loss", {"alpha": 0.5, "label": "training"}), ("held_out", {"label": "held out"})):
        points = [(row["step"], row[name]) for row in rows if name in row]
        axes.plot(*zip(*points, strict=True), **style) if points else None
    axes.legend()
    drawn.savefig(folder / CURVES, dpi=150)
    return folder / CURVES
