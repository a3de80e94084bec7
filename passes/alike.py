"""Find what several regions do alike and independently of each other, so that it can run as one batched operator.

A node of a joint graph is labelled with its region while the bounded model is traced (:func:`region_label`). Nodes of
several regions that call one operator on values of one shape form a :class:`Group`. Any such group may be run at once
as long as nothing in it waits for another of its nodes: no more likeness of the regions is needed for the result to be
right, only for it to be fast.
"""

from __future__ import annotations

import difflib
import operator
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import networkx as nx
import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from lbi_compile._torch import pytree

aten = torch.ops.aten

CHAIN, REGION, PART = "lbi_chain", "lbi_region", "lbi_part"
# What moves no number of its operand: worth batching only between operators that are.
VIEWS = {
    aten.t.default, aten.transpose.int, aten.permute.default, aten.view.default, aten._unsafe_view.default,
    aten.reshape.default, aten.expand.default, aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims,
    aten.slice.Tensor, aten.select.int, aten.detach.default, aten.alias.default,
}  # fmt: skip
# Operators whose work is worth a copy of their operands.
HEAVY = {aten.mm.default, aten.bmm.default, aten.addmm.default, aten.baddbmm.default, aten.convolution.default}
# Their meaning hangs on strides, which stacking changes.
_STRIDED = {aten.as_strided.default, aten.as_strided_scatter.default, aten.new_empty_strided.default}


@dataclass
class BatchRecord:
    """What was batched over regions in one compiled graph.

    Attributes:
        groups: Operators that now run once for several regions.
        nodes: Nodes they stand for.
        stacks: How often values of several regions are copied into one tensor at every step.
        stacked_numbers: How many numbers of parameters are copied so: the memory that batching costs.
        sums: Chains of additions over regions that became one sum.
        unbatched: Operator to the reason why it still runs once per region.
        seconds: Time the pass took.
    """

    groups: int = 0
    nodes: int = 0
    stacks: int = 0
    stacked_numbers: int = 0
    sums: int = 0
    unbatched: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """One operator of several regions.

    Attributes:
        members: Nodes by region, in the order of the regions; all call one operator on operands of one shape.
        forward: They belong to the forward.
    """

    members: dict[int, fx.Node]
    forward: bool

    @property
    def regions(self) -> tuple[int, ...]:
        """Regions that take part."""
        return tuple(self.members)

    @property
    def first(self) -> fx.Node:
        """The node that stands for all."""
        return next(iter(self.members.values()))


class Label(NamedTuple):
    """Whose a node is.

    Attributes:
        chain: Bounded model.
        part: What it is of the region: ``""`` for itself, or a name for what was inserted for it.
        region: Number of the region.
    """

    chain: int
    part: str
    region: int


_SEVERAL = Label(-1, "", -1)  # of a sum over regions


def region_label(node: fx.Node) -> Label | None:
    """Region that ``node`` was traced in; ``None`` outside of regions."""
    label = node.meta.get("custom") or {}
    return Label(label[CHAIN], label.get(PART, ""), label[REGION]) if REGION in label else None


def is_forward(node: fx.Node) -> bool:
    """AOTAutograd's word for whether ``node`` was traced in the forward."""
    return node.meta.get("partitioner_tag") in ("is_forward", "must_be_in_forward")


def groups(graph: fx.Graph) -> list[Group]:
    """Groups that can all be batched together, with the copies that it takes paying off.

    Args:
        graph: Joint graph; nodes carry ``meta["val"]``, regions are labelled.

    Returns:
        Groups of two nodes or more; no node is in two. Replacing each by one node leaves the graph without cycles.
    """
    found = [group for lists in _regions(graph).values() for group in _align(lists)]
    found = _independent(graph, found)
    while True:
        kept = _worthwhile(found)
        if len(kept) == len(found):
            return kept
        found = kept


def _regions(graph: fx.Graph) -> dict[Hashable, dict[int, list[fx.Node]]]:
    """By bounded model, part and direction, the nodes of each region that may be batched, in the order of the graph."""
    lists: dict[Hashable, dict[int, list[fx.Node]]] = defaultdict(lambda: defaultdict(list))
    labels: dict[fx.Node, Label | None] = {}
    for node in graph.nodes:
        label = region_label(node)
        if label is None and node.target is aten.add.Tensor:
            # autograd adds gradients up outside of any region; what it adds up within one belongs there, and what
            # all regions get alike (the readout's gradient) belongs to each; what two regions gave belongs to none
            around = {labels[a] for a in node.all_input_nodes} - {None}
            label = around.pop() if len(around) == 1 else _SEVERAL if around else None
        labels[node] = label
        if label is not None and label is not _SEVERAL and _may_join(node):
            lists[label.chain, label.part, is_forward(node)][label.region].append(node)
    return lists


def _may_join(node: fx.Node) -> bool:
    if node.op != "call_function" or node.target in _STRIDED:
        return False
    value = node.meta.get("val")
    leaves = [leaf for leaf in pytree.tree_leaves(value) if leaf is not None]
    if not leaves or not all(isinstance(leaf, Tensor) for leaf in leaves):
        return False
    if not isinstance(node.target, torch._ops.OpOverload) or node.target.namespace == "lbi":
        return False
    tensors = any(isinstance(a.meta.get("val"), Tensor) for a in node.all_input_nodes)
    return tensors and not draws(node) and not node.target._schema.is_mutable


def producer(node: fx.Node) -> fx.Node:
    """The operator that ``node`` is an output of: itself, or the one whose outputs it picks from."""
    return node.args[0] if node.target is operator.getitem else node  # pyright: ignore[reportReturnType]


