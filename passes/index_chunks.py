"""Run the adjoint path of one region on a part of its indices, so that its Jacobians need not all exist at once.

A path that treats every index (sample, or position of a sample) by itself gives the same rows on a part of them. The
static axis rules prove that it does, operator by operator, and tell where each value holds the indices: in the axes of
the latent, or flattened into one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from lbi_compile._torch import same_shape, same_size, sizes_apart
from lbi_compile.passes.axes import trace_axis
from lbi_compile.passes.batch_cotangents import Batched
from lbi_compile.passes.jacobian_slices import Slice

aten = torch.ops.aten

_RESHAPES = {aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.expand.default}
_LIKE = {aten.zeros_like.default, aten.ones_like.default, aten.full_like.default, aten.empty_like.default}
# Not elementwise, but their operands too are aligned with the result.
_ALIGNED = {aten.cat.default, aten.slice_scatter.default}


class Inseparable(Exception):
    """A path cannot be run on a part of its indices; the message says why, one clause."""


@dataclass(frozen=True, slots=True)
class Operand:
    """A value that does not depend on the adjoints, as the narrowed path reads it.

    Attributes:
        source: Node of the path, an input of it or computed from such inputs alone.
        lead: How many axes of its own stand for the indices once it is expanded to them; 0: it is read whole.
        missing: Axes of size 1 to put in front of it for that.
    """

    source: fx.Node
    lead: int = 0
    missing: int = 0


@dataclass(frozen=True, slots=True)
class Narrowed:
    """A path that runs on any number of the indices.

    Attributes:
        module: The path; its inputs are the adjoint, ``operands``, ``zeros`` and the number of indices.
        lead: Sizes of the indices ``[*lead]`` of the whole.
        head: What is computed from constants alone and cannot be for a part, once for all of them: the inputs of the
            path but the adjoint to those sources of ``operands`` that are no inputs, in their order; ``None`` where
            all are.
        operands: What the path reads.
        zeros: What it reads as zero.
        inputs: Place among the constants of the path, for sources that are inputs.
    """

    module: fx.GraphModule
    lead: tuple[Any, ...]
    head: fx.GraphModule | None
    operands: tuple[Operand, ...]
    zeros: tuple[Operand, ...]
    inputs: dict[fx.Node, int]

    def flat(self, operand: Operand, value: Tensor, count: Any) -> Tensor:
        """An operand's whole value as ``[N, *tail]``, where ``count`` is N."""
        tail = value.shape[operand.lead - operand.missing :]
        for _ in range(operand.missing):
            value = value.unsqueeze(0)
        lead = self.lead if operand.lead == len(self.lead) else (count,)
        if not same_shape(value.shape[: operand.lead], lead):
            value = value.expand(*lead, *tail)
        return value.reshape(count, *tail)

    def shaped(self, operand: Operand, part: Tensor, number: Any) -> Tensor:
        """What the path reads of an operand, from a part ``[n, *tail]`` of ``flat``; ``number`` is n."""
        return part.view(*self._narrow(operand.lead, number), *part.shape[1:]) if operand.lead else part

    def zero_cotangents(self, r: int, number: Any) -> list[Batched]:
        """Zeros for R cotangents at once, for ``number`` indices."""
        made = []
        for zero in self.zeros:
            value = zero.source.meta["val"]
            lead = self._narrow(zero.lead, number) if zero.lead else ()
            shape = (*lead, *value.shape[len(lead) :])
            data = torch.zeros(r, *[1] * len(shape), dtype=value.dtype, device=value.device)
            made.append(Batched(data, shape))
        return made

    def shape(self, number: Any, r: int) -> tuple[Any, ...]:
        """Shape of the adjoint of ``number`` indices."""
        return (*self._narrow(len(self.lead), number), r)

    def settle(self, live: Tensor, values: Sequence[Tensor], number: Any) -> None:
        """Write the values of ``number`` indices into the nodes' ``meta``, where batching rules look for shapes.

        Args:
            live: Adjoint of such a part, fake, as ``values`` of the operands are.
            values: Parts of the operands.
            number: How many.

        Raises:
            Inseparable: A value comes out in another shape than its part has.
        """
        zeros = [x.data[0].expand(x.shape) for x in self.zero_cotangents(1, number)]
        wanted = {node: node.meta["narrow"] for node in self.module.graph.nodes if "narrow" in node.meta}
        _Settle(self.module).run(live, *values, *zeros, number)
        for node, (lead, tail) in wanted.items():
            if not same_shape(node.meta["val"].shape, (*self._narrow(lead, number), *tail)):
                raise Inseparable(f"{node.target} gives other shapes for a part of the indices")

    @staticmethod
    def _narrow(lead: int, number: Any) -> tuple[Any, ...]:
        # the axis that varies in front: no stride hangs on whether it is empty
        return (number, *[1] * (lead - 1))


