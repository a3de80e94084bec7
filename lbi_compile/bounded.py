"""The bounded model: the user's parameters, run as regions that meet only in latents."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import engines, running
from ._torch import dispatch_mode_active, exporting, pytree
from .calls import ShapeCheck, call_signature
from .capture import Inputs, bind, describe_inputs, signature
from .credit.base import LocalCredit, no_local_credit
from .errors import (
    EngineError,
    NotBuiltError,
    PlanError,
    ShapeNotCapturedError,
)
from .forward import Solver, check_forward, refuse_forward, refuse_tracing
from .gate import Gate
from .hooked.plan import is_hooked
from .hooked.run import HookedProgram
from .interfaces import Interface
from .newton import SEQUENTIAL, Solve
from .options import Options
from .passes.insert import Program
from .plan import Plan
from .racing import Racer
from .region import Region, Taps
from .running import assemble
from .scanning import scan
from .staleness import Fingerprint, fingerprint, modes_of, placement, raise_if_stale
from .taking import taking
from .unbuilt import Unbuilt, not_built

# Two numbers for each bounded model: where two latents cross a boundary, their markers belong to two chains.
_chains = itertools.count(step=2)


# What ran last under a local credit rule.
LOCAL = engines.Engine(engines.AUTOGRAD, "local credit: every region by itself")
END_TO_END = engines.Engine(engines.AUTOGRAD, "plain forward of a model with local credit, differentiated end to end")


class BoundedModule(nn.Module):
    """A model whose regions exchange only small latents. Made by ``lbi_compile.transform``.

    Its parameters are the model's own objects under their own names; those of the interfaces are under ``lbi.``.

    Attributes:
        plan: How the model is cut.
        engine: Which engine solved the adjoints of the last call, and why.
        solve: How the latents of the last call were found.
        regions: The regions as modules.
    """

    lbi: nn.Module

    def __init__(self, model: nn.Module, options: Options) -> None:
        super().__init__()
        # the very same dictionaries and children: names, identity, moves, train and eval are the model's
        self._parameters = model._parameters
        self._buffers = model._buffers
        self._non_persistent_buffers_set = model._non_persistent_buffers_set
        self._modules = dict(model._modules)
        self.training = model.training
        self._source = (model,)
        self._options = options
        self._form = signature(model)
        self._plan: Plan | None = None
        self._regions: tuple[Region, ...] = ()
        self._seen: Fingerprint | None = None
        self._engine: engines.Engine | None = None
        self._request = options.backward
        self._forward = options.forward
        self._solve_record: Solve | None = None
        self._retarget: torch.dtype | None = None
        self._gate = Gate()
        self._forget()
        self._modules["lbi"] = Unbuilt()
        self.__class__ = taking(BoundedModule, model)  # pyright: ignore[reportAttributeAccessIssue]

    def _forget(self) -> None:
        """Drop everything that is derived from the model by capture and compilation; it is made anew when needed."""
        self._chain = next(_chains)
        self._programs: dict[Any, Program] = {}
        self._checks: dict[Any, Any] = {}
        self._known: dict[Any, Any] = {}
        self._compiled: dict[Any, Any] = {}
        self._racer = Racer()
        self._solver = Solver()

    # -- what users look at

    @property
    def plan(self) -> Plan:
        if self._plan is None:
            raise not_built("plan")
        return self._plan

    @property
    def regions(self) -> tuple[Region, ...]:
        if self._plan is None:
            raise not_built("regions")
        return self._regions

    @property
    def engine(self) -> engines.Engine:
        if self._engine is None:
            return engines.Engine("none", "the model has not been called yet")
        return self._engine

    @property
    def solve(self) -> Solve:
        """How the latents of the last call were found: iterations, residual, and why it fell back where it did."""
        if self._solve_record is None:
            return Solve(SEQUENTIAL, "the model has not been called yet")
        return self._solve_record

    @property
    def source(self) -> nn.Module:
        """The model that was transformed."""
        return self._source[0]

    @property
    def interface(self) -> Interface:
        """What crosses the boundaries; its parameters are those under ``lbi.``."""
        interface = self._modules["lbi"]
        if not isinstance(interface, Interface):
            raise not_built("interface")
        return interface

    @property
    def credit(self) -> LocalCredit | None:
        """The local credit rule that teaches the regions; ``None`` for exact credit."""
        return self.interface if isinstance(self.interface, LocalCredit) else None

    @property
    def boundaries(self) -> int:
        """How many latents cross between regions."""
        return len(self.interface.latents)

    @property
    def programs(self) -> tuple[Program, ...]:
        """The captured programs, one per mode and kind of input; ``str(program)`` prints the code."""
        return tuple(self._programs.values())

    @property
    def batches_regions(self) -> bool:
        """Whether compiled graphs run what regions do alike as one operator."""
        return self._options.batch_regions

    @property
    def backward(self) -> str:
        """The engine asked for."""
        return self._request

    @property
    def forward_method(self) -> str:
        """The forward asked for: ``"sequential"``, ``"parallel"``, ``"quasi-newton"`` or ``"jacobi"``."""
        return self._forward

    @contextlib.contextmanager
    def with_forward(self, name: str) -> Iterator[BoundedModule]:
        """Run with another forward inside the block.

        Args:
            name: ``"sequential"``, ``"parallel"``, ``"quasi-newton"`` or ``"jacobi"``.

        Example:
            >>> with bounded.with_forward("sequential"):
            ...     expected = bounded(x)
        """
        before, self._forward = self._forward, check_forward(name, None, None)
        try:
            if self._plan is not None:
                refuse_forward(self)
            yield self
        finally:
            self._forward = before

    @contextlib.contextmanager
    def with_engine(self, name: str) -> Iterator[BoundedModule]:
        """Run with another engine inside the block, in all threads that call this model.

        Args:
            name: ``"auto"``, ``"autograd"``, ``"chain"`` or ``"scan"``.

        Example:
            >>> with bounded.with_engine("autograd"):
            ...     loss = criterion(bounded(x), y)
        """
        before, self._request = self._request, engines.check_request(name)
        try:
            yield self
        finally:
            self._request = before

    # -- running

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the model returns, computed by its regions; takes what the model takes."""
        return self._call(args, kwargs, taps=False)

    def forward_regions(self, *args: Any, **kwargs: Any) -> tuple[Any, Taps]:
        """The output, and the regions' outputs and latents beside it.

        Returns:
            The model's output, and ``Taps``: losses on them are differentiated exactly.

        Example:
            >>> out, taps = bounded.forward_regions(x)
            >>> loss = criterion(out, y) + 0.01 * taps.m[2].square().mean()
        """
        return self._call(args, kwargs, taps=True)

    def local_loss(self, *args: Any, target: Any, **kwargs: Any) -> Tensor:
        """The sum of the local objectives of all regions, for ``credit="sid"`` and ``"hbll"``.

        Every region's part has a graph of its own; they meet in the canvas only.

        Args:
            args: What the model takes, like ``kwargs``.
            target: As ``torch.nn.functional.cross_entropy`` takes it: classes (`[B]`, or `[B, T]` already shifted, for
                logits `[B, T, C]`) or probabilities.

        Returns:
            A scalar; ``backward()`` gives every parameter its gradient.

        Raises:
            OptionError: The model has exact credit.
            TargetError: The target does not fit the logits, or is no classification.

        Example:
            >>> bounded.local_loss(x, target=y).backward()
        """
        program, leaves, credit = self._locally("local_loss", args, kwargs)
        return credit.loss(self, program, leaves, target)

    def forward_path(
        self, *args: Any, hops: int | None = None, spans: Sequence[tuple[int, int]] | None = None, **kwargs: Any
    ) -> Any:
        """What the model returns, by a path of fewer hops, for ``credit="hbll"``.

        Args:
            args: What the model takes, like ``kwargs``.
            hops: From 1 to K, which is the whole network.
            spans: Instead, a tiling of (0, K] by spans of the tree, for example ``[(0, 4), (4, 5), (5, 8)]``.

        Raises:
            OptionError: There is no such path.

        Example:
            >>> logits = bounded.forward_path(x, hops=2)
        """
        program, leaves, credit = self._locally("forward_path", args, kwargs)
        return assemble(program, credit.path(self, program, leaves, hops, spans), (), ())

    def _locally(
        self, what: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[Program, list[Any], LocalCredit]:
        if self._options.credit is None:
            raise no_local_credit(what, "exact")
        inputs = bind(self._form, args, kwargs)
        program, credit = self._program(inputs), self.credit
        assert credit is not None
        self._engine = LOCAL
        return program, inputs.leaves, credit

    def _call(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, taps: bool) -> Any:
        inputs = bind(self._form, args, kwargs)
        leaves = inputs.leaves
        if torch.compiler.is_compiling():
            refuse_tracing(self._forward)
            key = self._key(inputs)
            program = self._programs.get(key)
            if program is None:
                if exporting():
                    raise _not_captured(self.training)
                raise RuntimeError("call the bounded model once in this mode with such inputs before compiling it")
            # without markers a backend has nothing to rewrite and gives the plain, exact backward
            marked = not exporting() and self._checks[key].coupled is None
            return assemble(program, *self._run(program, leaves, marked=marked, taps=taps))
        program = self._program(inputs)
        with self._gate.running():
            return assemble(program, *self._solve(program, leaves, taps))

    def _solve(self, program: Program, leaves: list[Any], taps: bool) -> Any:
        pins = self._pins(program, leaves)
        if not torch.is_grad_enabled() or not self._needs_gradient(leaves):
            self._engine = engines.Engine("none", "no gradient was asked for")
            return self._run(program, leaves, marked=False, taps=taps, pins=pins)
        if self.credit is not None:
            self._engine = END_TO_END
            return self._run(program, leaves, marked=False, taps=taps)
        boundaries = self.boundaries
        engine = engines.choose(self._request, boundaries=boundaries)
        if engine.name == engines.AUTO and is_hooked(self._plan):
            engine = engines.Engine(engines.CHAIN, "auto: regions that are modules and no graphs run as a chain")
        if engine.name == engines.AUTO:
            return self._race(program, leaves, taps, pins)
        if engine.name == engines.SCAN and boundaries >= 2:
            self._checks_of(program).raise_if_coupled(engines.SCAN)
            return self._scan(program, leaves, taps, engine, pins)
        out = self._run(program, leaves, marked=engine.name == engines.CHAIN, taps=taps, pins=pins)
        self._engine = engine
        return out

    def _pins(self, program: Program, leaves: list[Any]) -> Tensor | None:
        """Latents that were solved for; ``None`` where regions run one after another."""
        if self._forward == SEQUENTIAL:
            self._solve_record = Solve(SEQUENTIAL, "asked for")
            return None
        pins, self._solve_record = self._solver(self, program, leaves, self._forward)
        return pins

    def _race(self, program: Program, leaves: list[Any], taps: bool, pins: Tensor | None) -> Any:
        """Run the engine that ``auto`` takes, or whose turn it is while engines are being timed."""
        # under a dispatch mode nothing is compiled, so the scan cannot run
        coupled = self._checks_of(program).coupled is not None or dispatch_mode_active()
        turn = self._racer.turn(self, leaves, coupled=coupled)
        try:
            if turn.name == engines.SCAN:
                out = self._scan(program, leaves, taps, turn.engine, pins)
            else:
                out = self._run(program, leaves, marked=turn.name == engines.CHAIN, taps=taps, pins=pins)
                self._engine = turn.engine
        except EngineError as error:
            if turn.name != engines.SCAN or not turn.refused(error.found):
                raise
            return self._race(program, leaves, taps, pins)
        flat, hs, ms = out
        turn.forward_ended([*flat, *hs, *pytree.tree_leaves(ms)], lambda: [*self.parameters(), *leaves])
        return out

    def _scan(
        self, program: Program, leaves: list[Any], taps: bool, engine: engines.Engine, pins: Tensor | None
    ) -> Any:
        out, self._engine = scan(self, program, leaves, taps=taps, pins=pins, why=engine.why)
        return out

    def _run(
        self,
        program: Program | HookedProgram,
        leaves: list[Any],
        *,
        marked: bool,
        taps: bool,
        canvas: Tensor | None = None,
        pins: Tensor | None = None,
        alter: Callable[[int, Tensor], Tensor] | None = None,
    ) -> tuple[list[Any], tuple[Any, ...], tuple[Any, ...]]:
        if isinstance(program, HookedProgram):
            return program.run(self, leaves, marked=marked, taps=taps, canvas=canvas)
        if isinstance(self.interface, LocalCredit):
            return self.interface.run(self, program, leaves, taps=taps, canvas=canvas)
        return running.run(self, program, leaves, marked=marked, taps=taps, canvas=canvas, pins=pins, alter=alter)

    def canvas_function(self, program: Program, leaves: list[Any]) -> Callable[[Tensor], list[Any]]:
        """The model's flat outputs as a function of the canvas alone, for probes."""
        return lambda canvas: self._run(program, leaves, marked=False, taps=False, canvas=canvas)[0]

    def leaves_function(self, program: Program) -> Callable[[list[Any]], list[Any]]:
        """The model's flat outputs as a function of its input leaves, for probes."""
        return lambda leaves: self._run(program, leaves, marked=False, taps=False)[0]

    def build(self, inputs: Inputs) -> None:
        """Capture the model and make the interfaces. ``transform`` calls it where it has inputs, else the first call.

        Args:
            inputs: One call's inputs.
        """
        from .build import build  # build knows bounded, so bounded cannot know it at import

        build(self, inputs)

    def _needs_gradient(self, leaves: list[Any]) -> bool:
        return any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in leaves) or any(
            p.requires_grad for p in self.parameters()
        )

    # -- capture on demand

    def _key(self, inputs: Inputs) -> Any:
        return (self.training, call_signature(inputs.args), call_signature(inputs.kwargs))

    def _program(self, inputs: Inputs) -> Program:
        key, modes = self._key(inputs), modes_of(self.source)
        if self._plan is None or key not in self._programs or self._checks[key].modes != modes:
            with self._gate.alone():
                if self._plan is None:
                    self.build(inputs)
                raise_if_stale(self)
                if (key, modes) not in self._known:
                    self._remember(inputs, *self._build_program(inputs))
                self._programs[key], self._checks[key] = self._known[key, modes]
        else:
            raise_if_stale(self)
        self._checks[key](inputs)
        return self._programs[key]

    def _remember(self, inputs: Inputs, program: Program, check: ShapeCheck) -> None:
        key, check.modes = self._key(inputs), modes_of(self.source)
        self._programs[key], self._checks[key] = self._known[key, check.modes] = program, check
        self._seen = self._seen or fingerprint(self)

    def _build_program(self, inputs: Inputs) -> tuple[Program, ShapeCheck]:
        from .build import build_program

        try:
            return build_program(self, inputs)
        except PlanError as error:
            ranks = [leaf.dim() for leaf in inputs.leaves if isinstance(leaf, Tensor)]
            alike = [check for check in self._checks.values() if len(check.ranks) == len(ranks)]
            if not alike or ranks in [check.ranks for check in alike]:
                raise
            raise ShapeNotCapturedError(
                f"inputs {describe_inputs(inputs)}, under which the model has other values at its boundaries",
                expected=f"inputs with as many axes as those captured: {' or '.join(dict.fromkeys(map(str, alike)))}",
                do="give such inputs, or transform again with example inputs of this shape",
            ) from error

    def _checks_of(self, program: Program) -> ShapeCheck:
        return next(self._checks[key] for key, known in self._programs.items() if known is program)

    # -- copies, moves, state

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _blank, (), self.__getstate__()

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        for derived in ("_programs", "_checks", "_known", "_compiled", "_racer", "_solver", "_chain", "_seen", "_gate"):
            state.pop(derived)
        state["_solve_record"] = None
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._seen = None
        self._gate = Gate()
        self._forget()
        self.__class__ = taking(BoundedModule, self.source)  # pyright: ignore[reportAttributeAccessIssue]

    def _apply(self, fn: Any, recurse: bool = True) -> BoundedModule:
        before = placement(self)
        super()._apply(fn, recurse)
        if placement(self) != before:
            self._forget()  # devices and dtypes are baked into captured code
        return self


def _not_captured(training: bool) -> NotBuiltError:
    mode = "training" if training else "evaluation"
    return NotBuiltError(
        f"an export of a bounded model that has not been called in {mode} mode with inputs of this kind",
        expected="one call before, which captures the model in this mode",
        do=f"call bounded(x) once after bounded.{'train' if training else 'eval'}(), then export",
    )


def _blank() -> BoundedModule:
    """What a copy and a pickle begin with; its state says what it takes."""
    return BoundedModule.__new__(BoundedModule)
