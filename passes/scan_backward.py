"""Rewrite AOTAutograd's joint graph so that the adjoints of all latents come out of one suffix scan."""

from __future__ import annotations

import functools
import itertools
import math
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

import lbi_compile.kernels.ops  # noqa: F401  registers the operators
from lbi_compile._torch import is_tangent, same_shape
from lbi_compile.errors import EngineError, LBIError
from lbi_compile.passes.alike import CHAIN, PART, REGION, BatchRecord
from lbi_compile.passes.batch_cotangents import Batched, BatchInterpreter
from lbi_compile.passes.jacobian_slices import cut, downstream, simplify, upstream
from lbi_compile.passes.ordering import sort
from lbi_compile.passes.splicing import Splicer

FORWARD, BACKWARD = torch.ops.lbi.boundary.default, torch.ops.lbi.boundary_bwd.default
MAX_R = 64


@dataclass
class ScanRecord:
    """What became of the markers of one compiled graph.

    Attributes:
        status: ``"none"`` (nothing compiled yet), ``"scan"``, ``"plain"`` (nothing to scan), ``"inference"`` (no
            backward) or ``"failed"``.
        why: One sentence about ``status``.
        scans: Calls of ``lbi::suffix_scan`` in the backward, one per bounded model (and per call of it) in the graph.
        jacobians: Interface Jacobians over all scans.
        shared: How many of them are the same for every index and computed once.
        r: Latent widths, one per scan.
        unrolled: Operator to the reason why it runs once per cotangent instead of batched over R.
        sdpa: How fused attention is batched over R: ``"fold"`` (into the batch axis), ``"unroll"``, both, or ``""``.
        inserted: Nodes added to the joint graph, before dead ones are removed.
        forward_nodes: Nodes of the forward graph (eager default only, as is the next).
        backward_nodes: Nodes of the backward graph.
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
    sdpa: str = ""
    inserted: int = 0
    forward_nodes: int = 0
    backward_nodes: int = 0
    seconds: float = 0.0
    batched: BatchRecord = field(default_factory=BatchRecord)
    error: LBIError | None = None

    def become(self, other: ScanRecord) -> None:
        """Take over every field of ``other``."""
        self.__dict__.update(other.__dict__)


def scan_backward(
    gm: fx.GraphModule, *, record: ScanRecord, decompositions: Mapping[Any, Callable[..., Any]] | None = None
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
            _solve(gm, markers, record, decompositions)
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

    A forward marker becomes the copy that it is: AOTAutograd has noted that its result is no alias of anything.
    """
    for node in list(graph.nodes):
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
) -> None:
    """Solve the adjoints of one chain; ``markers`` are its backward markers from the first boundary to the last."""
    graph = gm.graph
    r = _width(markers)
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
    jacobians: list[fx.Node] = []
    shared: list[bool] = []
    others: dict[int, fx.Node] = {}
    roots = [*filter(is_tangent, graph.nodes), *markers]
    adjoint = {*roots, *downstream(roots)}
    for at, (to, source) in enumerate(itertools.pairwise(markers)):
        region = _region(graph, markers, source, to, adjoint)
        jacobian, is_shared = _jacobian(gm, region, splicer, r, record)
        jacobians.append(jacobian)
        shared.append(is_shared)
        if region.extra:
            others[at] = _bias(gm, region, splicer)
    count = len(jacobians)
    same_everywhere = all(shared)

    # Under autocast the latents of one model may differ in dtype.
    dtypes = [marker.meta["val"].dtype for marker in markers]
    dtype = functools.reduce(torch.promote_types, dtypes)

    def scan(*values: Tensor) -> list[Tensor]:
        last, *pieces = [value.to(dtype) for value in values]
        lead = tuple(last.shape[:-1])
        n = math.prod(lead)
        rows = pieces[:count]  # each [*lead or 1s, R, R]
        if same_everywhere:
            J = torch.stack(rows).reshape(count, 1, r, r).expand(count, n, r, r)
        else:
            whole = (*lead, r, r)
            J = torch.stack([row if same_shape(row.shape, whole) else row.expand(whole) for row in rows])
            J = J.reshape(count, n, r, r)
        b = None
        if others:
            bias = dict(zip(others, pieces[count:], strict=True))
            nothing = torch.zeros((), dtype=last.dtype, device=last.device).expand(*lead, r)
            b = torch.stack([bias.get(at, nothing) for at in range(count)]).reshape(count, n, r)
        lam = torch.ops.lbi.suffix_scan.default(J, last.reshape(n, r), b).reshape(count + 1, *lead, r)
        return [lam[at] if dtypes[at] == dtype else lam[at].to(dtypes[at]) for at in range(count)]

    last = markers[-1].args[0]
    assert isinstance(last, fx.Node)
    adjoints = splicer(scan, [last, *jacobians, *others.values()])
    for marker, adjoint in zip(markers, adjoints, strict=False):
        marker.replace_all_uses_with(adjoint)
    sort(graph)
    record.status = "scan"
    record.scans += 1
    record.jacobians += count
    record.shared += sum(shared)
    record.r += (r,)
    record.inserted += splicer.inserted
    record.why = f"{record.jacobians} interface Jacobians in {record.scans} suffix scan(s)"


