"""``transform`` and ``plan``: run the passes over a captured model and put the result together."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from torch import nn

from . import engines
from .bounded import BoundedModule
from .build import analyse_as_asked, own_devices
from .capture import as_inputs, capture, default_inputs, fresh
from .credit import Credit, as_credit
from .credit.build import no_graph, refuse_exact_options, refuse_local_plan
from .errors import (
    CaptureError,
    InterfaceError,
    LatentWidthError,
    NotAModuleError,
    OptionError,
    RegionsError,
)
from .forward import check_forward
from .hooked import building
from .hooked.plan import is_hooked
from .interfaces import CELLS, KINDS
from .newton import SEQUENTIAL
from .options import Options
from .passes.jacobian_budget import JACOBIAN_BYTES, check_budget
from .passes.validate import FINISHES
from .plan import Plan


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
        return analyse_as_asked(model, found, options).plan


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