def consumers(node: fx.Node) -> Iterator[fx.Node]:
    """Nodes that read an output of ``node``."""
    for user in node.users:
        if user.target is operator.getitem:
            yield from user.users
        else:
            yield user


def draws(node: fx.Node) -> bool:
    """The node draws random numbers."""
    return isinstance(node.target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags


def signature(node: fx.Node) -> Hashable:
    """Equal for two nodes that call one operator with equal constants on values of equal shapes and dtypes."""

    def describe(a: fx.Node) -> str:
        return describe_value(a.meta.get("val"))

    # printed, for then constants of another type differ and lists can be hashed
    args, kwargs = map_arg((node.args, node.kwargs), lambda a: _Described(describe(a)))
    return str(node.target), str(args), str(kwargs), describe(node)


class _Described(str):
    __slots__ = ()

    def __repr__(self) -> str:
        return f"<{self!s}>"


def describe_value(value: Any) -> str:
    """Shapes and dtypes of the tensors in ``value``."""
    if isinstance(value, Tensor):
        return f"{[str(size) for size in value.shape]} {value.dtype} {value.device}"
    if isinstance(value, (tuple, list)):
        return f"({', '.join(map(describe_value, value))})"
    return str(value)


def _align(lists: dict[int, list[fx.Node]]) -> Iterator[Group]:
    """Bring the nodes of all regions in line with those of the longest; like regions agree node by node."""
    if len(lists) < 2:
        return
    signatures = {k: [signature(node) for node in nodes] for k, nodes in lists.items()}
    # the list that most regions have, of those the longest
    common = Counter(tuple(lines) for lines in signatures.values())
    template = list(max(common, key=lambda lines: (common[lines], len(lines))))
    if common[tuple(template)] == 1:
        template = max(signatures.values(), key=len)
    members: list[dict[int, fx.Node]] = [{} for _ in template]
    for k in sorted(lists):
        for at, place in _matches(template, signatures[k]):
            members[at][k] = lists[k][place]
    for found in members:
        if len(found) > 1:
            yield Group(found, is_forward(next(iter(found.values()))))


def _matches(template: Sequence[Hashable], lines: Sequence[Hashable]) -> Iterable[tuple[int, int]]:
    if list(template) == list(lines):
        return zip(range(len(template)), range(len(lines)), strict=True)
    blocks = difflib.SequenceMatcher(None, template, lines, autojunk=False).get_matching_blocks()
    return [(block.a + i, block.b + i) for block in blocks for i in range(block.size)]


def _independent(graph: fx.Graph, found: list[Group]) -> list[Group]:
    """Groups none of which waits for itself, directly or through others; those that do are split, or given up."""
    while True:
        waits = _quotient(graph, found)
        knots = [knot for knot in nx.strongly_connected_components(waits) if len(knot) > 1]
        knots += [{here} for here in nx.nodes_with_selfloops(waits) if not any(here in knot for knot in knots)]
        if not knots:
            return found
        parts = _split(graph, [group for group in found if any(group in knot for knot in knots)])
        left: list[Group] = []
        for group in found:
            knot = next((knot for knot in knots if group in knot), None)
            if knot is None:
                left.append(group)
            elif len(parts[group]) > 1:
                left += [part for part in parts[group] if len(part.members) > 1]
            elif any(len(parts[other]) > 1 for other in knot if isinstance(other, Group)):
                left.append(group)  # perhaps it was only the others that tied the knot
        found = left


def _split(graph: fx.Graph, found: Sequence[Group]) -> dict[Group, list[Group]]:
    """Split each group into members that wait for the same other members of it.

    The last region, say, is differentiated before the adjoints of the latents are known, and all others after.
    """
    bits = {node: 1 << i for i, node in enumerate(node for group in found for node in group.members.values())}
    before: dict[fx.Node, int] = {}  # what each node waits for, as a set of bits
    for node in graph.nodes:
        waits = 0
        for a in node.all_input_nodes:
            waits |= before[a] | bits.get(a, 0)
        before[node] = waits
    parted = {}
    for group in found:
        own = sum(bits[node] for node in group.members.values())
        parts: dict[int, dict[int, fx.Node]] = defaultdict(dict)
        for k, node in group.members.items():
            parts[before[node] & own][k] = node
        parted[group] = [Group(part, group.forward) for part in parts.values()]
    return parted


def quotient(graph: fx.Graph, found: Sequence[Group]) -> Iterator[fx.Node | Group]:
    """Nodes of ``graph`` and, in place of their members, the groups, each after all that it waits for."""
    return nx.topological_sort(_quotient(graph, found))


def _quotient(graph: fx.Graph, found: Sequence[Group]) -> nx.DiGraph:
    of = {node: group for group in found for node in group.members.values()}
    waits = nx.DiGraph()
    last: fx.Node | None = None
    for node in graph.nodes:
        if node.target is operator.getitem:
            continue
        here: Any = of.get(node, node)
        waits.add_node(here)
        for before in map(producer, node.all_input_nodes):
            waits.add_edge(of.get(before, before), here)
        if draws(node):
            # random numbers have to be drawn in the order of the program
            if last is not None:
                waits.add_edge(last, node)
            last = node
    return waits


def _worthwhile(found: Sequence[Group]) -> list[Group]:
    """Without groups that would copy their operands only to be taken apart again.

    In a backward what is taken apart are mostly gradients of parameters, which are views then and cost nothing.
    """
    batched = {node for group in found for node in group.members.values()}

    def pays(group: Group) -> bool:
        if group.first.target in HEAVY or not (group.forward or group.first.target in VIEWS):
            return True
        members = group.members.values()
        if any(producer(a) in batched for node in members for a in node.all_input_nodes):
            return True
        return all(user in batched for node in members for user in consumers(node))

    return [group for group in found if pays(group)]
