"""Runs the race of ``backward="auto"`` over the steps of a bounded model; the decisions are made in ``auto``."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import auto, engines
from .newton import SEQUENTIAL

if TYPE_CHECKING:
    from .bounded import BoundedModule
    from .plan import Plan


# Shapes that are remembered: a loop over sentences of all lengths must not fill the memory.
_MOST_KNOWN = 1024


class Racer:
    """The races of one bounded model, one for each program and kind of inputs, and the step that is being timed."""

    def __init__(self) -> None:
        self._races: dict[str, auto.Race] = {}
        self._timed: tuple[str, auto.Stopwatch] | None = None
        # The plan's hash and the cost model take longer than a layer, and every step asks for the same.
        self._known: dict[tuple[Any, ...], tuple[str, dict[str, float], torch.device]] = {}
        self._plan: Plan | None = None

    def turn(self, bounded: BoundedModule, leaves: list[Any], *, coupled: bool) -> Turn:
        """Whose turn it is.

        Args:
            bounded: The model.
            leaves: Inputs of the call.
            coupled: Samples mix, so that a scan cannot run.
        """
        key, cost, device = self._look_up(bounded, leaves, coupled=coupled)
        if self._timed is not None:  # a forward that was never differentiated
            missed, watch = self._timed
            watch.cancel()
            self._races[missed].miss()
            self._keep(missed)
            self._timed = None
        if key not in self._races:
            self._races[key] = auto.Race(cost, known=_decisions().get(key))
            if torch.are_deterministic_algorithms_enabled():
                self._races[key].settle("deterministic algorithms are asked for, and what is fastest may differ by run")
            elif torch.distributed.is_available() and torch.distributed.is_initialized():
                self._races[key].settle("ranks have to agree, and would not on what each measures")
        return Turn(self, key, self._races[key], device)

    def _look_up(
        self, bounded: BoundedModule, leaves: list[Any], *, coupled: bool
    ) -> tuple[str, dict[str, float], torch.device]:
        """Key of the race, predicted costs and device."""
        if self._plan is not bounded.plan or len(self._known) >= _MOST_KNOWN:
            self._plan, self._known = bounded.plan, {}
        shapes = tuple((leaf.shape, leaf.dtype, leaf.device) for leaf in leaves if isinstance(leaf, Tensor))
        asked = (shapes, bounded.training, bounded.forward_method, bounded.batches_regions, coupled)
        asked += (torch.get_num_threads(),)
        if asked not in self._known:
            cost, device = costs(bounded, leaves, coupled=coupled), _device(leaves)
            name = f"{bounded.plan.hash} {bounded.training} {bounded.forward_method}"
            key = auto.key(program=name, leaves=leaves, engines=tuple(cost), device=device)
            self._known[asked] = key, cost, device
        return self._known[asked]

    def watch(self, key: str, watch: auto.Stopwatch) -> None:
        """A step of this race waits for its backward."""
        self._timed = key, watch

    def timed(self, key: str, name: str, seconds: float) -> None:
        """A step of this race took so long."""
        self._timed = None
        self._races[key].record(name, seconds)
        self._keep(key)

    def _keep(self, key: str) -> None:
        decision = self._races[key].decision
        if decision is not None:
            _decisions().put(key, decision)


class Turn:
    """One step of a race.

    Attributes:
        name: The engine that runs it.
        engine: The same with the reason.
    """

    def __init__(self, racer: Racer, key: str, race: auto.Race, device: torch.device) -> None:
        self._racer, self._key, self._race = racer, key, race
        self.name = race.turn()
        self.engine = engines.Engine(self.name, race.why)
        # the time that compiling and a first run take is taken too, and not counted
        self._watch = None if race.decision is not None else auto.Stopwatch(device, self._done)

    def _done(self, seconds: float) -> None:
        self._racer.timed(self._key, self.name, seconds)

    def refused(self, why: str) -> bool:
        """The engine cannot run; whether another one may."""
        if self._race.decision is not None:
            return False
        self._race.drop(self.name, why)
        return True

    def forward_ended(self, outputs: list[Any], leaves: Callable[[], list[Any]]) -> None:
        """Wait for the backward of ``outputs``, if this step is timed and has one.

        Args:
            outputs: Of the forward.
            leaves: Gives parameters and inputs; not called where nothing is timed.
        """
        if self._watch is not None and self._watch.forward_ended(outputs, leaves()):
            self._racer.watch(self._key, self._watch)


def costs(bounded: BoundedModule, leaves: list[Any], *, coupled: bool) -> dict[str, float]:
    """Predicted seconds of a step by engine, of those that can run; arguments as for :meth:`Racer.turn`."""
    facts = auto.facts_of(
        bounded.plan,
        leaves,
        latents=bounded.boundaries,
        splits=bounded.interface.splits and bounded.interface.parallel,
        batched=bounded.batches_regions,
        device=_device(leaves),
    )
    if bounded.forward_method != SEQUENTIAL:
        facts = dataclasses.replace(facts, parallel=True)  # regions read latents that were solved for
    cost = auto.predict(facts)
    if coupled:
        del cost[engines.SCAN]
    return cost


def _device(leaves: list[Any]) -> torch.device:
    return next((leaf.device for leaf in leaves if isinstance(leaf, Tensor)), torch.device("cpu"))


@functools.cache
def _decisions() -> auto.Store:
    return auto.Store(auto.store_path())
