"""Where a local credit rule is built: the shapes it meets in a captured model, read off one example call."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..errors import InterfaceError, OptionError
from ..interfaces import Draw, canvas_scale
from ..passes.insert import OutputName, Owner, Piece, Program, RegionPieces
from ..passes.layouts import Layout
from ..passes.liveness import is_mutating

# Before it is decomposed the operator of a norm hides that it writes to its running statistics.
_NORMS = re.compile("batch_norm|instance_norm")


@dataclass(frozen=True, slots=True)
class Site:
    """What a local credit rule has to know of a model.

    Attributes:
        regions: Number of regions K.
        r: Latent width R that was asked for.
        seed: Seed of the parameters.
        canvas: Example of the canvas, folded to `[B, D]` or `[B, P, D]`.
        layout: Dims of the canvas as it is.
        lane: Width of the lane at every boundary where it has another shape than the canvas, `[B, E]`; ``None`` where
            it has the canvas's shape.
        classes: Number of classes C.
        class_dim: The dim of the logits that counts classes.
        positions: Every position of the canvas has logits of its own; else every sample has.
        logits: Index of the logits among the model's output leaves.
        readout: The piece from `h_{K-1}` to the logits.
        names: Qualified name of each attribute of ``readout``; ``None`` for a constant of the captured graph.
        embedding: Qualified name of the model's embedding `[C, D]` of its inputs; ``None`` where it has none.
    """

    regions: int
    r: int
    seed: int
    canvas: Tensor
    layout: Layout | None
    lane: int | None
    classes: int
    class_dim: int
    positions: bool
    logits: int
    readout: Piece
    names: tuple[str | None, ...]
    embedding: str | None

    @property
    def width(self) -> int:
        """Width of what regions after the first one read in place of their separator."""
        return self.canvas.shape[-1] if self.lane is None else self.lane

    def draw(self) -> Draw:
        """What makes the parameters."""
        return Draw(self.seed, like=self.canvas, scale=canvas_scale(self.canvas))


def find_site(
    program: Program, model: nn.Module, leaves: Sequence[Any], layout: Layout | None, *, r: int, seed: int, credit: str
) -> Site:
    """Run a program once with nothing put into its gaps and read off what a local credit rule needs.

    Args:
        program: The captured model in pieces.
        model: The model.
        leaves: Input leaves of the example.
        layout: Layout of the canvas; ``None`` where it has one dim.
        r: Latent width R.
        seed: Seed of the parameters.
        credit: Name of the rule, for messages.

    Raises:
        InterfaceError: Several values cross a boundary, or one in a shape no latent can be decoded into.
        OptionError: No output of the model is made of class logits.
    """
    for k, pieces in enumerate(program.regions):
        _raise_if_several(pieces, k, len(program.regions), credit)
    with torch.no_grad(), torch.random.fork_rng():
        values = example_values(program, leaves)
    canvas = values[program.canvas]
    if layout is None:
        raise InterfaceError(
            f"a canvas with {canvas.dim()} axes under credit={credit!r}",
            expected="a canvas with an axis of samples and one of features",
            do='use credit="exact"',
        )
    folded = layout.fold(canvas)
    at = _find_logits(program, values)
    logits = values[_name(program, at)]
    class_dim, positions = _class_dim(logits, canvas, layout, credit)
    lane = _lane_width(program, values, canvas, credit)
    if lane is not None and positions:
        raise InterfaceError(
            f"boundaries of shape [B, {lane}] in a model with logits for every position, under credit={credit!r}",
            expected="boundaries with the canvas's positions, or one set of logits for each sample",
            do="give logits of the last position only, or choose other boundaries",
        )
    readout = _readout(program, _name(program, at), lane is None and len(program.regions) > 1, credit, values)
    return Site(
        regions=len(program.regions),
        r=r,
        seed=seed,
        canvas=folded,
        layout=layout,
        lane=lane,
        classes=logits.shape[class_dim],
        class_dim=class_dim,
        positions=positions,
        logits=at,
        readout=readout,
        names=attribute_names(readout, model),
        embedding=_embedding(program, model, logits.shape[class_dim], folded.shape[-1]),
    )


def example_values(program: Program, leaves: Sequence[Any]) -> dict[str, Any]:
    """All named values of a program that runs with nothing put into its gaps."""
    values: dict[str, Any] = dict(zip(program.inputs, leaves, strict=True))
    program.prologue.run(values)
    program.stem.run(values)
    lane = values[program.canvas]
    for pieces in program.regions:
        values.update({gap.entry: values[gap.lane] for gap in pieces.gaps})
        values[pieces.entry] = lane
        pieces.body.run(values)
        lane = values[pieces.end]
    values[program.head_entry] = lane
    program.head.run(values)
    return values


def leaving(pieces: RegionPieces) -> str:
    """Name of what leaves a region: its one lane, or its end."""
    return pieces.new[0][1] if pieces.new else pieces.end


def readout_piece(program: Program, at: int) -> Piece:
    """The part of the head that leads to output leaf ``at``, and nothing else of it."""
    head, name = program.head, _name(program, at)
    if name == program.head_entry:
        graph = fx.Graph()
        graph.output((graph.placeholder("h"),))
        return Piece(fx.GraphModule(nn.Module(), graph), (), (program.head_entry,), (name,))
    graph, env = fx.Graph(), {}
    made = graph.graph_copy(head.code.graph, env)
    assert isinstance(made, tuple)
    graph.output((made[head.outputs.index(name)],))
    graph.eliminate_dead_code(lambda node: node.is_impure() or is_mutating(node))
    places = list(graph.find_nodes(op="placeholder"))
    used = [bool(node.users) for node in places]
    for node, needed in zip(places, used, strict=True):
        if not needed:
            graph.erase_node(node)
    graph.lint()
    count = len(head.attributes)
    return Piece(
        fx.GraphModule(head.code, graph),
        tuple(owner for owner, needed in zip(head.attributes, used[:count], strict=True) if needed),
        tuple(read for read, needed in zip(head.inputs, used[count:], strict=True) if needed),
        (name,),
    )


def attribute_names(piece: Piece, model: nn.Module) -> tuple[str | None, ...]:
    """Qualified name in the model of each attribute a piece reads; ``None`` for constants of the captured graph."""
    paths = {id(module): path for path, module in model.named_modules(remove_duplicate=False)}
    found: list[str | None] = []
    for owner, name in piece.attributes:
        # attributes of the model itself are fetched from the bounded model, which holds the same dictionaries
        root = getattr(owner, "_parameters", None) is model._parameters
        path = "" if root else paths.get(id(owner))
        found.append(None if path is None else f"{path}.{name}".removeprefix("."))
    return tuple(found)


def written(piece: Piece) -> list[Owner]:
    """Attributes a piece may write over: arguments of writing operators and of norms with running statistics."""
    places = list(piece.code.graph.find_nodes(op="placeholder"))
    return [
        owned
        for node, owned in zip(places, piece.attributes, strict=False)
        if any(is_mutating(user) or _NORMS.search(str(user.target)) for user in node.users)
    ]


def _raise_if_several(pieces: RegionPieces, k: int, count: int, credit: str) -> None:
    lanes = {gap.lane for gap in pieces.gaps} | {name for _, name in pieces.crossing}
    if (k > 0 and len(lanes) != 1) or (k < count - 1 and len(pieces.new) != 1):
        raise InterfaceError(
            f"{max(len(lanes), len(pieces.new))} values across a boundary of region {k} under credit={credit!r}",
            expected="one value at every boundary: a local rule puts one latent there",
            do='ask for fewer regions, name boundaries where one value crosses, or use credit="exact"',
        )


def _name(program: Program, at: int) -> str:
    leaf = program.outputs[at]
    assert isinstance(leaf, OutputName)
    return leaf.name


def _find_logits(program: Program, values: dict[str, Any]) -> int:
    """The first output leaf that is computed from the end of the last region and has a dim for classes."""
    reached = {program.head_entry}
    graph = program.head.code.graph
    nodes: set[fx.Node] = set()
    places = list(graph.find_nodes(op="placeholder"))[len(program.head.attributes) :]
    for node in graph.nodes:
        read = node in places and program.head.inputs[places.index(node)] == program.head_entry
        if read or any(before in nodes for before in node.all_input_nodes):
            nodes.add(node)
    (left,) = graph.output_node().args
    assert isinstance(left, (tuple, list))
    reached |= {name for name, node in zip(program.head.outputs, left, strict=True) if node in nodes}
    for at, leaf in enumerate(program.outputs):
        if isinstance(leaf, OutputName) and leaf.name in reached:
            value = values[leaf.name]
            if isinstance(value, Tensor) and value.is_floating_point() and value.dim() >= 2:
                return at
    raise OptionError(
        "a model none of whose outputs is made of numbers for each sample and class",
        expected="class logits among the outputs: local credit rules teach every region to classify",
        do='call the model without targets, so that it returns logits, or use credit="exact"',
    )


def _class_dim(logits: Tensor, canvas: Tensor, layout: Layout, credit: str) -> tuple[int, bool]:
    shape = list(logits.shape)
    if len(shape) == 2:
        return 1, False
    if len(shape) == canvas.dim():
        same = [dim for dim in range(len(shape)) if shape[dim] == canvas.shape[dim] or dim == layout.width]
        if len(same) == len(shape):
            return layout.width, True
    raise InterfaceError(
        f"logits of shape {shape} beside a canvas of shape {list(canvas.shape)} under credit={credit!r}",
        expected="logits for each sample, [B, C], or for each position of the canvas",
        do="take a model whose logits have the canvas's positions, or one set of logits for each sample",
    )


def _lane_width(program: Program, values: dict[str, Any], canvas: Tensor, credit: str) -> int | None:
    lanes = [values[leaving(pieces)] for pieces in program.regions[:-1]]
    if all(lane.shape == canvas.shape for lane in lanes):
        return None
    if all(lane.dim() == 2 and lane.shape == lanes[0].shape for lane in lanes):
        return lanes[0].shape[1]
    shapes = ", ".join(str(list(lane.shape)) for lane in lanes)
    raise InterfaceError(
        f"boundaries of shapes {shapes} beside a canvas of shape {list(canvas.shape)} under credit={credit!r}",
        expected="boundaries of the canvas's shape, or states [B, E] of one width",
        do="name boundaries within one stage of the model, where shapes stay the same",
    )


def _readout(program: Program, name: str, uniform: bool, credit: str, values: dict[str, Any]) -> Piece:
    at = next(i for i, leaf in enumerate(program.outputs) if isinstance(leaf, OutputName) and leaf.name == name)
    piece = readout_piece(program, at)
    regional = {out for pieces in program.regions for out in pieces.body.outputs}
    taps = [read for read in piece.inputs if read in regional]
    if taps:
        raise InterfaceError(
            f"a head that reads {', '.join(taps)} from inside the regions, under credit={credit!r}",
            expected="a head that reads what the last region gives: every region is read out by it",
            do='use credit="exact", which teaches all regions through the head',
        )
    ends = {tuple(values[leaving(pieces)].shape) for pieces in program.regions}
    if len(ends) > 1:
        raise InterfaceError(
            f"regions that end in values of shapes {', '.join(map(str, sorted(ends)))} under credit={credit!r}",
            expected="one shape, so that one kind of head reads every region",
            do="name boundaries so that pooling and the classifier belong to the head",
        )
    return piece


def _embedding(program: Program, model: nn.Module, classes: int, width: int) -> str | None:
    """Name of the table `[C, D]` the stem looks tokens up in."""
    graph, names = program.stem.code.graph, attribute_names(program.stem, model)
    places = list(graph.find_nodes(op="placeholder"))
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.embedding.default):
        table = node.args[0]
        if isinstance(table, fx.Node) and table in places[: len(names)]:
            name = names[places.index(table)]
            if name is not None and tuple(table.meta["val"].shape) == (classes, width):
                return name
    return None
