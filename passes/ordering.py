"""Bring the nodes of a graph, after others were inserted, into an order in which they can run."""

from __future__ import annotations

import heapq
import itertools
from collections import defaultdict
from collections.abc import Callable

from torch import fx

from lbi_compile.errors import EngineError


def sort(
    graph: fx.Graph,
    *,
    forward: Callable[[fx.Node], bool] | None = None,
    in_order: Callable[[fx.Node], bool] | None = None,
) -> None:
    """Order nodes so that each comes after its inputs, otherwise as they stand.

    Args:
        graph: Reordered in place.
        forward: Nodes that come before all others.
        in_order: Nodes that keep their order among themselves.

    Raises:
        EngineError: Nodes wait for each other.
    """
    nodes = list(graph.nodes)
    place = {node: i for i, node in enumerate(nodes)}
    missing = [len(node.all_input_nodes) for node in nodes]
    waiting: dict[int, list[int]] = defaultdict(list, {i: [place[user] for user in n.users] for n, i in place.items()})
    kept = [place[node] for node in nodes if in_order is not None and in_order(node)]
    for before, after in itertools.pairwise(kept):
        waiting[before].append(after)
        missing[after] += 1

    def key(i: int) -> tuple[bool, int]:
        first = nodes[i].op == "placeholder" or (forward is not None and forward(nodes[i]))
        return not first, i

    ready = [key(i) for i, count in enumerate(missing) if count == 0]
    heapq.heapify(ready)
    order: list[fx.Node] = []
    while ready:
        _, at = heapq.heappop(ready)
        order.append(nodes[at])
        for user in waiting[at]:
            missing[user] -= 1
            if missing[user] == 0:
                heapq.heappush(ready, key(user))
    if len(order) < len(nodes):
        raise EngineError(
            "latents of several bounded models whose adjoints depend on each other",
            expected="adjoints that can be solved one bounded model after the other",
            do="use backward='chain'",
        )
    for before, node in itertools.pairwise(order):
        if before.next is not node:
            before.append(node)
