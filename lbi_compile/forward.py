"""``forward="parallel"``: latents are solved for first, then all regions run side by side at their values."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import engines
from ._torch import (
    dispatch_mode_active,
    dynamic_sizes,
    fresh_code,
    functorch_active,
    vmap_without_fallback,
)
from .backend import compile_errors, eager_backend
from .errors import EngineError, OptionError
from .guesses import Memory
from .hooked.plan import is_hooked
from .interfaces import TokenChunkedInterface
from .newton import JACOBI, METHODS, SEQUENTIAL, Solve, default_tolerance, solve
from .passes.insert import Owner, Program
from .passes.scan_backward import MAX_R, ScanRecord
from .running import evaluate, evaluate_traced, first_latent

if TYPE_CHECKING:
    from .bounded import BoundedModule


def check_forward(request: str, tol: float | None, max_iters: int | None) -> str:
    """Return ``request`` if it names a forward and the other two go with it.

    Raises:
        OptionError: One of the three is no such thing.
    """
    if request not in METHODS:
        raise OptionError(f"forward={request!r}", expected=f"one of {', '.join(METHODS)}", do="pass one of these")
    good_tol = tol is None or (isinstance(tol, (int, float)) and not isinstance(tol, bool) and 0 < tol < 1)
    if not good_tol:
        raise OptionError(
            f"tol={tol!r}", expected="None or a number between 0 and 1: a relative residual", do="pass for example 1e-4"
        )
    if max_iters is not None and (isinstance(max_iters, bool) or not isinstance(max_iters, int) or max_iters < 1):
        raise OptionError(
            f"max_iters={max_iters!r}", expected="None or a positive whole number", do="leave it out for one per region"
        )
    if request == SEQUENTIAL and (tol is not None or max_iters is not None):
        raise OptionError(
            f"tol={tol!r}, max_iters={max_iters!r} with forward='sequential'",
            expected="neither: nothing is iterated",
            do="leave them out, or pass forward='parallel'",
        )
    return request


def refuse_forward(bounded: BoundedModule, *, hooked: bool = False) -> None:
    """Refuse a parallel forward where regions cannot be run side by side, or are already.

    Raises:
        EngineError: The regions are modules and no graphs.
        OptionError: The interface needs no solving, or the credit rule knows no latents to solve for.
    """
    name = bounded.forward_method
    if name == SEQUENTIAL:
        return
    if hooked or is_hooked(bounded.plan):
        raise EngineError(
            f"forward={name!r} on a model that is cut between child modules by hooks",
            expected="a model that torch.export captures: regions have to run at given latents, one by one",
            do='use forward="sequential"',
        )
    if bounded.credit is not None:
        raise OptionError(
            f"forward={name!r} on a model with a local credit rule",
            expected="exact credit: the rule itself says what regions read",
            do='use forward="sequential"',
        )
    if isinstance(bounded.interface, TokenChunkedInterface) and bounded.boundaries:
        raise OptionError(
            f"forward={name!r} with interface='token+chunked'",
            expected="one latent at a boundary to solve for: chunked",
            do='use forward="sequential", or interface="chunked"',
        )
    if bounded.interface.splits and bounded.boundaries:
        raise OptionError(
            f"forward={name!r} with the token interface",
            expected="an interface whose latent enters at the start of a region (pooled, chunked). Under token every"
            " body runs on the canvas alone, so bodies are side by side already; what is left in sequence are cells"
            " of r numbers a position",
            do='use forward="sequential", or interface="chunked"',
        )
    if bounded.boundaries and bounded.interface.r > MAX_R and name != JACOBI:
        raise EngineError(
            f"latents of {bounded.interface.r} numbers",
            expected=f"r <= {MAX_R}: a Jacobian has r * r numbers for each index",
            do='choose a smaller r, or forward="jacobi", which needs none',
        )


def refuse_tracing(name: str) -> None:
    """Refuse to be part of a graph that somebody else traces, in which no loop can run to a tolerance.

    Raises:
        OptionError: The forward is not sequential.
    """
    if name != SEQUENTIAL:
        raise OptionError(
            f"forward={name!r} inside torch.compile or torch.export",
            expected="a forward without a loop that looks at values",
            do='call it uncompiled (it compiles its own parts), or inside `with bounded.with_forward("sequential"):`',
        )


def varying(latents: Tensor | None) -> contextlib.AbstractContextManager[None]:
    """Inside, sizes of `[K - 1, ..., R]` between the first and the last axis are marked as varying for Dynamo."""
    if latents is None:
        return contextlib.nullcontext()
    return dynamic_sizes(latents, [axis for axis in range(1, latents.dim() - 1) if latents.shape[axis] > 1])


class Solver:
    """Solves for the latents of the calls of one bounded model; derived state, made anew after a move."""

    def __init__(self) -> None:
        self.memory = Memory()
        self._compiled: dict[Any, tuple[Any, ScanRecord]] = {}
        self._kept: dict[int, dict[Any, Owner]] = {}
        self._refused: dict[int, str] = {}
        self._unbatched: dict[int, str] = {}

    def __call__(
        self, bounded: BoundedModule, program: Program, leaves: list[Any], method: str
    ) -> tuple[Tensor | None, Solve]:
        """Find the latents of a call; random state and buffers are those of before afterwards.

        Args:
            bounded: The bounded model.
            program: What runs.
            leaves: Inputs of the call.
            method: ``"parallel"``, ``"quasi-newton"`` or ``"jacobi"``.

        Returns:
            `[K - 1, ..., R]`, or ``None`` where regions are to run one after another; and the record.
        """
        latents, learns = len(bounded.plan.regions) - 1, torch.is_grad_enabled()
        bounded._checks_of(program).raise_if_coupled(engines.AUTO, forward=method)
        if not bounded.boundaries or not latents:
            return None, Solve(SEQUENTIAL, "nothing crosses between regions, so all of them run side by side")
        if functorch_active():
            raise EngineError(
                f"forward={method!r} under a transform of torch.func, whose values cannot be looked at",
                expected="a plain call",
                do='use bounded.with_forward("sequential") there',
            )
        with torch.inference_mode(False), _undisturbed(self._buffers(program), leaves):
            given = [leaf.clone() if isinstance(leaf, Tensor) and leaf.is_inference() else leaf for leaf in leaves]
            given = [leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in given]

            def first() -> tuple[Tensor, Tensor]:
                with torch.no_grad(), _undisturbed(self._buffers(program), leaves):
                    return first_latent(bounded, program, given)

            guess = self.memory.guess(leaves, first, latents)
            run = self._evaluation(bounded, program, given, method)
            lead, r = guess.shape[1:-1], guess.shape[-1]

            def at(flat: Tensor) -> tuple[Tensor, Tensor | None]:
                with _undisturbed(self._buffers(program), leaves):
                    values, jacobians = run(flat.view(latents, *lead, r))
                flat_jacobians = None if jacobians is None else jacobians.reshape(len(jacobians), -1, r, r)
                return values.reshape(latents, -1, r), flat_jacobians

            tol = bounded._options.tol or default_tolerance(guess.dtype, latents + 1)
            with torch.no_grad():
                found, record = solve(
                    at, guess.reshape(latents, -1, r), method=method, tol=tol, max_iters=bounded._options.max_iters
                )
        told = (
            ("regions run without a compiler", self._refused.get(id(program))),
            ("Jacobians row by row", self._unbatched.get(id(program))),
        )
        record = replace(record, note="; ".join(f"{what}: {why}" for what, why in told if why))
        if found is None:
            return None, record
        found = found.view(latents, *lead, r)
        if learns:
            self.memory.keep(leaves, found)
        return found, record

    def _buffers(self, program: Program) -> list[Tensor]:
        """Buffers that the program reads before its head, which it may write to."""
        if id(program) not in self._kept:
            bodies = [
                piece for region in program.regions for piece in (region.body, region.finish) if piece is not None
            ]
            owners = [owner for piece in (program.prologue, program.stem, *bodies) for owner in piece.attributes]
            buffers = [(owner, name) for owner, name in owners if name in getattr(owner, "_buffers", ())]
            self._kept[id(program)] = {(id(owner), name): (owner, name) for owner, name in buffers}
        return [getattr(owner, name) for owner, name in self._kept[id(program)].values()]

    def _evaluation(
        self, bounded: BoundedModule, program: Program, leaves: list[Any], method: str
    ) -> Callable[[Tensor], tuple[Tensor, Tensor | None]]:
        """What runs all regions at a guess."""
        if method == JACOBI or len(bounded.plan.regions) < 3:
            return _without_jacobians(bounded, program, leaves)
        eagerly, compiled = self._eagerly(bounded, program, leaves), self._compile(bounded, program, leaves)
        if bounded.backward not in (engines.AUTO, engines.SCAN) or dispatch_mode_active():
            return eagerly

        def run(guess: Tensor) -> tuple[Tensor, Tensor]:
            if id(program) not in self._refused:
                try:
                    return compiled(guess)
                except EngineError as error:
                    if bounded.backward != engines.AUTO:
                        raise
                    self._refused[id(program)] = error.found
            return eagerly(guess)

        return run

    def _eagerly(
        self, bounded: BoundedModule, program: Program, leaves: list[Any]
    ) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        """Evaluate regions without a compiler; R vector-Jacobian products give the rows of all Jacobians."""

        def run(guess: Tensor) -> tuple[Tensor, Tensor]:
            guess = guess.detach().requires_grad_()
            with torch.enable_grad():
                values = evaluate(bounded, program, leaves, guess)
            rows, unbatched = _rows(values, guess)
            if unbatched:
                self._unbatched[id(program)] = unbatched
            # what the guess of m_{K-1} does is the last region's affair, which is not run
            return values.detach(), rows.movedim(0, -2)[:-1]

        return run

    def _compile(
        self, bounded: BoundedModule, program: Program, leaves: list[Any]
    ) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        """Evaluate regions in one graph, in which what they do alike is one operator; compiled at the first call."""
        if id(program) not in self._compiled:
            record = ScanRecord()

            def evaluated(module: BoundedModule, leaves: list[Any], guess: Tensor) -> tuple[Tensor, Tensor]:
                return evaluate_traced(module, program, leaves, guess)

            backend = eager_backend(record, batched=bounded.batches_regions, side_by_side=True)
            self._compiled[id(program)] = torch.compile(fresh_code(evaluated), backend=backend, fullgraph=True), record
        compiled, record = self._compiled[id(program)]

        def run(guess: Tensor) -> tuple[Tensor, Tensor]:
            guess = guess.detach().clone().requires_grad_()
            with (
                compile_errors(record, do='use backward="chain" (regions are then evaluated without a compiler)'),
                torch.enable_grad(),
                bounded._checks_of(program).marked_sizes(leaves),
                varying(guess),
            ):
                values, jacobians = compiled(bounded, leaves, guess)
            return values.detach(), jacobians.detach()

        return run


def _without_jacobians(
    bounded: BoundedModule, program: Program, leaves: list[Any]
) -> Callable[[Tensor], tuple[Tensor, None]]:
    def run(guess: Tensor) -> tuple[Tensor, None]:
        with torch.no_grad():
            return evaluate(bounded, program, leaves, guess), None

    return run


def _rows(values: Tensor, guess: Tensor) -> tuple[Tensor, str]:
    """Gradients of the guess for the R unit cotangents of every value, `[R, K - 1, ..., R]`.

    All at once; or one by one, with the reason, where an operator has no batching rule, such as fused attention.
    """
    r = guess.shape[-1]
    units = torch.eye(r, dtype=values.dtype, device=values.device)
    units = units.view(r, *[1] * (values.dim() - 1), r).expand(r, *values.shape)
    if not values.requires_grad:  # nothing hears its latent
        return guess.new_zeros((r, *guess.shape)), ""

    def row(unit: Tensor) -> Tensor:
        return torch.autograd.grad(values, guess, unit, retain_graph=True)[0]

    try:
        with vmap_without_fallback():
            return torch.vmap(row)(units), ""
    except RuntimeError as error:
        why = str(error).partition("\n")[0]
        if "batching rule" not in why.lower() and "vmap" not in why:
            raise
        return torch.stack([row(unit) for unit in units]), why.partition(";")[0]


@contextlib.contextmanager
def _undisturbed(buffers: list[Tensor], leaves: list[Any]) -> Iterator[None]:
    """Random state and ``buffers`` as before afterwards: every evaluation draws what the call itself will draw."""
    before = [buffer.detach().clone() for buffer in buffers]
    devices = {leaf.device.index for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_cuda}
    with torch.random.fork_rng(devices=[device for device in devices if device is not None]):
        yield
    with torch.no_grad():
        for buffer, value in zip(buffers, before, strict=True):
            if not torch.equal(buffer, value):
                buffer.copy_(value)
