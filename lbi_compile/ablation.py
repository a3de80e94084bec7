"""Ablation: what a bounded model's outputs and loss owe to what crosses its boundaries."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ._torch import pytree
from .bounded import BoundedModule
from .capture import bind, undisturbed
from .errors import OptionError
from .passes.insert import Program
from .running import assemble

ZEROED, NOISED, SHUFFLED = "zeroed", "noised", "shuffled"
WAYS = (ZEROED, NOISED, SHUFFLED)


@dataclass(frozen=True, slots=True)
class Ablation:
    """What one way of spoiling the latents does.

    Attributes:
        way: ``"zeroed"``; ``"noised"``: noise of its own spread over samples and positions is added to each number;
            ``"shuffled"``: every sample hears the latents of another one.
        boundary: Where: ``k`` of the latents `m_k`; ``None`` for all boundaries at once.
        change: Root mean square of the change over that of the outputs, over all float outputs.
        loss: The loss that was asked for; ``None`` without one.
        loss_as_is: The same without any ablation.
    """

    way: str
    boundary: int | None
    change: float
    loss: float | None = None
    loss_as_is: float | None = None


def ablate(
    bounded: BoundedModule, *args: Any, loss: Callable[[Any], Tensor] | None = None, seed: int = 0, **kwargs: Any
) -> tuple[Ablation, ...]:
    """Run a model with its latents spoiled, everywhere and at each boundary alone.

    An output that does not change says that the regions do not listen; a loss that does not rise says that what they
    hear is of no use. Only latents that come from a region are spoiled: `m_0`, which the canvas gives, stays. Random
    state, buffers and gradients stay as they are.

    Args:
        bounded: The model.
        args: What it takes, like ``kwargs``; shuffling needs two samples, and is left out for one.
        loss: Of the model's output.
        seed: Of the noise.

    Returns:
        One entry for each way and boundary, those of all boundaries first; nothing where nothing crosses.

    Raises:
        OptionError: The model's regions are taught by a local rule, or are modules and no graphs.

    Example:
        >>> for found in ablate(bounded, x, loss=lambda out: criterion(out, y)):
        ...     print(found.way, found.boundary, found.loss - found.loss_as_is)
    """
    inputs = bind(bounded._form, args, kwargs)
    program = bounded._program(inputs)
    if not isinstance(program, Program) or bounded.credit is not None:
        raise not_graphs(bounded)

    def run(alter: Callable[[int, Tensor], Tensor] | None) -> tuple[list[Tensor], float | None]:
        with undisturbed(bounded.source), torch.no_grad():
            torch.manual_seed(seed)  # dropout draws alike in every run
            flat, hs, ms = bounded._run(program, inputs.leaves, marked=False, taps=False, alter=alter)
            out = assemble(program, flat, hs, ms)
            floats = [x for x in pytree.tree_leaves(out) if isinstance(x, Tensor) and x.is_floating_point()]
            return floats, None if loss is None else float(loss(out))

    latents = [k for k in bounded.interface.latents if k > 0]
    if not latents:
        return ()
    before, as_is = run(None)
    size = sum(float(x.double().square().sum()) for x in before) ** 0.5
    found = []
    for boundary in (None, *(latents if len(latents) > 1 else ())):
        for way in WAYS:
            alter = _Spoil(way, boundary, seed)
            after, value = run(alter)
            if alter.impossible:
                continue
            pairs = zip(before, after, strict=True)
            change = sum(float((y.double() - x.double()).square().sum()) for x, y in pairs) ** 0.5
            found.append(Ablation(way, boundary, change / size if size else change, value, as_is))
    return tuple(found)


def not_graphs(bounded: BoundedModule) -> OptionError:
    """The error for a model whose latents nobody can get at."""
    return OptionError(
        "an ablation of a model " + ("with a local credit rule" if bounded.credit else "that is cut by hooks"),
        expected="exact credit, and regions that are graphs",
        do="ablate a model that torch.export captures",
    )


class _Spoil:
    """Spoils the latents that enter regions.

    Attributes:
        impossible: A latent has one sample, and so none to be shuffled with.
    """

    def __init__(self, way: str, boundary: int | None, seed: int) -> None:
        self.way, self.boundary, self.impossible = way, boundary, False
        self.draw = torch.Generator().manual_seed(seed)  # of its own: the model's draws stay as they are

    def __call__(self, k: int, m: Tensor) -> Tensor:
        if self.boundary not in (None, k):
            return m
        if self.way == ZEROED:
            return torch.zeros_like(m)
        if self.way == SHUFFLED:
            self.impossible |= m.shape[0] < 2
            return m.roll(1, 0)
        spread = m.flatten(0, -2).std(0, unbiased=False)
        noise = torch.randn(m.shape, generator=self.draw, dtype=torch.float64)
        return m + spread * noise.to(device=m.device, dtype=m.dtype)
