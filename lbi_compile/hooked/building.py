"""The last rung of capture: a model that no graph can hold is cut between child modules, with opaque regions.

``transform`` comes here where ``torch.export`` refuses a model. Its own forward then runs, with a word in every call of
the children of one list (``hooked.run``); which list that is, and where nothing but the hidden state passes
from one child to the next, is measured by running it (``hooked.blocks``).

What is measured is measured on the example inputs, and by gradients: a value without one, and the choice of branches,
may depend on earlier regions however the model likes.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from .. import engines
from .._torch import pytree
from ..bounded import BoundedModule
from ..calls import ShapeCheck
from ..capture import Inputs, fresh
from ..errors import (
    CaptureError,
    EngineError,
    ExampleInputsError,
    InterfaceError,
    NoSeparatorError,
    PlanError,
    ReadoutError,
    RegionsError,
    TooManyRegionsError,
)
from ..interfaces import Interface, ZeroInterface, build_interface, interface_class, tokens_per_chunk
from ..naming import class_name
from ..options import Options
from ..passes.layouts import Layout
from ..passes.validate import refuse_leak, settle_finish, settle_interface, settle_readout
from ..plan import PassRecord, Plan
from ..region import Region
from ..report import Check
from .blocks import Blocks, NoBlocks, cut, dependence, find_blocks, free_cuts
from .layout import canvas_layout
from .plan import is_hooked, reasons, write_plan
from .probe import positions, sees_later
from .run import HookedProgram
from .state import in_mode, probing


class OpaqueRegion(Region):
    """Region ``k`` of a model that runs as it is: a name for some of its modules, which only its forward can call."""

    def __init__(self, k: int, interface: Interface, paths: tuple[str, ...]) -> None:
        super().__init__(k, interface)
        self.paths = paths

    def forward(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse.

        Raises:
            CaptureError: Always.
        """
        raise CaptureError(
            f"a call of region {self.k} by itself, which is opaque ({', '.join(self.paths)})",
            expected="a call of the whole bounded model: only the model's own forward knows how to run its blocks",
            do="use bounded.forward_regions(...) to see what regions give",
        )

    def extra_repr(self) -> str:
        return f"k={self.k}, {', '.join(self.paths)}"


class HookedCheck(ShapeCheck):
    """Accepts every call: the model's own forward decides. Refuses the scan, which opaque regions cannot have.

    Args:
        plan: The plan.
        latents: Latents that cross.
    """

    def __init__(self, plan: Plan, latents: int) -> None:
        super().__init__([], None)
        self._plan, self._latents = plan, latents

    def raise_if_coupled(self, engine: str) -> None:
        """Refuse the scan where there is anything to scan.

        Raises:
            EngineError: There is.
        """
        if engine == engines.SCAN and self._latents > 1:
            raise EngineError(
                f"backward='scan' for regions that are opaque modules ({capture_reason(self._plan)})",
                expected="regions captured as a graph, from whose backward Jacobians can be sliced",
                do='use backward="chain", which is exact here too, or rewrite what the exporter names',
            )

    def __call__(self, inputs: Inputs) -> None:
        pass


@dataclass(frozen=True, slots=True)
class Measured:
    """What runs of the model on one set of inputs show.

    Attributes:
        canvas: The input of the first block.
        layout: Its layout.
        positions: The output has the canvas's positions.
        causal: No output position sees later ones; ``None`` without positions and where it cannot be measured.
    """

    canvas: Tensor
    layout: Layout
    positions: bool
    causal: bool | None


def build(bounded: BoundedModule, inputs: Inputs, refused: CaptureError | None) -> None:
    """Cut a model between child modules; the counterpart of what ``transform`` does with a graph. All or nothing.

    Args:
        bounded: The bounded model.
        inputs: One call's inputs.
        refused: Why it cannot be captured; ``None`` where the plan asked for is of this kind.

    Raises:
        CaptureError: ``refused`` with a hint, where the model has no blocks to cut between.
        LBIError: Other conditions as for a captured model.
    """
    model, options, inputs = bounded.source, bounded._options, fresh(inputs)
    with in_mode(model, bounded.training):
        made, measured = analyse(model, inputs, options, refused)
        interface = _interface(made, measured, options.seed)
        check = HookedCheck(made, len(interface.latents))
        check.raise_if_coupled(options.backward)
        program = HookedProgram.of(made, _spec(inputs))
        _raise_if_leaking(bounded, program, interface, inputs, measured)
    regions = tuple(OpaqueRegion(region.index, interface, region.part.modules) for region in made.regions)
    bounded._plan, bounded._regions = made, regions
    bounded._modules["lbi"] = interface
    bounded._remember(inputs, program, check)  # pyright: ignore[reportArgumentType]


