"""Rewrite AOTAutograd's joint graph so that the adjoints of all latents come out of one suffix scan."""

from __future__ import annotations

import itertools
import math
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

import lbi_compile.kernels.ops
import lbi_compile.kernels.pins  # noqa: F401  both register operators
from lbi_compile._torch import has_example, is_tangent, same_shape
from lbi_compile.errors import EngineError, LBIError
from lbi_compile.passes.adjoint_scan import AdjointScan
from lbi_compile.passes.alike import CHAIN, REGION, BatchRecord
from lbi_compile.passes.jacobian_budget import JACOBIAN_BYTES, Parts, parts
from lbi_compile.passes.jacobian_slices import downstream, upstream
from lbi_compile.passes.jacobians import AdjointPath, Jacobian, Jacobians, bias
from lbi_compile.passes.ordering import sort
from lbi_compile.passes.splicing import Splicer

FORWARD, BACKWARD = torch.ops.lbi.boundary.default, torch.ops.lbi.boundary_bwd.default
PINNED = torch.ops.lbi.pinned.default
MAX_R = 64


@dataclass
class ScanRecord:
    """What became of the markers of one compiled graph.

    Attributes:
        status: ``"none"`` (nothing compiled yet), ``"scan"``, ``"plain"`` (nothing to scan), ``"inference"`` (no
            backward), ``"forward"`` (Jacobians in the forward) or ``"failed"``.
        why: One sentence about ``status``.
        scans: Calls of ``lbi::suffix_scan`` in the backward, one per bounded model (and per call of it) in the graph.
        jacobians: Interface Jacobians over all scans.
        shared: How many of them are the same for every index and computed once.
        r: Latent widths, one per scan.
        unrolled: Operator to the reason why it runs once per cotangent instead of batched over R.
        parts: Into how many parts the indices were cut so that Jacobians fit their budget, one number per scan.
        rows: How many rows of a Jacobian are computed at a time, the least of every scan.
        over: Why Jacobians take more memory than their budget, one sentence for each scan that does.
        sdpa: How fused attention is batched over R: ``"fold"`` (into the batch axis), ``"unroll"``, both, or ``""``.
        inserted: Nodes added to the joint graph, before dead ones are removed.
        forward_nodes: Nodes of the forward graph (eager default only, as is the next).
        backward_nodes: Nodes of the backward graph.
        forward_path: Operators of the forward graph that wait for each other (eager default only, as is the next).
        backward_path: Operators of the backward graph that wait for each other.
        seconds: Time the rewrite took.
        batched: What was batched over regions afterwards.
        error: Why the rewrite failed.
    """

    status: str = "none"
    why: str = "nothing has been compiled yet"
    scans: int = 0
    jacobians: int = 0
    shared: int = 0
    r: tuple[int, ...] = ()
    unrolled: dict[str, str] = field(default_factory=dict)
    parts: tuple[int, ...] = ()
    rows: tuple[int, ...] = ()
    over: tuple[str, ...] = ()
    sdpa: str = ""
    inserted: int = 0
    forward_nodes: int = 0
    backward_nodes: int = 0
    forward_path: int = 0
    backward_path: int = 0
    seconds: float = 0.0
    batched: BatchRecord = field(default_factory=BatchRecord)
    error: LBIError | None = None

    def become(self, other: ScanRecord) -> None:
        """Take over every field of ``other``."""
        self.__dict__.update(other.__dict__)


def scan_backward(
    gm: fx.GraphModule,
    *,
    record: ScanRecord,
    decompositions: Mapping[Any, Callable[..., Any]] | None = None,
    jacobian_bytes: int = JACOBIAN_BYTES,
) -> fx.GraphModule:
    """Replace the chain of adjoints between markers by interface Jacobians and one suffix scan per chain.

    Contract: ``gm`` is a joint graph of AOTAutograd with markers ``lbi::boundary`` on latents ``[..., R]`` and, where
    they get a gradient, ``lbi::boundary_bwd``. Afterwards it has no markers; every ``boundary_bwd`` but the last of a
    chain is an output of ``lbi::suffix_scan``; all other gradients are computed by the nodes that computed them before.
    The graph is rewritten in place. On an error it is left unusable.

    The rewrite is exact whatever the markers mean: it follows the data flow of the graph. Only the independence of the
    leading indices of a latent is taken on trust.

    Args:
        gm: The joint graph.
        record: Filled in.
        decompositions: What to trace inserted nodes with (Inductor's table under Inductor).
        jacobian_bytes: Most bytes for the Jacobians of a chain and what lives on the way to them. Beyond it they are
            computed for one part of the indices after another, or where indices cannot be taken apart by rows. Sizes
            that are symbols get a bound as a guard, so that larger inputs are compiled anew.

    Returns:
        ``gm``.

    Raises:
        EngineError: The markers do not cut the graph as a scan needs it.

    Example:
        >>> from torch import fx, nn
        >>> record = ScanRecord()
        >>> _ = scan_backward(fx.symbolic_trace(nn.ReLU()), record=record)
        >>> record.status, record.why
        ('inference', 'nothing in the graph needs a gradient')

    With ``J_k = d m_{k+1} / d m_k`` the adjoints are ``lam_k = J_k^T lam_{k+1} + b_k``: the rows of ``J_k`` are region
    k's adjoint path run on R unit cotangents, ``b_k`` is the same path run on zero, with what joins it from elsewhere.
    """
    started = time.perf_counter()
    if any(map(is_tangent, gm.graph.nodes)):
        record.become(ScanRecord(status="plain", why="nothing to scan: fewer than two boundaries get a gradient"))
    else:
        record.become(ScanRecord(status="inference", why="nothing in the graph needs a gradient"))
    try:
        for markers in _chains(gm.graph):
            _solve(gm, markers, record, decompositions, jacobian_bytes)
    except EngineError as error:
        record.status, record.why, record.error = "failed", error.found, error
        raise
    except Exception as error:
        # Whatever else stops the rewrite is a reason for `auto` to take another engine too; the cause stays attached.
        reason = EngineError(
            f"the backward could not be rewritten ({type(error).__name__}: {error})",
            expected="a backward made of operators that can be traced again",
            do="use backward='chain' (same gradients)",
        )
        record.status, record.why, record.error = "failed", reason.found, reason
        raise reason from error
    erase_markers(gm.graph)
    gm.graph.eliminate_dead_code()
    gm.graph.lint()
    gm.recompile()
    record.seconds = time.perf_counter() - started
    return gm


