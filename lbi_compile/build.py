"""Puts a bounded model together: captures, runs the passes, makes interface and program, and checks them."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate

from .analysis import Analysis, analyse, locate
from .bounded import BoundedModule
from .calls import ShapeCheck
from .capture import Capture, Inputs, capture, raise_if_unfit, undisturbed
from .credit.build import analyse_local, build_local, no_graph
from .errors import (
    BatchCouplingError,
    CaptureError,
    LBIError,
    NotBuiltError,
)
from .forward import refuse_forward
from .hooked import building
from .hooked.plan import is_hooked
from .interfaces import Interface, build_interface, build_lanes
from .lane_forms import lane_forms
from .naming import batch_symbol
from .options import Options
from .passes.axes import coupling_error
from .passes.insert import Owner, Program, insert
from .passes.validate import refuse_leak
from .plan import Plan
from .region import Region, owners_of


def build(bounded: BoundedModule, inputs: Inputs) -> None:
    """Capture, analyse, make the interface and the first program, and check them; all or nothing."""
    try:
        with undisturbed(bounded.source):
            _build(bounded, inputs)
    except LBIError:
        raise
    except Exception:
        raise_if_unfit(bounded.source, inputs)
        raise


def analyse_as_asked(model: nn.Module, found: Capture, options: Options) -> Analysis:
    return analyse(model, found, options) if options.credit is None else analyse_local(model, found, options)


def _build(bounded: BoundedModule, inputs: Inputs) -> None:
    options = bounded._options
    try:
        found, refused = None if is_hooked(options.regions) else captured(bounded, inputs), None
    except CaptureError as error:
        found, refused = None, error
    if found is None and options.credit is not None:
        raise no_graph(options.credit, refused)
    if found is None:
        refuse_forward(bounded, hooked=True)
        return building.build(bounded, inputs, refused)
    with own_devices():
        _put_together(bounded, inputs, found)


def _put_together(bounded: BoundedModule, inputs: Inputs, found: Capture) -> None:
    model, options = bounded.source, bounded._options
    analysis = analyse_as_asked(model, found, options)
    solved = {"forward": options.forward, "tol": options.tol, "max_iters": options.max_iters}
    analysis.plan = dataclasses.replace(analysis.plan, **solved)
    program = _insert(bounded, analysis)
    interface = _interface(bounded, analysis, program)
    check = _check(analysis, interface)
    check.raise_if_coupled(options.backward, forward=options.forward)
    owners = owners_of(model, program)
    regions = tuple(Region(k, interface, owners[k]) for k in range(len(analysis.plan.regions)))
    before = (bounded._plan, bounded._regions, bounded._modules["lbi"])
    bounded._plan, bounded._regions = analysis.plan, regions
    bounded._modules["lbi"] = interface
    try:
        refuse_forward(bounded)
        if bounded.credit is not None:
            bounded.credit.prepare(bounded, program)
        _measure_leak(bounded, analysis, program)
    except BaseException:
        bounded._plan, bounded._regions, bounded._modules["lbi"] = before
        raise
    bounded._remember(inputs, program, check)


def build_program(bounded: BoundedModule, inputs: Inputs) -> tuple[Program, ShapeCheck]:
    """Capture the model in its present mode for other inputs, and cut it at the places the plan names."""
    with undisturbed(bounded.source):
        if is_hooked(bounded.plan):
            return building.build_program(bounded, inputs)  # pyright: ignore[reportReturnType]
        try:
            found = captured(bounded, inputs)
        except CaptureError as error:
            raise building.too_late(error) from error
        with own_devices():
            analysis = locate(bounded.source, found, bounded.plan)
            check = _check(analysis, bounded.interface)
            check.raise_if_coupled(bounded.backward, forward=bounded.forward_method)
            program = _insert(bounded, analysis)
            if bounded.credit is not None:
                bounded.credit.prepare(bounded, program)
            if bounded.plan.causal is None:
                # the interface was settled on outputs without positions; with these inputs they may have some
                _measure_leak(bounded, analysis, program)
            return program, check


def own_devices() -> contextlib.AbstractContextManager[Any]:
    """Inside, the caller's default device does not apply: it is for his own tensors, and ours name theirs."""
    return contextlib.nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu")


def captured(bounded: BoundedModule, inputs: Inputs) -> Capture:
    """Capture the bounded model's source in the bounded model's mode."""
    model = bounded.source
    _refuse_sharded(model)
    mode, model.training = model.training, bounded.training
    try:
        found = capture(model, inputs)
    finally:
        model.training = mode
    if bounded._retarget is not None:
        _retarget(found.graph_module, bounded._retarget)
    return found


def _refuse_sharded(model: nn.Module) -> None:
    tensors = sys.modules.get("torch.distributed.tensor")
    if tensors is None:
        return
    sharded = [name for name, p in model.named_parameters() if isinstance(p, tensors.DTensor)]
    if sharded:
        raise NotBuiltError(
            f"a capture of a model with parameters sharded over ranks ({', '.join(sharded[:3])})",
            expected="whole parameters while a model is captured, which is once for each mode and kind of inputs",
            do="call the bounded model once in each mode, train and eval, before fully_shard",
        )


def _retarget(gm: fx.GraphModule, dtype: torch.dtype) -> None:
    """Replace every baked-in cast to float32 by one to ``dtype``."""

    def swap(value: Any) -> Any:
        return dtype if value is torch.float32 else value

    for node in list(gm.graph.nodes):
        if node.target is torch.ops.aten._assert_tensor_metadata.default:
            # it states a dtype of before; `ones` without one stays float32, so neither dtype is right for all
            gm.graph.erase_node(node)
            continue
        node.args = map_aggregate(node.args, swap)
        node.kwargs = map_aggregate(node.kwargs, swap)
    gm.recompile()