def build_program(bounded: BoundedModule, inputs: Inputs) -> tuple[HookedProgram, HookedCheck]:
    """The program for another mode or kind of call of a model that is cut between child modules."""
    check, inputs = HookedCheck(bounded.plan, bounded.boundaries), fresh(inputs)
    check.raise_if_coupled(bounded.backward)
    program = HookedProgram.of(bounded.plan, _spec(inputs))
    if bounded.plan.causal is None and len(bounded.plan.canvas.shape) > 2:
        # the interface was settled on outputs without positions; with these inputs they may have some
        with in_mode(bounded.source, bounded.training):
            measured = _measure(bounded.source, inputs, program.children)
            _raise_if_leaking(bounded, program, bounded.interface, inputs, measured)
    return program, check


def analyse(model: nn.Module, inputs: Inputs, options: Options, refused: CaptureError | None) -> tuple[Plan, Measured]:
    """Find the blocks, settle interface and readout, and write the plan.

    Args:
        model: The model, in the mode to look at.
        inputs: One call's inputs.
        options: What was asked for.
        refused: Why the model cannot be captured; ``None`` where the plan asked for is of this kind.

    Returns:
        The plan, and what its canvas is on these inputs.
    """
    if isinstance(options.regions, Plan):
        program = _of_plan(model, inputs, options.regions, refused)
        return options.regions, _measure(model, inputs, program.children)
    assert refused is not None
    if options.interface in ("token", "token+chunked"):
        raise InterfaceError(
            f"interface={options.interface!r} for a model that cannot be captured as a graph ({refused.found})",
            expected="an interface that enters where a region starts: where the region's finish begins is not known",
            do='take interface="pooled", "chunked" or "auto"',
        ) from refused
    clock = [time.perf_counter()]
    blocks = _blocks(model, inputs, options, refused)
    starts = _starts(blocks, options.regions)
    clock.append(time.perf_counter())
    measured = _measure(model, inputs, blocks.children)
    length = measured.layout.fold(measured.canvas).shape[1] if measured.layout.positions else 0
    clock.append(time.perf_counter())
    kind, _, why = settle_interface(
        options.interface,
        options.cell,
        regions=len(starts),
        rank=min(measured.canvas.dim(), 3),
        # the form of "self" that stands beside the token interface needs a finish
        positions=measured.positions and options.interface != "self",
        causal=measured.causal,
        residual=False,
    )
    settle_finish(options.finish, interface=kind, splits=False)
    if measured.positions and length == 1 and kind in ("pooled", "self") and not options.allow_leak:
        raise ExampleInputsError(
            f"inputs with one position for interface={kind!r} on outputs with positions",
            expected="at least two positions, to measure whether the model's outputs see later ones",
            do="give longer example inputs",
        )
    readout, readout_why = settle_readout(
        options.readout,
        interface=kind,
        allowed=interface_class(kind).readouts_for(options.r),
        regions=len(starts),
        residual=False,
    )
    if readout == "sum" and not blocks.handed:
        raise ReadoutError(
            f"readout='sum' with interface={kind!r} on blocks between which the model changes the hidden state",
            expected="blocks that are given the very tensor the block before gave, so that a sum can stand for it",
            do='take readout="last", with interface="pooled" or "chunked"',
        )
    seen = {None: "not known", True: "causal", False: "mixed"}[measured.causal]
    made = write_plan(
        model,
        inputs,
        blocks,
        starts,
        measured.layout,
        interface=kind,
        readout=readout,
        r=options.r,
        chunk=tokens_per_chunk(length, options.r) if kind == "chunked" else None,
        causal=measured.causal,
        why=(*reasons(blocks, starts, isinstance(options.regions, tuple), refused), *why, readout_why),
        passes=(
            PassRecord("blocks", clock[1] - clock[0], f"{len(blocks.children)}, with {len(blocks.cuts)} places to cut"),
            PassRecord("positions", clock[2] - clock[1], seen if measured.positions else "no position axis"),
        ),
    )
    return made, measured