def erase_markers(graph: fx.Graph) -> None:
    """Take every marker out of ``graph``.

    A forward marker becomes the copy that it is: AOTAutograd has noted that its result is no alias of anything. A
    pinned latent becomes a copy of the value it is pinned to: nothing waits for the latent any more.
    """
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target is PINNED:
            m, value = (a.meta["val"] for a in node.all_input_nodes)
            if m.dtype == value.dtype:
                node.target, node.args = torch.ops.aten.clone.default, node.args[1:]
            else:
                node.target, node.args = torch.ops.aten._to_copy.default, node.args[1:]
                node.kwargs = {"dtype": m.dtype}
        if node.op == "call_function" and node.target is FORWARD:
            node.target, node.args = torch.ops.aten.clone.default, node.args[:1]
        elif node.op == "call_function" and node.target is BACKWARD:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


def _chains(graph: fx.Graph) -> list[list[fx.Node]]:
    """Backward markers in the order of their boundaries, one list per call of a bounded model that has two or more."""
    calls: dict[tuple[int, int], dict[int, fx.Node]] = defaultdict(dict)
    forward = _call_numbers(graph)
    for node in graph.nodes:
        if node.op == "call_function" and node.target is BACKWARD:
            k, chain = _place(node)
            if calls[chain, forward(node)].setdefault(k, node) is not node:
                raise _indistinct(k, chain)
    chains = []
    for (chain, _), markers in calls.items():
        ks = sorted(markers)
        if len(ks) < 2:
            continue
        if ks != list(range(ks[0], ks[-1] + 1)):
            raise EngineError(
                f"gradients at boundaries {ks} of bounded model {chain}, and none at those between",
                expected="gradients at consecutive boundaries",
                do="use backward='chain', or do not detach a latent inside the model",
            )
        chains.append([markers[k] for k in ks])
    return chains


def _call_numbers(graph: fx.Graph) -> Callable[[fx.Node], int]:
    """Tells which call of its bounded model a backward marker is of: a pair of markers shares autograd's number."""
    numbers: dict[tuple[int, int], list[Any]] = defaultdict(list)
    for node in graph.nodes:
        if node.op == "call_function" and node.target is FORWARD:
            numbers[_place(node)].append(node.meta.get("seq_nr"))

    def call(node: fx.Node) -> int:
        known, number = numbers[_place(node)], node.meta.get("seq_nr")
        if len(known) == 1:
            return 0
        if number is None or known.count(number) != 1:
            raise _indistinct(*_place(node))
        return known.index(number)

    return call


def _place(marker: fx.Node) -> tuple[int, int]:
    """Boundary and bounded model of a marker."""
    _, k, chain = marker.args
    assert isinstance(k, int)
    assert isinstance(chain, int)
    return k, chain


def _indistinct(k: int, chain: int) -> EngineError:
    return EngineError(
        f"boundary {k} of bounded model {chain} occurs several times in one graph and its calls cannot be told apart",
        expected="one call of a bounded model per compiled graph, or autograd sequence numbers on its nodes",
        do="use backward='chain' here",
    )


