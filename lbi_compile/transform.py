"""``transform`` and ``plan``: run the passes over a captured model and put the result together."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate

from . import engines
from .analysis import Analysis, analyse, locate
from .bounded import BoundedModule
from .calls import ShapeCheck
from .capture import Capture, Inputs, as_inputs, capture, default_inputs, fresh, raise_if_unfit, undisturbed
from .credit import Credit, as_credit
from .credit.build import analyse_local, build_local, no_graph, refuse_exact_options, refuse_local_plan
from .errors import (
    BatchCouplingError,
    CaptureError,
    InterfaceError,
    LatentWidthError,
    LBIError,
    NotAModuleError,
    NotBuiltError,
    OptionError,
    RegionsError,
)
from .forward import check_forward, refuse_forward
from .hooked import building
from .hooked.plan import is_hooked
from .interfaces import CELLS, KINDS, Interface, build_interface, build_lanes
from .lane_forms import lane_forms
from .naming import batch_symbol
from .newton import SEQUENTIAL
from .options import Options
from .passes.axes import coupling_error
from .passes.insert import Owner, Program, insert
from .passes.jacobian_budget import JACOBIAN_BYTES, check_budget
from .passes.validate import FINISHES, refuse_leak
from .plan import Plan
from .region import Region, owners_of


def transform(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    regions: int | Sequence[str] | Plan = 8,
    r: int = 16,
    interface: str = "auto",
    cell: str = "auto",
    readout: str = "auto",
    backward: str = "auto",
    allow_leak: bool = False,
    credit: str | Credit = "exact",
    batch_regions: bool = True,
    jacobian_bytes: int = JACOBIAN_BYTES,
    forward: str = "sequential",
    tol: float | None = None,
    max_iters: int | None = None,
    seed: int = 0,
    finish: str = "auto",
) -> BoundedModule:
    """Cut ``model`` into regions that exchange only small latents, and return it as a trainable module.

    The model itself is not changed. The bounded model shares its parameters, by identity and by name.

    Args:
        model: Any module that ``torch.export`` can capture.
        example_inputs: A tensor, a tuple of arguments, a dict of keyword arguments, or ``(arguments, keywords)``.
            Without them the model's ``example_input_array`` or ``dummy_inputs`` is used, else its first call.
        regions: Number of regions ``K``; or paths of the modules that start the second and every later region; or a
            plan of the same model.
        r: Latent width ``R``.
        interface: ``"auto"``, ``"pooled"``, ``"chunked"``, ``"token"``, ``"token+chunked"``, ``"identity"``, ``"zero"``
            or ``"self"``.
        cell: ``"auto"``, ``"gru"`` or ``"linear"``, for the latent per position of ``token`` and ``token+chunked``.
        readout: ``"auto"``, ``"last"`` or ``"sum"``.
        backward: ``"auto"``, ``"autograd"``, ``"chain"`` or ``"scan"``. All give the same gradients.
        allow_leak: Accept a latent that lets outputs see later positions. Only to reproduce published results.
        credit: ``"exact"``; or a rule that teaches every region by a loss of its own, ``"sid"`` or ``"hbll"``, or with
            options as ``SID(alpha=0.3)``. What crosses is then the rule's: ``interface``, ``cell``, ``readout`` and
            ``backward`` stay ``"auto"``, and the loss is ``bounded.local_loss(x, target=y)``.
        batch_regions: In the compiled graphs of the scan engine, run what regions do alike as one operator with a
            leading axis over regions. Gradients are the same up to rounding; without it the forward is also the same
            bit for bit as that of the other engines. Costs the memory of a copy of the parameters of alike regions.
        jacobian_bytes: Most memory for the interface Jacobians of the scan engine and for the values on the way to
            them. A Jacobian is r x r numbers for every index, so long sequences with the token interface's GRU cell
            need much: beyond this, one part of the indices is done after another, or a few rows at a time where
            indices cannot be taken apart. ``bounded.engine`` tells.
        forward: ``"sequential"``: region after region. ``"parallel"``: the latents of all boundaries are solved for by
            Newton's method and a prefix scan, evaluating all regions side by side; ``"quasi-newton"`` takes the
            diagonals of the Jacobians, ``"jacobi"`` none. Same output and gradients up to ``tol``; ``bounded.solve``
            tells how it went. Where it does not converge the regions are run one after another, and that is told.
        tol: Residual at which a parallel forward has converged, as in ``bounded.solve.residual``; by default 1e-4 for
            latents of float32 and 1e-10 for float64.
        max_iters: Most iterations of a parallel forward; by default K - 1, after which it is exact.
        seed: Seed of the interface parameters; the global random state is left alone.
        finish: Where a latent per position enters a region, and where the region is encoded into it. ``"auto"``: before
            all that follows the region's last op that mixes positions, such as the MLP of a transformer's block; at
            its end, by a small MLP of the interface, where nothing follows. ``"own"``: at the end always, so that the
            latent hears the region's whole result. Either way only cells stand between latents.

    Returns:
        The bounded model.

    Raises:
        LBIError: One subclass per condition, each saying what was found, what was expected and what to do.

    Example:
        >>> bounded = lbi_compile.transform(model, x, regions=4, r=16)
        >>> criterion(bounded(x), y).backward()
    """
    options = _options(
        model, regions, r, interface, cell, readout, backward, allow_leak, seed, credit, batch_regions, jacobian_bytes,
        finish,
    )  # fmt: skip
    options = _with_forward(options, forward, tol, max_iters)
    bounded = BoundedModule(model, options)
    if example_inputs is not None or default_inputs(model) is not None:
        bounded.build(as_inputs(model, example_inputs))
    return bounded


def plan(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    regions: int | Sequence[str] | Plan = 8,
    r: int = 16,
    interface: str = "auto",
    cell: str = "auto",
    readout: str = "auto",
    credit: str | Credit = "exact",
    finish: str = "auto",
) -> Plan:
    """Say how ``transform`` would cut ``model``; nothing is inserted.

    Args:
        model: As for ``transform``, like all other arguments.
        example_inputs: Needed where the model brings none.

    Example:
        >>> print(lbi_compile.plan(model, x, regions=8).boundaries)
    """
    options = _options(model, regions, r, interface, cell, readout, "auto", False, 0, credit, finish=finish)
    inputs = as_inputs(model, example_inputs)
    try:
        found, refused = None if is_hooked(options.regions) else capture(model, inputs), None
    except CaptureError as error:
        found, refused = None, error
    if found is None and options.credit is not None:
        raise no_graph(options.credit, refused)
    if found is None:
        return building.analyse(model, fresh(inputs), options, refused)[0]
    with own_devices():
        return _analyse(model, found, options).plan


def _options(
    model: nn.Module,
    regions: int | Sequence[str] | Plan,
    r: int,
    interface: str,
    cell: str,
    readout: str,
    backward: str,
    allow_leak: bool,
    seed: int,
    credit: str | Credit = "exact",
    batch_regions: bool = True,
    jacobian_bytes: int = JACOBIAN_BYTES,
    finish: str = "auto",
) -> Options:
    if not isinstance(model, nn.Module):
        raise NotAModuleError(
            f"a model of type {type(model).__name__}",
            expected="a torch.nn.Module",
            do="wrap the function in a module whose forward calls it",
        )
    if isinstance(model, BoundedModule):
        raise NotAModuleError(
            "a model that is already bounded", expected="the original model", do="transform bounded.source instead"
        )
    if "lbi" in model._modules:
        raise OptionError(
            "a model with a submodule named 'lbi'",
            expected="that name free: interface parameters live under it",
            do="rename the submodule",
        )
    if isinstance(regions, bool) or not isinstance(regions, (int, Plan)):
        names = tuple(regions) if isinstance(regions, (list, tuple)) else None
        if names is None or not all(isinstance(name, str) for name in names):
            raise RegionsError(
                f"regions={regions!r}",
                expected="a number, a list of module paths, or a Plan",
                do="pass for example regions=8",
            )
        regions = names
    elif isinstance(regions, int) and regions < 1:
        raise RegionsError(f"regions={regions}", expected="a positive number", do="pass regions=1 or more")
    if isinstance(r, bool) or not isinstance(r, int) or r < 1:
        raise LatentWidthError(f"r={r!r}", expected="a positive whole number", do="pass r=1 or more, for example r=16")
    if interface != "auto" and interface not in KINDS:
        raise InterfaceError(f"interface={interface!r}", expected=f"auto or one of {', '.join(KINDS)}", do="name one")
    if cell != "auto" and cell not in CELLS:
        raise OptionError(f"cell={cell!r}", expected=f"auto or one of {', '.join(CELLS)}", do="name one")
    if finish not in FINISHES:
        raise OptionError(f"finish={finish!r}", expected=f"one of {', '.join(FINISHES)}", do="name one")
    rule = as_credit(credit)
    if rule is None:
        refuse_local_plan(regions)
    else:
        refuse_exact_options(rule, interface=interface, cell=cell, readout=readout, finish=finish, backward=backward)
    engine = engines.check_request(backward)
    budget = check_budget(jacobian_bytes)
    return Options(
        regions, r, interface, cell, readout, engine, allow_leak, seed, rule, bool(batch_regions), budget, finish=finish
    )


def _with_forward(options: Options, forward: str, tol: float | None, max_iters: int | None) -> Options:
    """The options with how the forward runs; where nothing is asked for, a plan says it."""
    given = options.regions
    if isinstance(given, Plan) and forward == SEQUENTIAL:
        forward, tol, max_iters = given.forward, tol or given.tol, max_iters or given.max_iters
    check_forward(forward, tol, max_iters)
    if options.credit is not None and forward != SEQUENTIAL:
        raise OptionError(
            f"forward={forward!r} with credit={options.credit.name!r}",
            expected="a sequential forward: the rule itself says what regions read",
            do='leave forward out, or use credit="exact"',
        )
    return dataclasses.replace(options, forward=forward, tol=tol, max_iters=max_iters)


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


def _analyse(model: nn.Module, found: Capture, options: Options) -> Analysis:
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
    analysis = _analyse(model, found, options)
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