class _Settle(fx.Interpreter):
    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        n.meta["val"] = result
        return result


def narrowed(piece: Slice, module: fx.GraphModule) -> Narrowed:
    """Make the adjoint path of one region run on any number of its indices.

    Contract: every element of a value of the path at one index depends on adjoints of that index only, by the rules of
    ``axis_rules``, and every value holds the indices in its leading axes.

    Args:
        piece: The path, with one live input ``[*lead, R]``.
        module: The path in operators that have batching rules (``jacobian_slices.simplify``).

    Raises:
        Inseparable: It is not proven that indices stay apart, or a value holds them in another way.
    """
    nodes = list(module.graph.nodes)
    live, *inputs = (node for node in nodes if node.op == "placeholder")
    lead = tuple(live.meta["val"].shape[:-1])
    zeros = inputs[len(piece.constants) :]
    forms = _forms(nodes, live, zeros, lead)
    _follow_back(nodes, forms, zeros, lead)
    graph = fx.Graph()
    copies = {live: graph.placeholder("live")}
    operands = _operands(nodes, forms, zeros)
    placed: dict[tuple[fx.Node, fx.Node], fx.Node] = {}
    order: dict[Operand, fx.Node] = {}
    for kind in (False, True):
        for (user, source), operand in operands.items():
            if (source in zeros) == kind:
                if operand not in order:
                    order[operand] = graph.placeholder(f"operand{len(order)}")
                placed[user, source] = order[operand]
    number = graph.placeholder("number")
    for node in nodes:
        if node not in forms or node is live or node in zeros:
            continue
        lookup = {source: placed[node, source] for source in node.all_input_nodes if (node, source) in placed}
        copy = graph.node_copy(node, lambda a, lookup=lookup: lookup.get(a) or copies.get(a) or number)
        value, form = node.meta["val"], forms[node]
        tail = tuple(value.shape[form:])
        if node.target in _RESHAPES:
            if not all(isinstance(size, int) for size in tail):
                raise Inseparable(f"{node.target} with a size beside those of the indices that varies")
            copy.args = copy.args[0], [number, *[1] * (form - 1), *tail]
        copy.meta["narrow"] = form, tail
        copies[node] = copy
    (end,) = module.graph.output_node().all_input_nodes
    if end not in copies or forms[end] != len(lead):
        raise Inseparable("the path ends in a value that does not depend on the adjoint")
    graph.output(copies[end])
    graph.eliminate_dead_code()
    graph.lint()
    read = [operand for operand in order if operand.source not in zeros]
    computed = [operand.source for operand in read if operand.source.op != "placeholder"]
    return Narrowed(
        fx.GraphModule(module, graph),
        lead,
        _head(module, list(dict.fromkeys(computed))) if computed else None,
        tuple(read),
        tuple(operand for operand in order if operand.source in zeros),
        {node: at for at, node in enumerate(inputs[: len(piece.constants)])},
    )


def _forms(
    nodes: Sequence[fx.Node], live: fx.Node, zeros: Sequence[fx.Node], lead: tuple[Any, ...]
) -> dict[fx.Node, int]:
    """By node that depends on adjoints how many of its leading axes are the indices: those of ``lead``, or one."""
    tensors = [node for node in nodes if isinstance(node.meta.get("val"), Tensor)]
    numbers = sizes_apart([tuple(node.meta["val"].shape) for node in tensors])
    shapes: dict[fx.Node, tuple[int, ...] | None] = dict.fromkeys(nodes)
    shapes.update(zip(tensors, numbers, strict=True))
    calls = [node for node in nodes if node.op in ("call_function", "get_attr")]
    sizes = shapes[live]
    assert sizes is not None
    axes = [axis for axis in range(len(lead)) if sizes[axis] > 1]
    if not axes:
        raise Inseparable("there is one index")
    states = {axis: trace_axis(calls, source=live, axis=axis, shapes=shapes) for axis in axes}
    forms = {live: len(lead)}
    for node in calls:
        before = [forms[a] for a in node.all_input_nodes if a in forms]
        if not before:
            continue
        found = [states[axis][node] for axis in axes]
        for state in found:
            if state.kind == "mixed":
                raise Inseparable(state.why)
        if all(state.kind == "absent" for state in found):
            if node.target in _LIKE:
                forms[node] = before[0]
            elif isinstance(node.meta.get("val"), Tensor):
                raise Inseparable(f"{node.target} makes a value in the shape of the whole")
            continue
        forms[node] = _form(node, {axis: (s.dim, s.stride) for axis, s in zip(axes, found, strict=True)}, sizes, lead)
    return forms | dict.fromkeys(zeros, 0)


