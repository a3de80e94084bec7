"""Insert: cut a captured graph into prologue, stem, regions and head, with a named gap where each latent enters.

Contract: a captured graph and the nodes to cut at in, a ``Program`` of small functional graphs out. The captured graph
is left alone; the pieces copy its nodes and their ``meta``. Executed in order with nothing put into the gaps, the
pieces compute what the captured graph computes, bit for bit and with the same random draws.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from lbi_compile._torch import paused_collector
from lbi_compile.errors import NoSeparatorError
from lbi_compile.passes.lanes import STEM, Cut
from lbi_compile.passes.liveness import LIVE, NUMBER, PARAMETER_ONLY, Liveness, is_mutating, is_random

# where a parameter lives: its module and its name there, so that it is fetched anew at every call
Owner = tuple[Any, str]


class Piece:
    """A part of the program as a function of attributes and named values.

    Attributes:
        code: Graph whose placeholders are first the attributes, then the inputs.
        attributes: Owner and name of each parameter, buffer or constant it reads.
        inputs: Names of the values it reads.
        outputs: Names of the values it leaves.
    """

    def __init__(
        self, code: fx.GraphModule, attributes: tuple[Owner, ...], inputs: tuple[str, ...], outputs: tuple[str, ...]
    ) -> None:
        self.code, self.attributes, self.inputs, self.outputs = code, attributes, inputs, outputs

    def run(self, values: dict[str, Any]) -> None:
        """Read the inputs from ``values`` and put the outputs there."""
        read = [getattr(owner, name) for owner, name in self.attributes]
        left = self.code(*read, *[values[name] for name in self.inputs])
        for name, value in zip(self.outputs, left, strict=True):
            values[name] = value


@dataclass(frozen=True, slots=True)
class Gap:
    """A lane that a region reads: ``entry`` names what the region finds in place of the value ``lane``.

    ``index`` counts lanes in the order in which they first cross (``Cut.crossers``); it is -1 for the canvas. No
    gradient may come back through one that is ``detached``: the model stops it.
    """

    lane: str
    entry: str
    index: int
    detached: bool = False


@dataclass(frozen=True, slots=True)
class RegionPieces:
    """A region: ``body`` reads the ``gaps`` and ends at a_k or h_k; ``finish`` reads the gap ``joint``.

    Attributes:
        body: From the region's entry on.
        finish: From a_k to h_k; ``None`` where the region has no finish of its own.
        entry: Name under which the body finds its main input.
        gaps: The lanes it reads; those that ended in the region before it first. For region 0 the canvas.
        crossing: Index and name of the lanes of the boundary before it.
        new: Index and name of the lanes that first cross the boundary at its end.
        anchor: Name of a_k, or of h_k without a finish.
        joint: Name under which the finish finds its input.
        end: Name of h_k.
    """

    body: Piece
    finish: Piece | None
    entry: str
    gaps: tuple[Gap, ...]
    crossing: tuple[tuple[int, str], ...]
    new: tuple[tuple[int, str], ...]
    anchor: str
    joint: str
    end: str


@dataclass(frozen=True, slots=True)
class Program:
    """A captured model in pieces.

    Attributes:
        inputs: Names of the input leaves, in order.
        prologue: Values without trainable inputs, for every later piece.
        stem: Input to canvas.
        regions: One entry per region.
        head: From the gap ``head_entry`` to the outputs.
        head_entry: Name under which the head finds its input.
        canvas: Name of the canvas.
        shared: Names of the other shared sources.
        outputs: Name of each output leaf, or the constant it is.
        out_spec: Structure of the outputs.
        pieces: Nodes of every piece, for counting.
    """

    inputs: tuple[str, ...]
    prologue: Piece
    stem: Piece
    regions: tuple[RegionPieces, ...]
    head: Piece
    head_entry: str
    canvas: str
    shared: tuple[str, ...]
    outputs: tuple[Any, ...]
    out_spec: Any
    pieces: Mapping[str, tuple[fx.Node, ...]]

    def run(self, leaves: Sequence[Any]) -> list[Any]:
        """Run the pieces one after another with nothing put into the gaps: what the captured graph computes.

        Args:
            leaves: The input leaves.

        Returns:
            The output leaves.
        """
        values: dict[str, Any] = dict(zip(self.inputs, leaves, strict=True))
        self.prologue.run(values)
        self.stem.run(values)
        lane = values[self.canvas]
        for region in self.regions:
            values.update({gap.entry: values[gap.lane] for gap in region.gaps})
            values[region.entry] = lane
            region.body.run(values)
            if region.finish is not None:
                values[region.joint] = values[region.anchor]
                region.finish.run(values)
            lane = values[region.end]
        values[self.head_entry] = lane
        self.head.run(values)
        return [values[leaf.name] if isinstance(leaf, OutputName) else leaf for leaf in self.outputs]

    def __str__(self) -> str:
        """The code of every piece."""
        named = [("prologue", self.prologue), ("stem", self.stem)]
        for k, region in enumerate(self.regions):
            named += [(f"region {k} body", region.body)]
            named += [(f"region {k} finish", region.finish)] if region.finish else []
        return "\n".join(f"# {name}\n{piece.code.code.strip()}\n" for name, piece in [*named, ("head", self.head)])


@dataclass(frozen=True, slots=True)
class OutputName:
    """Refers to a value by name in ``Program.outputs`` (a bare string could be a constant output)."""

    name: str


@paused_collector()
def insert(
    gm: fx.GraphModule,
    *,
    live: Liveness,
    cut: Cut,
    finishes: Sequence[fx.Node | None] | None = None,
    owner: Callable[[str], Owner] | None = None,
    out_spec: Any = None,
) -> Program:
    """Take ``gm`` apart at the lanes of ``cut``, and its regions at ``finishes``.

    Args:
        gm: Captured graph.
        live: Its liveness.
        cut: Where to cut.
        finishes: Per region the node a_k, or ``None``; by default no region is split.
        owner: Finds the module and attribute behind a name of the graph; by default those of ``gm`` itself.
        out_spec: Structure of the outputs, kept for the caller.

    Returns:
        The program.

    Raises:
        NoSeparatorError: Another live value crosses one of the cuts.
    """
    canvas, ends = cut.canvas, cut.ends
    finishes = finishes or [None] * len(ends)
    owner = owner or _owner_in(gm)
    # a finish that begins where the region ends has no nodes: it is the interface's own
    finishes = [None if finish is end else finish for finish, end in zip(finishes, ends, strict=True)]
    where = _assign(gm, live, cut, finishes)
    number = {node: i for i, node in enumerate(cut.crossers)}
    kept = [canvas, *ends, *number, *cut.shared, *(finish for finish in finishes if finish is not None)]
    build = _Builder(gm, live, where, owner, kept)
    regions: list[RegionPieces] = []
    outputs = _output_nodes(gm)
    prologue = build.piece("prologue", {})
    stem = build.piece("stem", {})
    before: tuple[fx.Node, ...] = ()
    for k, (finish, end) in enumerate(zip(finishes, ends, strict=True)):
        lanes = (canvas,) if k == 0 else cut.lanes[k - 1]
        main = canvas if k == 0 else ends[k - 1]
        gaps = {node: f"entry {k}" if node is main else f"entry {k} {node.name}" for node in lanes}
        body = build.piece(f"region {k} body", gaps)
        joint = f"joint {k}"
        after = build.piece(f"region {k} finish", {finish: joint}) if finish is not None else None
        anchor = f"entry {k}" if finish is main else (finish or end).name
        after_it = cut.lanes[k] if k < len(cut.lanes) else ()
        read = {name for piece in (body, after) if piece is not None for name in piece.inputs}
        found = tuple(
            Gap(node.name, gap, number.get(node, -1), node in live.detached)
            for node, gap in gaps.items()
            if gap in read or finish is node
        )
        crossing = tuple((number[node], node.name) for node in before)
        new = tuple((number[node], node.name) for node in after_it if node not in before)
        regions.append(RegionPieces(body, after, f"entry {k}", found, crossing, new, anchor, joint, end.name))
        before = after_it
    head = build.piece("head", {ends[-1]: "head"}, also=[node for node in outputs if node not in where])
    build.check(cut, finishes)
    for piece in build.built.values():
        piece.code.graph.lint()
    return Program(
        inputs=tuple(node.name for node in gm.graph.find_nodes(op="placeholder")),
        prologue=prologue,
        stem=stem,
        regions=tuple(regions),
        head=head,
        head_entry="head",
        canvas=canvas.name,
        shared=tuple(node.name for node in cut.shared),
        outputs=tuple(_output_leaves(gm, ends[-1])),
        out_spec=out_spec,
        pieces={label: tuple(nodes) for label, nodes in build.members.items()},
    )


def _owner_in(gm: fx.GraphModule) -> Callable[[str], Owner]:
    def owner(target: str) -> Owner:
        path, _, name = target.rpartition(".")
        return gm.get_submodule(path), name

    return owner


def _assign(gm: fx.GraphModule, live: Liveness, cut: Cut, finishes: Sequence[fx.Node | None]) -> dict[fx.Node, str]:
    """The piece of every node that is computed once (parameter-only nodes are cloned where they are read)."""
    position = {node: i for i, node in enumerate(live.live)}
    count = len(cut.ends)
    # a canvas that is a model input lies before every live node
    joints = [None if finish is None else position.get(finish, -1) for finish in finishes]
    place: dict[fx.Node, tuple[int, int]] = {}  # piece, and 1 in a finish: in order of execution
    for node, k in cut.piece.items():
        joint = joints[k] if 0 <= k < count else None
        place[node] = (k, int(joint is not None and position[node] > joint))

    def label(at: tuple[int, int]) -> str:
        k, late = at
        if k == STEM:
            return "stem"
        return "head" if k == count else f"region {k} {'finish' if late else 'body'}"

    where: dict[fx.Node, str] = {}
    for node in gm.graph.nodes:
        if node.op in ("placeholder", "get_attr", "output") or _is_check(node):
            continue
        kind = live.kind[node]
        if kind == NUMBER:
            latest = max((place[before] for before in live.waits[node] if before in place), default=None)
            if latest is not None:
                place[node] = latest
            where[node] = "prologue" if latest is None else label(latest)
        elif kind == LIVE:
            where[node] = label(place[node])
        elif kind != PARAMETER_ONLY:
            where[node] = "prologue"
    return where


def _is_check(node: fx.Node) -> bool:
    """Assertions of the exporter about the shapes it saw; the bounded model checks its inputs itself."""
    name = str(node.target)
    return not node.users and (node.op == "call_module" or "_assert" in name or "sym_constrain" in name)


class _Builder:
    def __init__(
        self,
        gm: fx.GraphModule,
        live: Liveness,
        where: Mapping[fx.Node, str],
        owner: Callable[[str], Owner],
        lanes: Iterable[fx.Node],
    ) -> None:
        self.gm, self.live, self.where, self.owner = gm, live, where, owner
        self.order = {node: i for i, node in enumerate(gm.graph.nodes)}
        self.kept = {*_output_nodes(gm), *lanes}
        self.built: dict[str, Piece] = {}
        self.reads: dict[str, list[fx.Node]] = {}
        self.members: dict[str, list[fx.Node]] = {}
        for node, label in where.items():
            self.members.setdefault(label, []).append(node)

    def piece(self, label: str, gaps: Mapping[fx.Node, str], *, also: Iterable[fx.Node] = ()) -> Piece:
        """Build one piece; ``gaps`` renames the values that enter by another way than the graph says."""
        own = set(self.members.setdefault(label, []))
        body = self._closure(own, also)
        inside = set(body)
        reads = dict.fromkeys(a for node in body for a in node.all_input_nodes if a not in inside)
        reads.update(dict.fromkeys(node for node in also if node not in inside))
        attributes = [node for node in reads if node.op == "get_attr" and not self._is_module(node)]
        modules = [node for node in reads if node.op == "get_attr" and self._is_module(node)]
        inputs = [node for node in reads if node.op != "get_attr"]
        wanted = [n for n in body if n in own and (n in self.kept or self._read_elsewhere(n, inside))]
        wanted += [node for node in also if node not in wanted]

        graph, env, root = fx.Graph(), {}, nn.Module()
        for node in attributes:
            env[node] = graph.placeholder(f"attribute_{node.name}")
        for node in inputs:
            env[node] = graph.placeholder(node.name)
        for node in [*attributes, *inputs]:
            env[node].meta = dict(node.meta)
        for node in modules:
            block = self.gm.get_submodule(str(node.target))
            root.add_module(str(node.target), _plain(block) if isinstance(block, fx.GraphModule) else block)
            env[node] = graph.get_attr(str(node.target))
        needed: set[fx.Node] = set()
        for node in body:
            env[node] = graph.node_copy(node, env.__getitem__)
            if is_mutating(node) or is_random(node):
                needed.add(env[node])
        graph.output(tuple(env[node] for node in wanted))
        graph.eliminate_dead_code(lambda node: node.is_impure() or node in needed)
        _name_blocks(graph)
        code = fx.GraphModule(root, graph, class_name=label.title().replace(" ", ""))

        self.reads[label] = [node for node in inputs if node not in gaps]
        self.built[label] = Piece(
            code,
            tuple(self.owner(str(node.target)) for node in attributes),
            tuple(gaps.get(node, node.name) for node in inputs),
            tuple(node.name for node in wanted),
        )
        return self.built[label]

    def _closure(self, own: set[fx.Node], also: Iterable[fx.Node]) -> list[fx.Node]:
        """The nodes of a piece in program order, with the parameter-only nodes they read cloned into it."""
        found = set(own)
        pending = [*own, *also]
        while pending:
            node = pending.pop()
            if self.live.kind.get(node) == PARAMETER_ONLY:
                found.add(node)
            for before in self.live.waits[node]:
                if self.live.kind.get(before) == PARAMETER_ONLY and before not in found:
                    pending.append(before)
        return sorted(found, key=self.order.__getitem__)

    def _read_elsewhere(self, node: fx.Node, inside: set[fx.Node]) -> bool:
        return any(user not in inside and user.op != "output" and not _is_check(user) for user in node.users)

    def _is_module(self, node: fx.Node) -> bool:
        target: Any = self.gm
        for name in str(node.target).split("."):
            target = getattr(target, name)
        return isinstance(target, nn.Module)

    def check(self, cut: Cut, finishes: Sequence[fx.Node | None]) -> None:
        """Every live value that a region reads from outside comes through a gap, and stays as it is."""
        if len(cut.ends) == 1 and not any(finishes):
            return  # one region: nothing enters the gaps, so values may cross as they like
        lanes = [cut.canvas, *cut.ends, *(node for some in cut.lanes for node in some)]
        written = [node.name for node in (*lanes, *finishes) if node in self.live.overwritten]
        written += [
            before.name
            for node in self.live.live
            for before in self.live.memory.get(node, ())
            if self.live.kind[before] == LIVE and self.where[before] != self.where[node]
        ]
        if written:
            raise NoSeparatorError(
                f"the memory of {', '.join(dict.fromkeys(written))} is used across a boundary",
                expected="values that carry everything across each boundary",
                do="choose other boundaries, or give a number of regions and let the compiler choose",
            )
        everywhere = {cut.canvas, *cut.shared}
        for label, reads in self.reads.items():
            if label in ("prologue", "stem", "head"):
                continue  # the head may read what any region leaves: such values are taps
            own = label.removesuffix("body").removesuffix("finish")
            stray = [
                node
                for node in reads
                if self.live.kind.get(node) == LIVE
                and node not in everywhere
                and not (self.where[node] == "stem" and own == "region 0 ")
            ]
            if stray:
                raise NoSeparatorError(
                    f"{label} reads {', '.join(node.name for node in stray)} past its boundary",
                    expected="lanes that carry everything across each boundary",
                    do="choose other boundaries, or give a number of regions and let the compiler choose",
                )


def _with_grad_mode(enabled: bool, body: Callable[..., Any], *operands: Any) -> Any:
    with torch.set_grad_enabled(enabled):
        return body(*operands)


def _with_autocast(
    device: str, dtype: Any, enabled: bool, cache: bool | None, body: Callable[..., Any], *operands: Any
) -> Any:
    with torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=cache):
        return body(*operands)


# what the exporter makes of a block under no_grad or autocast cannot be compiled again where it holds dynamic sizes
_BLOCKS = {"wrap_with_set_grad_enabled": _with_grad_mode, "wrap_with_autocast": _with_autocast}


def _name_blocks(graph: fx.Graph) -> None:
    for node in graph.nodes:
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            node.target = _BLOCKS.get(node.target.__name__, node.target)


def _plain(body: fx.GraphModule) -> fx.GraphModule:
    """A copy of a block's body whose own blocks are plain functions too."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(body.graph, {}))
    for node in filter(_is_check, reversed(graph.nodes)):
        graph.erase_node(node)
    _name_blocks(graph)
    inner = {name: _plain(child) for name, child in body.named_children() if isinstance(child, fx.GraphModule)}
    return fx.GraphModule({**dict(body.named_children()), **inner}, graph)


def _output_leaves(gm: fx.GraphModule, last: fx.Node) -> list[Any]:
    """Names of the outputs; where the model returns the end of its last region, that is what the head reads."""
    (leaves,) = gm.graph.output_node().args
    assert isinstance(leaves, (tuple, list))
    return [OutputName("head" if leaf is last else leaf.name) if isinstance(leaf, fx.Node) else leaf for leaf in leaves]


def _output_nodes(gm: fx.GraphModule) -> list[fx.Node]:
    return list(dict.fromkeys(gm.graph.output_node().all_input_nodes))