def too_late(refused: CaptureError) -> CaptureError:
    """The same refusal, for a model that was cut as a graph in another mode."""
    hint = "or transform the model in this mode: it is then cut between child modules"
    return type(refused)(refused.found, expected=refused.expected, do=f"{refused.do}; {hint}")


def capture_reason(plan: Plan) -> str:
    """Why a model was not captured as a graph."""
    return next((decision.why for decision in plan.why if decision.about == "capture"), "it was not captured")


def checks(twin: BoundedModule, inputs: Inputs) -> tuple[bool | None, tuple[tuple[str, int], ...], tuple[Check, ...]]:
    """What ``verify`` looks at beside gradients.

    Args:
        twin: The bounded model, in float64.
        inputs: One call's inputs, in float64.

    Returns:
        Whether later positions leak, how many values cross each boundary, and the checks.
    """
    plan, model, inputs = twin.plan, twin.source, fresh(inputs)
    program = HookedProgram.of(plan, _spec(inputs))
    with in_mode(model, twin.training):
        measured = _measure(model, inputs, program.children)
        later = _sees_later(twin, program, twin.interface, inputs, measured) if measured.positions else None
        depend = dependence(model, inputs, [model.get_submodule(path) for path in program.children])
    leak = None if measured.causal is None or later is None else measured.causal and later
    shows = {None: "not known", True: "causal", False: "mixed"}
    free = free_cuts(len(program.children), list(accumulate(depend.places, max)), depend.reads)
    starts = [program.regions.index(k) for k in range(1, len(plan.regions))]
    lanes = tuple((point.name, 1 if at in free else 2) for point, at in zip(plan.boundaries, starts, strict=True))
    past = [name for name, count in lanes if count > 1]
    return (
        leak,
        lanes,
        (
            Check(
                "future leak",
                None if leak is None else not leak,
                f"model {shows[measured.causal]}, bounded model {shows[None if later is None else not later]}, by value"
                if measured.positions
                else "the output has no position axis",
            ),
            Check("batch independence", None, "regions are opaque modules; this engine needs none"),
            Check(
                "separators",
                not past,
                f"more than the hidden state crosses at {', '.join(past)}"
                if past
                else "nothing but the hidden state crosses, by gradients on these inputs",
            ),
            Check("capture", None, f"fell back to child modules: {capture_reason(plan)}"),
        ),
    )


def _spec(inputs: Inputs) -> Any:
    return pytree.tree_structure((inputs.args, inputs.kwargs))


def _blocks(model: nn.Module, inputs: Inputs, options: Options, refused: CaptureError) -> Blocks:
    named = options.regions if isinstance(options.regions, tuple) else ()
    try:
        return find_blocks(model, inputs, named)
    except NoBlocks as error:
        missing = error
    if named:
        try:
            known = find_blocks(model, inputs)
        except NoBlocks as error:
            missing = error
        else:
            raise RegionsError(
                f"regions names {', '.join(named)}: {missing}",
                expected=f"children of one list, each the start of a region: {', '.join(known.children[1:])}",
                do="name some of these: the model cannot be captured as a graph, so it is cut between child modules",
            )
    raise type(refused)(
        refused.found,
        expected=refused.expected,
        do=f"{refused.do}; or keep its blocks in one nn.Sequential or nn.ModuleList and pass one hidden state from each"
        f" to the next: it is then cut between them (now: {missing})",
    ) from refused


def _starts(blocks: Blocks, regions: int | Sequence[str] | Plan) -> list[int]:
    """The blocks that start regions, the first included."""
    assert not isinstance(regions, Plan)
    places = ", ".join(blocks.children[at] for at in blocks.cuts) or "none"
    if isinstance(regions, int):
        if regions - 1 > len(blocks.cuts):
            raise TooManyRegionsError(
                f"{regions} regions asked for, {len(blocks.cuts)} blocks to start one at: {places}",
                expected=f"at most {len(blocks.cuts) + 1} regions",
                do=f"pass regions={len(blocks.cuts) + 1} or fewer: the model cannot be captured as a graph, so it is"
                " cut between child modules",
            )
        return [0, *cut(blocks.weights, blocks.cuts, regions)]
    starts = sorted(blocks.children.index(name) for name in regions)
    if 0 in starts or len(set(starts)) < len(starts):
        twice = blocks.children[next((a for a in starts if starts.count(a) > 1), 0)]
        raise RegionsError(
            f"regions names {twice}, which {'is named twice' if starts.count(0) != 1 else 'starts the first region'}",
            expected="the modules that start the second and every later region, each once",
            do=f"name some of {places}",
        )
    blocked = [blocks.children[at] for at in starts if at not in blocks.cuts]
    if blocked:
        raise NoSeparatorError(
            f"a boundary asked for at {', '.join(blocked)}, past which a later block reads an earlier value",
            expected=f"blocks to which nothing but the hidden state passes: {places}",
            do="name some of these, or give a number of regions",
        )
    return [0, *starts]


