"""One row of the zoo: a model, what to call it with, and what the compiler is expected to do with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

# why a model may have no scan
FUNCTION = "a graph would lose the backward of its autograd.Function, so it is cut between its child modules"
BATCH_NORM = "BatchNorm in training mixes the samples of a batch: no Jacobian per sample exists"

Inputs = dict[str, Any] | tuple[Any, ...]
Made = tuple[nn.Module, Inputs]


@dataclass(frozen=True, slots=True)
class Entry:
    """A model of the zoo.

    Attributes:
        name: Short name, unique in the zoo.
        family: Kind of model, for example ``"decoder LM"``.
        make: Makes the model at random weights, in training mode, with inputs it runs on.
        float32_inside: The model computes parts in float32 whatever its own precision, so that float64 gradients agree
            to less than float64 (``limit``).
        expect: ``"scan"``, ``"chain"`` or the name of an error class.
        why: Reason for an ``expect`` other than ``"scan"``.
        ci: Small, quick and unlike the others: checked with the fast tests.
    """

    name: str
    family: str
    make: Callable[[], Made]
    float32_inside: bool = False
    expect: str = "scan"
    why: str = ""
    ci: bool = False

    @property
    def limit(self) -> float:
        """Largest relative error of a gradient in float64 that counts as exact."""
        return 1e-8 if self.float32_inside else 1e-10

    def build(self) -> Made:
        """The model and its inputs, equal at every call; the global random state is left alone."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return self.make()
