"""Hand-made pictures, so that drawings are tested apart from captured models."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable

from lbi_compile.render.graph import Boundary, Edge, LaneRow, Node, PartCounts, Picture, Scope


def labels(regions: int) -> list[str]:
    return ["prologue", "stem", *(f"region {k}" for k in range(regions)), "head"]


def node(part: str, *path: str, operator: str = "aten.add", kind: str = "live", **fields: object) -> Node:
    """An operator in nested modules: ``node("stem", "model", "model.embed")``."""
    last = (name.rpartition(".")[2] for name in path)
    scope = tuple(Scope(name, "Layer" if end.isdigit() else end.title()) for name, end in zip(path, last, strict=True))
    module = path[-1].partition("@")[0] if path else ""
    values = {"name": f"{module or '<model>'}:{operator}", "shape": "float32 [B, T, 64]", "flops": 1000, "bytes": 256}
    return Node(operator=operator, scope=scope, module=module, kind=kind, part=part, **{**values, **fields})


def picture(nodes: Iterable[Node], edges: Iterable[tuple[int, int] | tuple[int, int, str]], *, regions: int) -> Picture:
    """A picture whose parts and boundaries are counted from its nodes and edges."""
    nodes, found = tuple(nodes), tuple(Edge(*edge) for edge in edges)
    order = labels(regions)
    counts = [
        PartCounts(
            label, sum(n.flops for n in nodes if n.part == label), 0.0, sum(n.part == label for n in nodes), 64, ()
        )
        for label in order
    ]
    total = sum(part.flops for part in counts)
    parts = tuple(
        PartCounts(p.label, p.flops, p.flops / total, p.nodes, 64, (f"layers.{i}",)) for i, p in enumerate(counts)
    )
    place = {label: i for i, label in enumerate(order)}
    boundaries = []
    for k in range(1, regions):
        lanes = {
            e.source: LaneRow(
                e.source, nodes[e.source].name, nodes[e.source].shape, k, k, nodes[e.source].part, ("region 1",)
            )
            for e in found
            if e.crossing == "lane" and place[nodes[e.source].part] <= k + 1 < place[nodes[e.target].part]
        }
        boundaries.append(Boundary(k, "pooled, 64 B each way", tuple(lanes.values())))
    summary = (("regions", f"{regions}, latent width r = 16"), ("interface", "pooled"), ("hash", "0123456789abcdef"))
    return Picture(
        "zoo.Model", summary, parts, nodes, found, tuple(boundaries), (("canvas", "stem:add", "it is first"),)
    )


def tower(*, regions: int = 4, layers: int = 8, operators: int = 6) -> Picture:
    """A residual tower: every layer reads the one before, adds to it, and has an inner module."""
    nodes = [
        node("prologue", operator="input", kind="input", name="tokens", roles=("input",)),
        node("prologue", "model", operator="aten.arange", kind="constant"),
        node("stem", "model", "model.embed", operator="aten.embedding", roles=("canvas",)),
    ]
    edges: list[tuple[int, int] | tuple[int, int, str]] = [(0, 2)]
    before = 2
    for layer in range(layers):
        part = f"region {layer * regions // layers}"
        path = ("model", f"model.layers.{layer}")
        start = len(nodes)
        for i in range(operators - 1):
            inner = path if i == 0 else (*path, f"{path[-1]}.mixer")
            nodes.append(node(part, *inner, operator="aten.linear"))
            crossing = "lane" if i == 0 and nodes[before].part not in (part, "stem") else ""
            edges.append((before if i == 0 else len(nodes) - 2, len(nodes) - 1, crossing))
        edges.append((1, start, "shared"))
        nodes.append(node(part, *path, roles=("lane",) if (layer + 1) % (layers // regions) == 0 else ()))
        edges += [
            (len(nodes) - 2, len(nodes) - 1),
            (before, len(nodes) - 1, edges[-operators][2] if operators > 1 else ""),
        ]
        before = len(nodes) - 1
    nodes.append(node("head", "model", "model.norm", operator="aten.layer_norm"))
    nodes.append(node("head", "head", operator="aten.linear", roles=("output",)))
    edges += [(before, len(nodes) - 2), (len(nodes) - 2, len(nodes) - 1)]
    return picture(nodes, edges, regions=regions)


def unet(*, levels: int = 5, operators: int = 4) -> Picture:
    """A U-Net of four regions: a skip from every level on the way down to the one on the way up."""
    steps = 2 * levels
    nodes = [node("prologue", operator="input", kind="input", name="x", roles=("input",)), node("stem", "first")]
    edges: list[tuple[int, int] | tuple[int, int, str]] = [(0, 1)]
    ends: list[int] = []
    for step in range(steps):
        path = f"down.{step}" if step < levels else f"up.{step - levels}"
        part = f"region {step * 4 // steps}"
        sources = [len(nodes) - 1] + ([ends[steps - 1 - step]] if step > levels else [])
        for source in sources:
            far = nodes[source].part not in ("stem", part)
            edges.append((source, len(nodes), "lane" if far else ""))
        for i in range(operators):
            nodes.append(node(part, path, operator="aten.conv2d"))
            edges += [(len(nodes) - 2, len(nodes) - 1)] if i else []
        ends.append(len(nodes) - 1)
    nodes.append(node("head", "last", roles=("output",)))
    edges.append((len(nodes) - 2, len(nodes) - 1))
    edges.append((ends[0], len(nodes) - 1, "tap"))
    return picture(nodes, edges, regions=4)


def branches(*, layers: int = 6, many: int = 3) -> Picture:
    """Layers of several modules side by side, each of four operators in a row."""
    nodes = [node("stem", "first", roles=("canvas",))]
    edges: list[tuple[int, int] | tuple[int, int, str]] = []
    for layer in range(layers):
        before, part = len(nodes) - 1, f"region {layer * 2 // layers}"
        crossing = "lane" if nodes[before].part not in ("stem", part) else ""
        for branch in range(many):
            edges.append((before, len(nodes), crossing))
            edges += [(len(nodes) + i, len(nodes) + i + 1) for i in range(3)]
            nodes += [node(part, f"layers.{layer}.branch{branch}", operator="aten.linear")] * 4
        ends = [before + 4 * (branch + 1) for branch in range(many)]
        edges += [(end, len(nodes)) for end in ends]
        nodes.append(node(part, operator="aten.cat"))
    nodes.append(node("head", "last", roles=("output",)))
    edges.append((len(nodes) - 2, len(nodes) - 1))
    return picture(nodes, edges, regions=2)


def unrolled(*, steps: int = 1000, operators: int = 5) -> Picture:
    """A loop in one module: nothing to collect operators by."""
    return tangle(steps * operators, lambda i: f"region {i * 4 // (steps * operators)}", reach=operators)


def tangle(
    number: int, part: Callable[[int], str], *, reach: int = 40, path: Callable[[int], str] | None = None
) -> Picture:
    """Operators that each read three of the ``reach`` before them, at random."""
    draw = random.Random(0)
    nodes = [node("stem", "loop")]
    edges: list[tuple[int, int] | tuple[int, int, str]] = []
    for i in range(number):
        nodes.append(node(part(i), "loop", *([path(i)] if path else []), operator="aten.mul"))
        some = {max(0, i + 1 - draw.randint(1, reach)) for _ in range(3)}
        edges += [(j, i + 1, "lane" if nodes[j].part not in ("stem", nodes[-1].part) else "") for j in sorted(some)]
    return picture(nodes, edges, regions=4)