def _of_plan(model: nn.Module, inputs: Inputs, plan: Plan, refused: CaptureError | None) -> HookedProgram:
    """The program of a plan that was given."""
    if plan.model != class_name(model):
        raise PlanError(f"a plan of {plan.model}", expected=f"a plan of {class_name(model)}", do="make one with plan()")
    if not is_hooked(plan):
        raise PlanError(
            f"a plan of a captured graph for a model that cannot be captured ({refused.found if refused else '?'})",
            expected="a plan that is cut between child modules",
            do="make one with plan() in the mode and with inputs of the kind to be used",
        )
    program = HookedProgram.of(plan, _spec(inputs))
    known = {name for name, _ in model.named_modules(remove_duplicate=False)}
    missing = [path for path in program.children if path not in known]
    if missing:
        raise PlanError(
            f"a plan with blocks the model does not have: {', '.join(missing)}",
            expected="the model the plan was made for",
            do="make a new plan for this model",
        )
    return program


def _interface(made: Plan, measured: Measured, seed: int) -> Interface:
    # what is not pooled over positions needs no layout, and keeps the memory layout of the model
    layout = None if made.interface in ("none", "zero", "identity") else measured.layout
    canvas = measured.canvas if layout is None else layout.fold(measured.canvas)
    built = build_interface(
        "zero" if made.interface == "none" else made.interface,
        regions=len(made.regions),
        width=canvas.shape[-1],
        r=made.r,
        canvas=canvas,
        chunk=made.chunk,
        seed=seed,
    )
    built.layout = layout
    return built


def _measure(model: nn.Module, inputs: Inputs, children: Sequence[str]) -> Measured:
    """Look at the model itself: its canvas, and whether output positions see later ones."""
    whole = HookedProgram(children, [0] * len(children), None, summed=False, spec=_spec(inputs))
    nothing = ZeroInterface(regions=1, r=1)

    def call(leaves: list[Any], canvas: Tensor | None) -> tuple[Any, list[int]]:
        out, run = whole.call(model, nothing, leaves, training=model.training, canvas=canvas)
        return out, run.trace

    with probing(model), torch.no_grad():
        out, run = whole.call(model, nothing, inputs.leaves, training=model.training)
    if run.canvas is None:
        raise CaptureError(
            "example inputs with which no block of the plan runs",
            expected="inputs with which at least one does",
            do="give other example inputs",
        )
    canvas = run.canvas.detach().clone()
    layout = canvas_layout(canvas.shape, inputs, [model.get_submodule(path) for path in children])
    has = positions(out, canvas, layout) is not None
    later = sees_later(model, call, inputs.leaves, canvas, layout) if has else None
    return Measured(canvas, layout, has, None if later is None else not later)


def _sees_later(
    bounded: BoundedModule, program: HookedProgram, interface: Interface, inputs: Inputs, measured: Measured
) -> bool | None:
    def call(leaves: list[Any], other: Tensor | None) -> tuple[Any, list[int]]:
        out, run = program.call(bounded.source, interface, leaves, training=bounded.training, canvas=other)
        return out, run.trace

    return sees_later(bounded.source, call, inputs.leaves, measured.canvas, measured.layout)


def _raise_if_leaking(
    bounded: BoundedModule, program: HookedProgram, interface: Interface, inputs: Inputs, measured: Measured
) -> None:
    if bounded._options.allow_leak or not program.last or not measured.causal:
        return
    if _sees_later(bounded, program, interface, inputs, measured):
        refuse_leak(interface=interface.kind, model="causal", bounded="mixed")