def _insert(bounded: BoundedModule, analysis: Analysis) -> Program:
    gm = analysis.capture.graph_module
    model = bounded.source
    constants = _Constants()

    def owner(target: str) -> Owner:
        path, _, name = target.rpartition(".")
        try:
            holder = bounded if not path else model.get_submodule(path)
        except AttributeError:
            holder = None
        if holder is not None and (name in holder._parameters or name in holder._buffers):
            return holder, name
        value: Any = gm
        for part in target.split("."):
            value = getattr(value, part)
        constants.values[target] = value
        return constants.at(target)

    finishes = analysis.finishes if analysis.splits else (None,) * len(analysis.ends)
    return insert(
        gm,
        live=analysis.live,
        cut=analysis.cut,
        finishes=finishes,
        owner=owner,
        out_spec=analysis.capture.out_spec,
    )


class _Constants:
    """Tensors the exporter lifted out of the forward; they belong to the program, not to the model."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}

    def at(self, target: str) -> Owner:
        name = target.replace(".", "_")
        setattr(self, name, self.values[target])
        return self, name


def _interface(bounded: BoundedModule, analysis: Analysis, program: Program) -> Interface:
    made, options = analysis.plan, bounded._options
    leaves = analysis.capture.inputs.leaves
    if options.credit is not None:
        return build_local(bounded.source, analysis, program, options)
    with torch.no_grad(), torch.random.fork_rng():
        values: dict[str, Any] = dict(zip(program.inputs, leaves, strict=True))
        program.prologue.run(values)
        program.stem.run(values)
    canvas = values[program.canvas]
    kind = "zero" if made.interface == "none" else made.interface
    if made.lanes:
        batch = batch_symbol(analysis.capture.graph_module)
        forms, form = lane_forms(analysis.cut, made, analysis.outputs, batch=batch, values=analysis.evaluator.values)
        return build_lanes(
            kind,
            regions=len(made.regions),
            r=made.r,
            lanes=forms,
            canvas=form,
            like=canvas,
            chunk=made.chunk,
            seed=options.seed,
        )
    layout = analysis.layout(analysis.canvas) if canvas.dim() > 1 else None
    folded = canvas if layout is None else layout.fold(canvas)
    built = build_interface(
        kind,
        regions=len(made.regions),
        width=folded.shape[-1],
        r=made.r,
        canvas=folded,
        cell=made.cell,
        chunk=made.chunk,
        own_finish=[region.own_finish for region in made.regions],
        widths=[_width(analysis, finish) or folded.shape[-1] for finish in analysis.finishes],
        scale=1.0 if canvas.is_meta else None,  # numbers on the meta device are none: they are to be loaded
        seed=options.seed,
    )
    if layout is not None:
        built.layout = layout
    return built


def _width(analysis: Analysis, node: fx.Node | None) -> int | None:
    return None if node is None else int(node.meta["val"].shape[analysis.layout(node).width])


def _coupling(analysis: Analysis, interface: Interface) -> BatchCouplingError | None:
    """Why the scan cannot run: per-sample Jacobians do not exist where a region between two latents mixes samples."""
    if interface.parallel:
        return None  # the token interface's Jacobians are those of its cells, which never mix samples
    for k in interface.latents[:-1]:
        verdict = analysis.coupling(k)
        if verdict.kind == "position-wise":
            continue
        if verdict.node is not None:
            return coupling_error(verdict.node)
        return BatchCouplingError(
            f"region {k} mixes samples ({verdict.why})",
            expected="regions in which every sample is computed by itself",
            do='use backward="chain", which needs no independence',
        )
    return None


def _measure_leak(bounded: BoundedModule, analysis: Analysis, program: Program) -> None:
    if bounded._options.allow_leak or len(analysis.ends) == 1:
        return
    if isinstance(bounded._options.regions, Plan) and any(p.is_meta for p in bounded.source.parameters()):
        return  # nothing can be measured without numbers; it was when the plan was made
    model = analysis.dependence()
    if model is not None:
        leaves = analysis.capture.inputs.leaves
        measured = analysis.probe_bounded(
            bounded.canvas_function(program, leaves), same_draws(bounded.leaves_function(program))
        )
        refuse_leak(interface=analysis.plan.interface, model=model, bounded=measured)


def same_draws(run: Callable[[list[Any]], list[Any]]) -> Callable[[list[Any]], list[Any]]:
    """The same function, drawing the same random numbers in every run."""
    state = torch.get_rng_state()

    def drawn(leaves: list[Any]) -> list[Any]:
        torch.set_rng_state(state)
        return run(leaves)

    return drawn


def _check(analysis: Analysis, interface: Interface) -> ShapeCheck:
    wanted: list[tuple[str, tuple[int | str, ...]] | None] = []
    names: dict[str, str] = {}
    for node in analysis.capture.graph_module.graph.find_nodes(op="placeholder"):
        value = node.meta.get("val")
        if not isinstance(value, Tensor):
            wanted.append(None)
            continue
        for size, name in zip(value.shape, ("B", "T"), strict=False):
            if isinstance(size, torch.SymInt) and str(size) not in names:
                taken = sum(known.startswith(name) for known in names.values())
                names[str(size)] = f"{name}{taken + 1}" if taken else name
        sizes = tuple(size if isinstance(size, int) else names.get(str(size), str(size)) for size in value.shape)
        wanted.append((str(node.target), sizes))
    return ShapeCheck(wanted, _coupling(analysis, interface))