def _width(markers: Sequence[fx.Node]) -> int:
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


@dataclass(frozen=True, slots=True)
class _Region:
    """Adjoint path of one region: ``source`` (adjoint of its latent out) to ``end`` (adjoint of its latent in)."""

    k: int
    source: fx.Node
    end: fx.Node
    path: tuple[fx.Node, ...]
    extra: tuple[fx.Node, ...]
    label: dict[str, int]


def _region(
    graph: fx.Graph, markers: Sequence[fx.Node], source: fx.Node, to: fx.Node, adjoint: Collection[fx.Node]
) -> _Region:
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
    return _Region(k, source, end, path, extra, {CHAIN: chain, REGION: k})


def _jacobian(
    gm: fx.GraphModule, region: _Region, splicer: Splicer, r: int, record: ScanRecord
) -> tuple[fx.Node, bool]:
    """Splice ``J`` ``[*lead, R, R]``, its rows the adjoint path run on unit cotangents; and whether it is the same for
    every index (then all axes of lead are 1)."""
    value = region.source.meta["val"]
    shape = tuple(value.shape)
    if region.end not in region.path and region.end is not region.source:
        # Nothing flows from this latent to the next one (a detached region).
        return splicer(
            lambda: torch.zeros(*[1] * len(shape[:-1]), r, r, dtype=value.dtype, device=value.device), []
        ), True
    piece = cut(gm, region.path, live=[region.source], dead=region.extra, end=region.end)
    like = piece.signature()
    module = piece.module
    if not splicer.knows(like):
        with splicer.tracing():
            module = simplify(piece, [torch.zeros((), dtype=value.dtype, device=value.device).expand(shape)])

    eye = splicer.once(lambda: torch.eye(r, dtype=value.dtype, device=value.device), like=(r, value.dtype))

    def rows(eye: Tensor, *constants: Tensor) -> Tensor:
        eye = eye.view(r, *[1] * (len(shape) - 1), r)
        run = BatchInterpreter(module, r)
        result = run.run(Batched(eye, shape), *constants, *piece.zero_cotangents(r))
        record.unrolled.update(run.unrolled)
        record.sdpa = "+".join(sorted({*filter(None, record.sdpa.split("+")), *run.attention}))
        data = result.data if isinstance(result, Batched) else result.new_zeros(()).expand(r, *result.shape)
        if not (isinstance(data.shape[-1], int) and data.shape[-1] == r):
            data = data.expand(*data.shape[:-1], r)
        return data.movedim(0, -2)

    node = splicer(rows, [eye, *piece.constants], like=like, label={**region.label, PART: "jacobian"})
    lead = node.meta["val"].shape[:-2]
    return node, all(isinstance(size, int) and size == 1 for size in lead)


def _bias(gm: fx.GraphModule, region: _Region, splicer: Splicer) -> fx.Node:
    """Splice ``b`` ``[*lead, R]``: the adjoint path run on ``lam = 0``."""
    if not region.path:
        return region.end
    live = downstream(region.extra) & set(region.path)
    if region.end not in live:
        return splicer(lambda end: torch.zeros_like(end), [region.end], label={**region.label, PART: "bias"})
    path = [node for node in region.path if node in live]
    dead = {*region.path, region.source} - live
    piece = cut(gm, path, live=region.extra, dead=dead, end=region.end)

    def run(*values: Tensor) -> Tensor:
        return piece.module(*values, *piece.zero_values())

    return splicer(run, [*region.extra, *piece.constants], label={**region.label, PART: "bias"})
