"""Separators: the places where one tensor alone carries everything the rest of the model needs.

Contract: a captured graph and its liveness in, a frozen list of points in program order out; the graph is left alone.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from lbi_compile.passes.liveness import Liveness, is_float_tensor


@dataclass(frozen=True, slots=True)
class Separator:
    """One place to cut.

    Attributes:
        node: The lane, a float tensor every path from input to output passes.
        position: Its index among the live nodes, in program order; live nodes up to it lie before the cut.
    """

    node: fx.Node
    position: int


def separators(live: Liveness, *, main: frozenset[fx.Node] | None = None) -> tuple[Separator, ...]:
    """All one-lane separators, by one sweep over the live nodes in program order.

    A node is one iff no dependence spans it: every live value made before it and read after is the node itself, and
    nothing but its value is needed of it (no memory that it wrote or read). It must still be there at the end of its
    region, so nodes that a later one writes over are none.
    Values that are only returned do not count: an output made early leaves its region as a tap. Nor do paths that
    start after the cut, from an input that a later region reads itself.

    Args:
        live: Record of the liveness pass, whose ``waits`` hold read/write order too.
        main: Nodes that lead to the main output (``lanes.main_path``): only their reads count. What leads elsewhere, to
            an auxiliary loss for example, is a tap of the region it reads. By default all live nodes.

    Returns:
        Separators in program order. Cost: one pass over nodes and edges.
    """
    order = live.live
    position = {node: i for i, node in enumerate(order) if main is None or node in main}
    last = last_uses(live, main=main)
    # spans[i] counts what reaches past position i other than the value of order[i]
    spans = [0] * (len(order) + 1)
    for node, i in position.items():
        if last[node] > i:
            spans[i + 1] += 1
            spans[last[node]] -= 1
        for before in live.memory.get(node, ()):
            if before in position:
                spans[position[before]] += 1
                spans[i] -= 1
    found: list[Separator] = []
    running = 0
    for i, node in enumerate(order):
        running += spans[i]
        if node not in position:
            continue
        if running == 0 and last[node] > i and is_float_tensor(node) and node not in live.overwritten:
            found.append(Separator(node, i))
    return tuple(found)


def last_uses(live: Liveness, *, main: frozenset[fx.Node] | None = None) -> dict[fx.Node, int]:
    """Position of the last live node that waits for each live node; its own position where none does.

    A number (a size) read from a live tensor is no live node: it carries no gradient and crosses freely.
    """
    position = {node: i for i, node in enumerate(live.live) if main is None or node in main}
    last = dict(position)
    for node, i in position.items():
        for before in live.waits[node]:
            if before in last:
                last[before] = max(last[before], i)
    return last
