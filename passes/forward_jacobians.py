"""Put the Jacobians of regions into the forward of a graph that evaluates all regions side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

import lbi_compile.kernels.pins  # noqa: F401  registers the operators
from lbi_compile._torch import is_tangent
from lbi_compile.errors import EngineError
from lbi_compile.passes.alike import is_forward
from lbi_compile.passes.jacobian_slices import downstream, upstream
from lbi_compile.passes.jacobians import Jacobians
from lbi_compile.passes.ordering import sort
from lbi_compile.passes.scan_backward import (
    BACKWARD,
    ScanRecord,
    erase_markers,
    latent_width,
    region_between,
)
from lbi_compile.passes.splicing import FORWARD, Splicer

SLOT = torch.ops.lbi.jacobian.default


def forward_jacobians(
    gm: fx.GraphModule,
    *,
    record: ScanRecord,
    forward_outputs: int,
    decompositions: Mapping[Any, Callable[..., Any]] | None = None,
) -> fx.GraphModule:
    """Fill every ``lbi::jacobian`` of a joint graph by its region's adjoint path run on unit cotangents.

    Contract: ``gm`` is a joint graph of AOTAutograd; what region k is given is marked ``boundary(m, 2 k, chain)``, what
    it gives ``boundary(m', 2 k + 1, chain)``, and the region lies between the two alone. Afterwards there are no
    markers and no ``lbi::jacobian``, Jacobians belong to the forward, and every gradient is ``None``: such a graph is
    evaluated and not differentiated. It is rewritten in place.

    Args:
        gm: The joint graph.
        record: Filled in.
        forward_outputs: How many of its outputs are those of the forward.
        decompositions: What to trace inserted nodes with (Inductor's table under Inductor).

    Returns:
        ``gm``.

    Raises:
        EngineError: A Jacobian cannot be formed.

    Example:
        >>> from torch import fx, nn
        >>> record = ScanRecord()
        >>> _ = forward_jacobians(fx.symbolic_trace(nn.ReLU()), record=record, forward_outputs=1)
        >>> record.jacobians
        0

    Row i of `J_k = d m' / d m` is the adjoint of m for the cotangent `e_i` of m'.
    """
    graph = gm.graph
    slots = graph.find_nodes(op="call_function", target=SLOT)
    record.status, record.why = "forward", f"Jacobians of {len(slots)} regions in the forward"
    if slots:
        try:
            _fill(gm, slots, record, decompositions)
        except EngineError as error:
            record.status, record.why, record.error = "failed", error.found, error
            raise
        end = graph.output_node()
        outputs: Any = end.args[0]
        end.args = ((*outputs[:forward_outputs], *[None] * (len(outputs) - forward_outputs)),)
        sort(graph)
    erase_markers(graph)
    graph.eliminate_dead_code()
    graph.lint()
    gm.recompile()
    return gm


def _fill(gm: fx.GraphModule, slots: list[fx.Node], record: ScanRecord, decompositions: Any) -> None:
    graph = gm.graph
    found: dict[Any, fx.Node] = {node.args[1:]: node for node in graph.find_nodes(op="call_function", target=BACKWARD)}
    markers = list(found.values())
    roots = [*filter(is_tangent, graph.nodes), *markers]
    adjoint = {*roots, *downstream(roots)}
    splicer = Splicer(gm, before=graph.output_node(), decompositions=decompositions, latent=slots[0].all_input_nodes[1])
    filled: list[fx.Node] = []
    makers: dict[int, Jacobians] = {}
    for slot in slots:
        after, _, k, chain = slot.args
        assert isinstance(after, fx.Node)
        assert isinstance(k, int)
        source, to = found.get((2 * k + 1, chain)), found.get((2 * k, chain))
        if source is None or to is None:
            # a region that hears nothing of its latent, or passes nothing on
            node = splicer(lambda after: after.new_zeros((*after.shape, after.shape[-1])), [after], tag=FORWARD)
        else:
            region = region_between(graph, markers, source, to, adjoint)
            r = latent_width([source, to])
            if r not in makers:
                makers[r] = Jacobians(gm, splicer, r, tag=FORWARD)
            node = makers[r].of(region).node
            # one that is the same for every index has axes of size 1
            node = splicer(lambda J, after: J.expand(*after.shape, J.shape[-1]), [node, after], tag=FORWARD)
        slot.replace_all_uses_with(node)
        filled.append(node)
        record.jacobians += 1
    record.inserted += splicer.inserted
    for maker in makers.values():
        record.unrolled.update(maker.unrolled)
    for node in upstream(filled):
        # what the adjoint paths read of the backward without its cotangents, such as the slope of an activation
        if node.op == "call_function" and not is_forward(node):
            node.meta["partitioner_tag"] = FORWARD
