"""Vertex cuts: the fewest lanes that separate a graph within a window of its work.

Contract: liveness and a window of positions in, the nodes of a minimum cut out; the graph is left alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import networkx as nx
from networkx.algorithms.flow import boykov_kolmogorov
from torch import fx

from lbi_compile.passes.liveness import Liveness, is_float_tensor, is_random

_SOURCE, _SINK = "source", "sink"


def minimum_cut(
    live: Liveness,
    nodes: Sequence[fx.Node],
    *,
    users: Mapping[fx.Node, Sequence[fx.Node]],
    window: tuple[int, int],
    price: Callable[[fx.Node], int],
    free: frozenset[fx.Node],
) -> tuple[fx.Node, ...] | None:
    """The cheapest set of values that carries everything from before a window to after it.

    Every node is either computed before the cut or after it; a value computed before and read after is a lane and
    costs its price. Nodes before the window are computed before the cut, nodes after it after the cut. What a computed
    node waits for is computed; memory that a node writes does not cross; random draws keep their order.

    Args:
        live: Liveness of the graph.
        nodes: The nodes to cut, in program order.
        users: For every node those of ``nodes`` that wait for it.
        window: Positions ``(low, high)`` in ``nodes``: up to ``low`` all lies before the cut, from ``high`` on after.
        price: Price of a lane, a positive number.
        free: Values that may be read on both sides at no price.

    Returns:
        The lanes in program order; ``None`` where no set of float tensors cuts the window, or where nothing but free
        values needs to cross it.

    A minimum vertex cut by node capacities: each node is split into an edge of its price, dependences have infinite
    capacity in both directions of time (Menger's theorem; Boykov and Kolmogorov, 2004, for the flow).
    """
    low, high = window
    place = {node: i for i, node in enumerate(nodes)}
    graph = nx.DiGraph()
    graph.add_nodes_from((_SOURCE, _SINK))

    def made(node: fx.Node) -> object:  # on the source side iff the node is computed before the cut
        i = place[node]
        return _SOURCE if i <= low else _SINK if i >= high else (node, "made")

    def need(node: fx.Node) -> tuple[fx.Node, str]:  # on the source side iff all its readers are computed before
        return (node, "read")

    draws: fx.Node | None = None
    for i, node in enumerate(nodes):
        if i >= high:
            break
        later = [user for user in users[node] if place[user] > max(low, i)]
        if later:
            if node not in free:
                if is_float_tensor(node) and node not in live.overwritten:
                    graph.add_edge(made(node), need(node), capacity=price(node))
                else:
                    graph.add_edge(made(node), need(node))
                for user in later:
                    graph.add_edge(need(node), made(user))
            if i > low:
                for user in later:
                    if place[user] < high:
                        graph.add_edge(made(user), made(node))
        if i <= low:
            continue
        for before in live.memory.get(node, ()):
            if before in place:
                graph.add_edge(made(before), made(node))
                graph.add_edge(made(node), made(before))
        if is_random(node):
            if draws is not None:
                graph.add_edge(made(node), made(draws))
            draws = node
    for node in nodes[high:]:
        for before in live.memory.get(node, ()):
            if before in place and place[before] < high:
                graph.add_edge(made(before), _SINK)
    graph.remove_edges_from(list(nx.selfloop_edges(graph)))
    try:
        amount, (before_cut, _) = nx.minimum_cut(graph, _SOURCE, _SINK, flow_func=boykov_kolmogorov)
    except nx.NetworkXUnbounded:
        return None
    if amount == 0:
        return None
    lanes = [node for node in nodes[:high] if need(node) in graph and need(node) not in before_cut]
    return tuple(node for node in lanes if made(node) in before_cut)
