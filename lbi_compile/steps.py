"""What lies between two neighbouring separators: whether it is position-wise, and where finishes begin."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Hashable, Sequence

from torch import Tensor, fx

from .passes import axes
from .passes.costs import Costs
from .passes.evaluate import Evaluator
from .passes.layouts import layout
from .passes.liveness import LIVE, NUMBER, Liveness
from .passes.repeats import form_of_nodes
from .passes.separators import Separator


class Steps:
    """Answers, once each, whether the graph between two neighbouring separators is position-wise."""

    def __init__(self, live: Liveness, cost: Costs, evaluator: Evaluator, batch: str | None) -> None:
        self.live, self.cost, self.evaluator, self.batch = live, cost, evaluator, batch
        self._position = {node: i for i, node in enumerate(live.live)}
        order = {node: i for i, node in enumerate(evaluator.gm.graph.nodes)}
        self._order, self._inner = order, [node for node in order if live.kind.get(node) in (LIVE, NUMBER)]
        self._known: dict[tuple[fx.Node, fx.Node], bool] = {}
        self._mixing: set[Hashable] = set()

    def position_wise(self, source: fx.Node, sink: fx.Node) -> bool:
        key = (source, sink)
        if key not in self._known:
            self._known[key] = folded_rank(source) == 3 and folded_rank(sink) == 3 and self._classify(source, sink)
        return self._known[key]

    def _classify(self, source: fx.Node, sink: fx.Node) -> bool:
        """Position-wise along every position axis."""
        before, after = layout(source, batch=self.batch), layout(sink, batch=self.batch)
        if len(before.positions) != len(after.positions):
            return False
        nodes = self._between(source, sink)
        # layers wired like one that mixes count as mixing too: with other weights they might not, but unsure is coupled
        form = before, after, form_of_nodes(nodes, source=source, shapes=self.cost.shape)
        if form in self._mixing:
            return False
        fn = measurable(self.evaluator, source, sink)
        found = all(
            axes.classify(
                nodes,
                source=source,
                sink=sink,
                axis_in=axis_in,
                axis_out=axis_out,
                shapes=self.cost.shape,
                fn=fn,
                example=self.evaluator.values[source] if fn else None,
                kinds=("position-wise",),
            ).kind
            == "position-wise"
            for axis_in, axis_out in zip(before.positions, after.positions, strict=True)
        )
        if not found:
            self._mixing.add(form)
        return found

    def _between(self, source: fx.Node, sink: fx.Node) -> list[fx.Node]:
        """Live nodes after ``source`` up to ``sink`` in program order, with the sizes they use."""
        first, last = (bisect_right(self._inner, self._order[n], key=self._order.__getitem__) for n in (source, sink))
        return self._inner[first:last]

    def finish(self, start: fx.Node, end: fx.Node, points: Sequence[Separator]) -> fx.Node:
        """The first separator of the region after which all is position-wise; ``end`` where the last op mixes."""
        position = self._position
        inside = [p.node for p in points if position.get(start, -1) < p.position < position[end]]
        found = end
        for before in [*reversed(inside), start]:
            if not self.position_wise(before, found):
                break
            found = before
        return found


def measurable(
    evaluator: Evaluator, source: fx.Node, sink: fx.Node, inside: Sequence[fx.Node] | None = None
) -> Callable[[Tensor], Tensor] | None:
    """The graph between two nodes as a function; ``None`` for a model without numbers (meta or fake)."""
    return evaluator.function(source, sink, inside) if evaluator.has_numbers else None


def folded_rank(node: fx.Node) -> int:
    """2 for a value without positions, 3 for one with."""
    return min(node.meta["val"].dim(), 3)