def _form(node: fx.Node, places: dict[int, tuple[int, int]], sizes: tuple[int, ...], lead: tuple[Any, ...]) -> int:
    shape = node.meta["val"].shape
    if same_shape(shape[: len(lead)], lead) and all(place == (axis, 1) for axis, place in places.items()):
        return len(lead)
    flat = all(place == (0, math.prod(sizes[axis + 1 : len(lead)])) for axis, place in places.items())
    if flat and same_size(shape[0], math.prod(lead)):
        return 1
    raise Inseparable(f"{node.target} holds the indices in other than its leading axes")


def _follow_back(
    nodes: Sequence[fx.Node], forms: dict[fx.Node, int], zeros: Sequence[fx.Node], lead: tuple[Any, ...]
) -> None:
    """Add to ``forms`` what is computed elementwise from constants and can be for a part: whole, it would live long."""
    wanted: dict[fx.Node, set[int]] = {}
    for node in reversed(nodes):
        if node.op == "placeholder":
            continue
        if node not in forms:
            value = node.meta.get("val")
            found = wanted.get(node, set())
            if len(found) != 1 or torch.Tag.pointwise not in getattr(node.target, "tags", ()):
                continue
            form = min(found)
            sizes = lead if form == len(lead) else (math.prod(lead),)
            if not form or not isinstance(value, Tensor) or not same_shape(value.shape[:form], sizes):
                continue
            forms[node] = form
        for source in node.all_input_nodes:
            if source not in forms and source not in zeros and isinstance(source.meta.get("val"), Tensor):
                operand = _operand(node, source, forms[node])
                wanted.setdefault(source, set()).add(0 if operand.missing else operand.lead)


def _operands(
    nodes: Sequence[fx.Node], forms: dict[fx.Node, int], zeros: Sequence[fx.Node]
) -> dict[tuple[fx.Node, fx.Node], Operand]:
    """How each node on the path reads values that do not depend on the adjoint, by reader and value."""
    found: dict[tuple[fx.Node, fx.Node], Operand] = {}
    for node in nodes:
        if node.op == "placeholder" or node not in forms:
            continue
        for source in node.all_input_nodes:
            if source in forms and source not in zeros:
                continue
            if not isinstance(source.meta.get("val"), Tensor):
                if node.target not in _RESHAPES:
                    raise Inseparable(f"{node.target} reads a size that varies")
                continue
            found[node, source] = _operand(node, source, forms[node])
    return found


def _operand(node: fx.Node, source: fx.Node, form: int) -> Operand:
    if node.target is aten.mm.default and node.args[1] is source and node.args[0] is not source:
        return Operand(source)
    if node.target not in _ALIGNED and torch.Tag.pointwise not in getattr(node.target, "tags", ()):
        raise Inseparable(f"{node.target} of the adjoint and another value has no rule")
    shape = source.meta["val"].shape
    missing = len(node.meta["val"].shape) - len(shape)
    own = shape[: max(form - missing, 0)]
    if all(isinstance(size, int) and size == 1 for size in own):
        return Operand(source)
    return Operand(source, form, missing)


def _head(module: fx.GraphModule, wanted: list[fx.Node]) -> fx.GraphModule:
    """What ``wanted`` is computed from, as a graph of its own with the inputs of ``module`` but the first."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    _, *inputs = module.graph.find_nodes(op="placeholder")
    for node in inputs:
        copies[node] = graph.placeholder(str(node.target))
    needed: set[fx.Node] = set()
    stack = list(wanted)
    while stack:
        node = stack.pop()
        if node not in needed and node not in copies:
            needed.add(node)
            stack.extend(node.all_input_nodes)
    for node in module.graph.nodes:
        if node in needed:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output([copies[node] for node in wanted])
    return fx.GraphModule(module, graph)