def _solve(
    gm: fx.GraphModule,
    markers: Sequence[fx.Node],
    record: ScanRecord,
    decompositions: Mapping[Any, Callable[..., Any]] | None,
    budget: int,
) -> None:
    """Solve the adjoints of one chain; ``markers`` are its backward markers from the first boundary to the last."""
    graph = gm.graph
    r = latent_width(markers)
    order = {node: i for i, node in enumerate(graph.nodes)}
    shape = markers[-1].meta["val"].shape
    latents = (
        n for n in graph.find_nodes(op="call_function", target=FORWARD) if same_shape(n.meta["val"].shape, shape)
    )
    splicer = Splicer(
        gm,
        before=min(markers, key=order.__getitem__),
        decompositions=decompositions,
        latent=next((n for n in latents if same_shape(n.meta["val"].shape, shape)), None),
    )
    jacobians = Jacobians(gm, splicer, r)
    found: list[Jacobian] = []
    others: dict[int, fx.Node] = {}
    roots = [*filter(is_tangent, graph.nodes), *markers]
    adjoint = {*roots, *downstream(roots)}
    for at, (to, source) in enumerate(itertools.pairwise(markers)):
        region = region_between(graph, markers, source, to, adjoint)
        found.append(jacobians.of(region))
        if region.extra:
            others[at] = bias(gm, region, splicer)
    last = markers[-1].args[0]
    assert isinstance(last, fx.Node)
    # Under autocast the latents of one model may differ in dtype.
    scan = AdjointScan(splicer, last, others, [marker.meta["val"].dtype for marker in markers])
    how = _parts(jacobians, [one for one in found if not one.shared], last, budget)
    if how.indices > 1:
        adjoints = scan.by_parts(jacobians, found, how.indices)
    else:
        rows = iter(how.rows)
        apart = [not how.together and not one.shared for one in found]
        nodes = [jacobians.by_rows(a, next(rows)) if on else a.node for a, on in zip(found, apart, strict=True)]
        adjoints = scan.whole(nodes)
    for marker, adjoint in zip(markers, adjoints, strict=False):
        marker.replace_all_uses_with(adjoint)
    sort(graph)
    record.status = "scan"
    record.scans += 1
    record.jacobians += len(found)
    record.shared += sum(one.shared for one in found)
    record.r += (r,)
    record.unrolled.update(jacobians.unrolled)
    record.sdpa = "+".join(sorted({*filter(None, record.sdpa.split("+")), *jacobians.attention}))
    record.parts += (how.indices,)
    record.rows += (min(how.rows, default=r),)
    record.over += (how.over,) if how.over else ()
    record.inserted += splicer.inserted
    record.why = f"{record.jacobians} interface Jacobians in {record.scans} suffix scan(s)"


def _parts(jacobians: Jacobians, found: Sequence[Jacobian], last: fx.Node, budget: int) -> Parts:
    """How the Jacobians that differ from index to index are computed within ``budget`` bytes."""
    if not all(map(has_example, last.meta["val"].shape)):
        return Parts(True, 1, (), (), "how many indices there are depends on values")
    works = [jacobians.work(one) for one in found]
    how = parts(works, r=jacobians.r, indices=math.prod(last.meta["val"].shape[:-1]), budget=budget)
    with jacobians.splicer.tracing():
        for size, most in how.bounds:
            if not size <= most:  # asked of a symbolic size, it is a guard of the graph
                raise AssertionError(f"{size} at the example's sizes is more than {most}")
    if how.over and jacobians.inseparable:
        why = "; ".join(f"region {k}: {why}" for k, why in jacobians.inseparable.items())
        return replace(how, over=f"{how.over}, and indices cannot be taken apart ({why})")
    return how


def latent_width(markers: Sequence[fx.Node]) -> int:
    shapes = [tuple(marker.meta["val"].shape) for marker in markers]
    if not shapes[0] or not all(same_shape(shape, shapes[0]) for shape in shapes):
        raise EngineError(
            f"latents of shapes {shapes}",
            expected="one shape [..., r] at every boundary",
            do="use backward='chain'",
        )
    r = int(shapes[0][-1])
    if r > MAX_R:
        raise EngineError(
            f"latents of {r} numbers",
            expected=f"r <= {MAX_R}: a Jacobian has r * r numbers for each index",
            do="choose a smaller r, or backward='chain'",
        )
    return r


def region_between(
    graph: fx.Graph, markers: Sequence[fx.Node], source: fx.Node, to: fx.Node, adjoint: Collection[fx.Node]
) -> AdjointPath:
    """Nodes between two backward markers, and those of ``adjoint`` (all that depends on a tangent) that join them."""
    stop = set(markers)
    end: Any = to.args[0]
    k, _ = _place(to)
    inside = downstream([source], stop=stop) & (upstream([to], stop=stop))
    path = tuple(node for node in graph.nodes if node in inside)
    reads = [a for node in path for a in node.all_input_nodes] if path else [end]
    extra = tuple(a for a in dict.fromkeys(reads) if a not in inside and a is not source and a in adjoint)
    past = {*upstream(extra), *extra} & stop
    if past:
        raise EngineError(
            f"the adjoint of latent {k} also depends on the adjoints of latents {sorted(_place(m)[0] for m in past)}",
            expected=f"latent {k + 1} to be the only way from region {k} to later latents",
            do="use backward='chain', or cut where the boundary is a separator",
        )
    chain = _place(to)[1]
    return AdjointPath(k, source, end, path, extra, {CHAIN: chain, REGION: k})
