"""``verify``: measure, on the user's own model and inputs, that the gradients are exact and nothing leaks."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import networkx as nx
import torch
from torch import Tensor

from . import ablation, engines
from ._torch import pytree
from .analysis import Analysis, locate
from .auto import narrow
from .bounded import BoundedModule
from .build import captured, same_draws
from .capture import Inputs, as_inputs, undisturbed
from .credit.check import local_checks
from .diagnostics import JacobianNorms, jacobian_norms
from .forward_check import forward_check, solved_to
from .hooked.building import checks as hooked_checks
from .hooked.plan import is_hooked
from .newton import SEQUENTIAL
from .passes.axes import Verdict
from .passes.validate import NOT_LATER
from .racing import costs
from .report import Check, Report

TOLERANCE = 1e-10


def relative_errors(got: Mapping[str, Tensor | None], expected: Mapping[str, Tensor | None]) -> dict[str, float]:
    """Relative error of each gradient: `|g - g*| / (|g*| + 1e-6 |g*|_all)`.

    The second term keeps a gradient that is exactly zero in theory (a key bias) from turning rounding into a ratio.

    Args:
        got: Gradients to judge, by parameter name.
        expected: Gradients of the oracle; ``None`` where a parameter gets none.

    Returns:
        One number per name; infinite where only one of the two has a gradient or one is not finite.
    """
    total = sum(float(g.double().square().sum()) for g in expected.values() if g is not None) ** 0.5
    errors: dict[str, float] = {}
    for name in {**expected, **got}:
        a, b = got.get(name), expected.get(name)
        if a is None and b is None:
            continue
        if a is None or b is None:
            errors[name] = float("inf")
            continue
        difference = float((a.double() - b.double()).norm())
        errors[name] = difference / (float(b.double().norm()) + 1e-6 * total) if difference else 0.0
        if errors[name] != errors[name]:
            errors[name] = float("inf")
    return errors


def verify(
    bounded: BoundedModule,
    example_inputs: Any = None,
    *,
    engine: str | None = None,
    tolerance: float = TOLERANCE,
    ablate: bool = False,
) -> Report:
    """Check a bounded model on one set of inputs, in float64 on a copy; the model itself is left alone.

    Args:
        bounded: The model.
        example_inputs: As for ``transform``; without them the model's own.
        engine: Engine to check against plain autograd; by default the one the model is set to.
        tolerance: Largest relative gradient error that passes.
        ablate: Also run the model with its latents zeroed, noised and shuffled across samples, and tell how much its
            outputs change; ``lbi_compile.ablation.ablate`` tells what becomes of a loss.

    Returns:
        A report; ``report.ok`` is true where every check passed, ``str(report)`` is a page to read.

    Example:
        >>> report = lbi_compile.verify(bounded, x)
        >>> assert report.ok, report
    """
    inputs = as_inputs(bounded.source, example_inputs)
    if bounded._plan is None:
        bounded.build(inputs)
    if ablate and (is_hooked(bounded.plan) or bounded.credit is not None):
        raise ablation.not_graphs(bounded)
    twin = _twin(bounded)
    wide = _as_float64(inputs)
    asked = engines.check_request(engine or bounded.backward)
    request = asked if asked != engines.AUTO else _what_auto_may_take(twin, wide)
    # at a residual that leaves no mark on the gradients; what was asked for is a check of its own
    with solved_to(twin, tolerance / 100):
        errors, ran, note = _gradient_errors(twin, wide, request)
    worst = sorted(errors.items(), key=lambda item: -item[1])[:5]
    max_error = max(errors.values(), default=float("inf"))
    if is_hooked(twin.plan):
        leak, lanes, rest = hooked_checks(twin, wide)
        checks = (
            Check("gradients", max_error <= tolerance, f"{len(errors)} gradients, worst {max_error:.2e}, {note}"),
            Check("engine", ran.name == request, _engine_detail(asked, ran)),
            *rest,
        )
        ok = all(check.ok is not False for check in checks)
        return Report(ok, max_error, tolerance, str(ran), tuple(worst), leak, None, lanes, (), (), checks)

    analysis = locate(twin.source, captured(twin, wide), twin.plan)
    leak, leak_check = _leak(twin, wide, analysis)
    coupling = [analysis.coupling(k) for k in range(len(analysis.ends))]
    independent = all(verdict.kind == "position-wise" for verdict in coupling)
    counts, leaky = _least_lanes(analysis)
    names = (" + ".join(point.name for point in points) for points in twin.plan.crossings)
    lanes = tuple(zip(names, counts, strict=True))
    wanted = [len(points) for points in twin.plan.crossings]
    norms = _norms(twin, wide, independent)
    checks = (
        Check("gradients", max_error <= tolerance, f"{len(errors)} gradients, worst {max_error:.2e}, {note}"),
        Check("engine", ran.name == request, _engine_detail(asked, ran)),
        *forward_check(twin, wide),
        leak_check,
        _coupling_check(coupling, independent, twin, ran.name),
        Check("separators", not leaky, _lanes_detail(counts, wanted, leaky)),
        *(local_checks(twin, wide) if twin.credit is not None else ()),
    )
    return Report(
        ok=all(check.ok is not False for check in checks),
        max_rel_error=max_error,
        tolerance=tolerance,
        engine=str(ran),
        worst=tuple(worst),
        leak=leak,
        batch_independent=independent,
        lanes=lanes,
        jacobian_norms=norms[0].norms if norms else (),
        product_norms=norms[0].products if norms else (),
        checks=checks,
        first_boundary=norms[0].first if norms else 0,
        more_norms=norms[1:],
        ablations=ablation.ablate(twin, *wide.args, **wide.kwargs) if ablate else (),
    )


def _what_auto_may_take(twin: BoundedModule, inputs: Inputs) -> str:
    """The engine to hold against autograd: the scan where ``auto`` may take it, else the chain."""
    if twin.credit is not None:
        return engines.AUTOGRAD
    program = twin._program(inputs)
    if is_hooked(twin.plan) or twin.boundaries < 2:
        return engines.CHAIN
    cost = costs(twin, inputs.leaves, coupled=twin._checks_of(program).coupled is not None)
    return engines.SCAN if engines.SCAN in narrow(cost) else engines.CHAIN


def _engine_detail(asked: str, ran: engines.Engine) -> str:
    return f"{ran}; stands for auto, which takes it or autograd itself" if asked == engines.AUTO else str(ran)


def _twin(bounded: BoundedModule) -> BoundedModule:
    """A float64 copy whose captured casts to float32 are casts to float64."""
    twin = copy.deepcopy(bounded)
    twin._retarget = torch.float64
    return twin.double()


def _as_float64(inputs: Inputs) -> Inputs:
    def widen(leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            return leaf.detach().double().requires_grad_()
        return leaf

    args, kwargs = pytree.tree_map(widen, (inputs.args, inputs.kwargs))
    return Inputs(args, kwargs)


def _gradients(bounded: BoundedModule, inputs: Inputs, engine: str) -> tuple[dict[str, Tensor | None], engines.Engine]:
    """Gradients of a random projection of all float outputs; every run draws the same random numbers."""
    leaves = {f"input {i}": leaf for i, leaf in enumerate(inputs.leaves) if isinstance(leaf, Tensor)}
    wanted = {name: p for name, p in bounded.named_parameters() if p.requires_grad}
    wanted |= {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    buffers = {name: buffer.clone() for name, buffer in bounded.named_buffers()}
    # undisturbed: Python's and NumPy's generators start every run alike too
    with undisturbed(bounded.source), bounded.with_engine(engine), torch.enable_grad():
        torch.manual_seed(0)
        out = bounded(*inputs.args, **inputs.kwargs)
        ran = bounded.engine
        loss = torch.zeros((), dtype=torch.float64)
        for leaf in pytree.tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.requires_grad:
                weight = torch.randn(leaf.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
                loss = loss + (leaf.double() * weight.to(leaf.device)).sum().cpu()
        found = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
    with torch.no_grad():
        for name, buffer in bounded.named_buffers():
            buffer.copy_(buffers[name])
    return dict(zip(wanted, found, strict=True)), ran


def _gradient_errors(twin: BoundedModule, inputs: Inputs, request: str) -> tuple[dict[str, float], engines.Engine, str]:
    with twin.with_forward(SEQUENTIAL):
        expected, _ = _gradients(twin, inputs, engines.AUTOGRAD)
    got, ran = _gradients(twin, inputs, request)
    missing = [name for name, gradient in expected.items() if gradient is None]
    note = "float64 against plain autograd of the same bounded model"
    if missing:
        note += f"; no gradient reaches {', '.join(missing[:3])}" + (" ..." if len(missing) > 3 else "")
    return relative_errors(got, expected), ran, note


def _leak(twin: BoundedModule, inputs: Inputs, analysis: Analysis) -> tuple[bool | None, Check]:
    """Measure on the bounded model and on the model how outputs depend on positions."""
    model = analysis.dependence()
    if model is None:
        return None, Check("future leak", None, "the output has no position axis")
    program = twin._program(inputs)
    leaves = analysis.capture.inputs.leaves
    bounded = analysis.probe_bounded(twin.canvas_function(program, leaves), same_draws(twin.leaves_function(program)))
    leak = model in NOT_LATER and bounded not in NOT_LATER
    return leak, Check("future leak", not leak, f"model {model}, bounded model {bounded}, by gradients and by value")


def _coupling_check(coupling: Sequence[Verdict], independent: bool, twin: BoundedModule, engine: str) -> Check:
    if independent:
        return Check("batch independence", True, "; ".join(sorted({f"{v.how}: {v.why}" for v in coupling})))
    first = next(verdict for verdict in coupling if verdict.kind != "position-wise")
    # Jacobians are of the regions between two latents: what the last region does with samples is its own affair
    between = [coupling[k] for k in twin.interface.latents[:-1]]
    needless = twin.interface.parallel or all(verdict.kind == "position-wise" for verdict in between)
    harmless = engine != engines.SCAN or needless
    detail = f"{first.why}; " + ("nothing here needs it" if harmless else "the scan needs it")
    return Check("batch independence", None if harmless else False, detail)


def _least_lanes(analysis: Analysis) -> tuple[list[int], list[int]]:
    """Least number of tensors that separate the two sides of each boundary, and boundaries whose lanes do not.

    Independent of what chose the lanes: every node of an earlier piece is a source, every node of a later region a
    target; shared sources, and what only the head reads, do not count. The number is that of a minimum vertex cut.
    """
    piece, live, regions = analysis.cut.piece, analysis.live, len(analysis.ends)
    free = {analysis.canvas, *analysis.cut.shared}
    counts, leaky = [], []
    for k, lanes in enumerate(analysis.cut.lanes, start=1):
        graph = nx.DiGraph()
        for node, at in piece.items():
            for before in live.waits[node]:
                if before in piece and before not in free and piece[before] < k <= at < regions:
                    graph.add_edges_from([("before", before), (before, node), (node, "after")])
        counts.append(len(nx.minimum_node_cut(graph, "before", "after")) if graph else 0)
        graph.remove_nodes_from(lanes)
        if "before" in graph and nx.has_path(graph, "before", "after"):
            leaky.append(k)
    return counts, leaky


def _lanes_detail(counts: Sequence[int], wanted: Sequence[int], leaky: Sequence[int]) -> str:
    if not wanted:
        return "one region: no boundary"
    if leaky:
        return f"other values than the lanes cross the boundaries {', '.join(map(str, leaky))}"
    if all(count == 1 for count in wanted):
        return "one lane at every boundary"
    return f"lanes per boundary {', '.join(map(str, wanted))}; least there {', '.join(map(str, counts))}"


def _norms(twin: BoundedModule, inputs: Inputs, independent: bool) -> tuple[JacobianNorms, ...]:
    """Spectral norms of the interface Jacobians; none where they are not those of samples or positions."""
    if twin.credit is not None or not (independent or twin.interface.parallel):
        return ()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return jacobian_norms(twin, *inputs.args, **inputs.kwargs)
