"""Run a part of a captured graph on real numbers, for passes that measure what they cannot prove.

Contract: buffers, random state and gradients of the model are afterwards as before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from lbi_compile.passes.liveness import LIVE, Liveness


class Evaluator:
    """Holds every value of one forward run, and reruns parts of the graph from any float value.

    Args:
        gm: Captured graph.
        live: Its liveness.
        leaves: Input leaves to run on.
        seed: Seed of the random operators; a rerun draws what a run from there would draw.
    """

    def __init__(self, gm: fx.GraphModule, live: Liveness, leaves: Sequence[Any], *, seed: int = 0) -> None:
        self.gm, self.live, self.leaves, self.seed = gm, live, leaves, seed
        self._values: dict[fx.Node, Any] | None = None

    @property
    def values(self) -> dict[fx.Node, Any]:
        """Value of every node, without gradient."""
        if self._values is None:
            run = _Keep(self.gm)
            with torch.no_grad(), torch.random.fork_rng():
                torch.manual_seed(self.seed)
                run.run(*self.leaves, enable_io_processing=False)
            self._values = run.kept
        return self._values

    def function(self, source: fx.Node, sink: fx.Node) -> Callable[[Tensor], Tensor]:
        """The graph between two nodes as a function of one float tensor; every other value is as in the run."""
        position = {node: i for i, node in enumerate(self.gm.graph.nodes)}
        between = [
            node
            for node in self.gm.graph.nodes
            if position[source] < position[node] <= position[sink] and self.live.kind.get(node) == LIVE
        ]

        def run(value: Tensor) -> Tensor:
            interpreter = _Keep(self.gm)
            interpreter.env = {**self.values, source: value}
            for node in between:
                interpreter.env[node] = interpreter.run_node(node)
            return interpreter.env[sink]

        return run


class _Keep(fx.Interpreter):
    """Interpreter that keeps every value and runs on copies of the buffers."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm, garbage_collect_values=False)
        self.kept: dict[fx.Node, Any] = {}
        self._copies: dict[str, Any] = {}

    def fetch_attr(self, target: str) -> Any:
        if target not in self._copies:
            value = super().fetch_attr(target)
            private = isinstance(value, Tensor) and not isinstance(value, nn.Parameter)
            self._copies[target] = value.clone() if private else value
        return self._copies[target]

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        return None  # the exporter's guard module checks shapes; it computes nothing

    def run_node(self, n: fx.Node) -> Any:
        self.kept[n] = super().run_node(n)
        return self.kept[n]
