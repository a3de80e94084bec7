"""Summary: count what the parts of a cut model hold, and write the plan down."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import prod
from typing import Any

from torch import Tensor, fx, nn

from .capture import Capture
from .naming import Naming, class_name, module_paths
from .passes.costs import Costs
from .passes.lanes import Cut
from .passes.layouts import layout as layout_of
from .passes.liveness import LIVE, NUMBER, PARAMETER, PARAMETER_ONLY, Liveness
from .plan import Decision, Part, Plan, RegionPlan


def capture_why(capture: Capture) -> tuple[Decision, ...]:
    axes_kept = "+".join(capture.dynamic) or "none"
    refused = "; ".join(f"{rung} refused: {why}" for rung, why in capture.refused)
    return (Decision("dynamic axes", axes_kept, refused or "the exporter accepted the widest choice"),)


def parts(gm: fx.GraphModule, live: Liveness, cost: Costs, cut: Cut) -> tuple[Part, Part, tuple[Part, ...], Part]:
    """Counts of prologue, stem, regions and head."""
    count = len(cut.ends)
    ours = (PARAMETER, PARAMETER_ONLY, LIVE)
    prologue = [n for n in gm.graph.nodes if n.op == "call_function" and live.kind.get(n) not in (*ours, NUMBER)]
    # labels: -1 the prologue, 0 the stem, k + 1 region k, K + 1 the head
    members: dict[int, list[fx.Node]] = {-1: prologue, **{label: [] for label in range(count + 2)}}
    for node in live.live:
        members[cut.piece[node] + 1].append(node)
    home: dict[str, set[int]] = {}
    for label, nodes in members.items():
        for node in nodes:
            for path in module_paths(node):
                home.setdefault(path, set()).add(label)
    total = max(cost.total_flops, 1)

    def one(label: int) -> Part:
        nodes = members[label]
        inside = [path for path, labels in home.items() if path and labels == {label}]
        outer = [p for p in inside if not any(p.startswith(q + ".") for q in inside)]
        flops = sum(cost.flops.get(node, 0) for node in nodes)
        return Part(tuple(outer), len(nodes), _parameters(gm, live, nodes), flops, flops / total)

    found = [one(label) for label in members]
    return found[0], found[1], tuple(found[2:-1]), found[-1]


def _parameters(gm: fx.GraphModule, live: Liveness, nodes: Iterable[fx.Node]) -> int:
    seen: set[fx.Node] = set()
    pending = [before for node in nodes for before in node.all_input_nodes]
    found: dict[int, int] = {}
    while pending:
        node = pending.pop()
        if node in seen or live.kind.get(node) not in (PARAMETER, PARAMETER_ONLY):
            continue
        seen.add(node)
        if live.kind[node] == PARAMETER:
            parameter = gm.get_parameter(str(node.target))
            found[id(parameter)] = parameter.numel()
        pending += node.all_input_nodes
    return sum(found.values())


def _crossing(interface: str, cut: Cut, cost: Costs, k: int, r: int) -> int:
    """Numbers in the latent at boundary ``k``, at the example shapes."""
    shape = cost.shape.get(cut.canvas) or ()
    if interface == "identity":
        return sum(prod(cost.shape[node] or ()) for node in cut.lanes[k - 1])
    rank, layout = len(shape), layout_of(cut.canvas)
    samples = shape[layout.batch] if rank else 1
    positions = prod(shape) // (shape[layout.width] if rank else 1)
    per_index = {"pooled": samples, "chunked": samples, "token": positions, "token+chunked": samples + positions}
    return per_index.get(interface, 0) * r


def write_plan(
    model: nn.Module,
    capture: Capture,
    live: Liveness,
    cost: Costs,
    naming: Naming,
    cut: Cut,
    finishes: Sequence[fx.Node | None],
    residual: Sequence[bool],
    split: bool,
    finish_own: bool,
    **settled: Any,
) -> Plan:
    gm = capture.graph_module
    canvas, ends = cut.canvas, cut.ends
    prologue, stem, bodies, head = parts(gm, live, cost, cut)
    size = canvas.meta["val"].dtype.itemsize
    regions: list[RegionPlan] = []
    edges = [canvas, *ends]
    why_own = "asked for" if finish_own else "the region ends in an op that mixes positions"
    for k, (body, end) in enumerate(zip(bodies, ends, strict=True)):
        finish = finishes[k]
        crossing = 0 if k == len(ends) - 1 else size * _crossing(settled["interface"], cut, cost, k + 1, settled["r"])
        why = [
            Decision(
                "residual",
                "yes" if residual[k] else "no",
                "path of additions from input to output" if residual[k] else "no such path",
            )
        ]
        if split:
            own = finish is end
            why.append(
                Decision(
                    "finish",
                    "the interface's own MLP" if own or finish is None else f"from {naming.point(finish).name} on",
                    why_own if own else "all later ops are position-wise",
                )
            )
        regions.append(
            RegionPlan(
                index=k,
                part=body,
                start=naming.point(edges[k]),
                end=naming.point(end),
                finish=naming.point(finish) if finish is not None else None,
                own_finish=split and finish is end,
                forward_bytes=crossing,
                backward_bytes=crossing,
                residual=residual[k],
                batch_independent=None,
                why=tuple(why),
            )
        )
    names = [str(n.target) for n in gm.graph.find_nodes(op="placeholder")]
    return Plan(
        model=class_name(model),
        regions=tuple(regions),
        prologue=prologue,
        stem=stem,
        head=head,
        canvas=naming.point(canvas),
        shared=tuple(naming.point(node) for node in cut.shared),
        gather=None if cut.gather is None else naming.point(cut.gather),
        dynamic=capture.dynamic,
        inputs=tuple(
            (name, tuple(leaf.shape))
            for name, leaf in zip(names, capture.inputs.leaves, strict=True)
            if isinstance(leaf, Tensor)
        ),
        **settled,
    )
