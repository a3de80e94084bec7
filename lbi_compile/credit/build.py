"""From an analysed model to its local credit rule: what ``transform(credit=...)`` does differently."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from torch import nn

from ..errors import CaptureError, InterfaceError, LBIError, OptionError, PlanError
from ..passes.insert import Program
from ..plan import EXACT, Decision, Plan
from .base import Credit, LocalCredit
from .site import find_site

if TYPE_CHECKING:
    from ..analysis import Analysis
    from ..capture import Capture
    from ..options import Options


def refuse_exact_options(rule: Credit, **given: str) -> None:
    """Refuse options of exact credit beside a local rule.

    Raises:
        OptionError: One is given.
    """
    for name, value in given.items():
        if value != "auto":
            raise OptionError(
                f"{name}={value!r} with credit={rule.name!r}",
                expected=f"no {name}: the rule itself says what crosses and how it is taught",
                do=f'leave {name} out, or use credit="exact"',
            )


def refuse_local_plan(regions: object) -> None:
    """Refuse the plan of a local rule where exact credit is asked for: nothing that carries a gradient crosses in it.

    Raises:
        PlanError: It is one.
    """
    if isinstance(regions, Plan) and regions.credit != EXACT:
        raise PlanError(
            f"a plan made for credit={regions.credit!r} with credit='exact'",
            expected="a plan made for exact credit, which says what interface crosses",
            do=f"pass credit={regions.credit!r}, or make the plan anew without credit",
        )


def no_graph(rule: Credit, refused: CaptureError | None) -> CaptureError:
    """The error of a local rule on a model that only its own forward can run."""
    return CaptureError(
        f"credit={rule.name!r} on a model that cannot be captured" + (f" ({refused.found})" if refused else ""),
        expected="a model that torch.export captures: regions are run one by one",
        do='use credit="exact", which works on opaque blocks, or mend what the capture refuses',
    )


def analyse_local(model: nn.Module, found: Capture, options: Options) -> Analysis:
    """Analyse a model for a local rule: the same cut, one value at each boundary, and no interface of exact credit.

    Args:
        model: The model.
        found: Its capture.
        options: What was asked for.

    Raises:
        InterfaceError: Only boundaries of several lanes can be found.
    """
    from ..analysis import analyse  # it reads the options of bounded, which reads this package

    assert options.credit is not None
    if isinstance(options.regions, Plan):
        given = _without_interface(options.regions, options.credit)
        return analyse(model, found, dataclasses.replace(options, regions=given))
    analysis = analyse(model, found, dataclasses.replace(options, interface="pooled"))
    if any(len(points) > 1 for points in analysis.plan.crossings):
        try:
            analysis = analyse(model, found, dataclasses.replace(options, interface="zero"))
        except LBIError as error:
            raise InterfaceError(
                f"boundaries of several lanes under credit={options.credit.name!r}",
                expected="one value at every boundary: a local rule puts one latent there",
                do='ask for fewer regions, name boundaries where one value crosses, or use credit="exact"',
            ) from error
    analysis.plan = _without_interface(analysis.plan, options.credit)
    return analysis


def _without_interface(made: Plan, rule: Credit) -> Plan:
    """The same cut for a local rule, with nothing of exact credit at its boundaries."""
    regions = tuple(
        dataclasses.replace(region, finish=None, own_finish=False, forward_bytes=0, backward_bytes=0)
        for region in made.regions
    )
    kind = "none" if len(regions) == 1 else "zero"
    why = [decision for decision in made.why if decision.about not in ("interface", "cell", "readout", "credit")]
    why.append(Decision("credit", rule.name, "asked for: every region has an objective of its own"))
    return dataclasses.replace(
        made,
        regions=regions,
        interface=kind,
        cell=None,
        chunk=None,
        readout="last",
        credit=rule.name,
        why=tuple(why),
    )


def build_local(model: nn.Module, analysis: Analysis, program: Program, options: Options) -> LocalCredit:
    """Make the modules of the rule.

    Args:
        model: The model.
        analysis: What ``analyse_local`` gave.
        program: The model in pieces.
        options: What was asked for.
    """
    assert options.credit is not None
    layout = analysis.layout(analysis.canvas) if analysis.canvas.meta["val"].dim() > 1 else None
    site = find_site(
        program,
        model,
        analysis.capture.inputs.leaves,
        layout,
        r=analysis.plan.r,
        seed=options.seed,
        credit=options.credit.name,
    )
    return options.credit.build(site)
