"""Run a part of a captured graph on real numbers, for passes that measure what they cannot prove.

Contract: inputs, buffers, random state and gradients of the model are afterwards as before.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from lbi_compile._torch import is_fake
from lbi_compile.passes.liveness import LIVE, Liveness, is_mutating


class Evaluator:
    """Holds every value of one forward run, and reruns parts of the graph from any float value.

    Args:
        gm: Captured graph.
        live: Its liveness.
        leaves: Input leaves to run on.
        seed: Seed of the random operators; every run of one part draws the same numbers.
    """

    def __init__(self, gm: fx.GraphModule, live: Liveness, leaves: Sequence[Any], *, seed: int = 0) -> None:
        self.gm, self.live, self.leaves, self.seed = gm, live, leaves, seed
        self._values: dict[fx.Node, Any] | None = None

    @property
    def values(self) -> dict[fx.Node, Any]:
        """Value of every node, without gradient."""
        if self._values is None:
            with self._draws():
                self._values = self._until(None)
        return self._values

    @property
    def has_numbers(self) -> bool:
        """The model has real numbers to run on (it is not on the meta device, and not fake)."""
        return not any(p.is_meta or is_fake(p) for p in self.gm.parameters())

    def outputs(self, leaves: Sequence[Any]) -> list[Any]:
        """The model's outputs on other input leaves."""
        (results,) = self.gm.graph.output_node().args
        assert isinstance(results, (tuple, list))
        with self._draws():
            values = self._until(None, leaves)
        return [values[leaf] if isinstance(leaf, fx.Node) else leaf for leaf in results]

    def function(
        self, source: fx.Node, sink: fx.Node, inside: Sequence[fx.Node] | None = None
    ) -> Callable[[Tensor], Tensor]:
        """The graph between two nodes as a function of one float tensor; every other value is as in the run.

        Args:
            source: The node whose value is the argument.
            sink: The node whose value is the result.
            inside: Live nodes to run again, in program order; by default all between the two.
        """
        nodes = list(self.gm.graph.nodes)
        at = {node: i for i, node in enumerate(nodes)}
        first = at[source] + 1 if inside is None else min((at[node] for node in inside), default=at[sink])
        between = nodes[first : at[sink] + 1]
        again = set(between if inside is None else inside)
        live = [node for node in between if node in again and self.live.kind.get(node) == LIVE]
        # nodes that write to memory need it as it was before them, and would spoil the values that are kept
        writes = any(is_mutating(node) for node in live)

        def run(value: Tensor) -> Tensor:
            interpreter = _OnCopies(self.gm)
            with self._draws():
                if writes:
                    # the source among them: what is written before it is made is not to be repeated
                    before = self._until(source if inside is None else nodes[first - 1])
                    interpreter.env = {**before, source: value.clone()}
                else:
                    interpreter.env = {**self.values, source: value}
                for node in between if writes else live:
                    if node is not source:
                        interpreter.env[node] = interpreter.run_node(node)
            return interpreter.env[sink]

        return run

    def _until(self, last: fx.Node | None, given: Sequence[Any] | None = None) -> dict[fx.Node, Any]:
        """Values of all nodes up to ``last``, computed on copies of inputs and buffers."""
        run = _OnCopies(self.gm)
        given = self.leaves if given is None else given
        leaves = [leaf.detach().clone() if isinstance(leaf, Tensor) else leaf for leaf in given]
        run.env = dict(zip(self.gm.graph.find_nodes(op="placeholder"), leaves, strict=True))
        with torch.no_grad():
            for node in self.gm.graph.nodes:
                if node.op not in ("placeholder", "output"):
                    run.env[node] = run.run_node(node)
                if node is last:
                    break
        return run.env

    @contextlib.contextmanager
    def _draws(self) -> Iterator[None]:
        """Random numbers from the seed; afterwards the generators are as they were."""
        tensors = itertools.chain(self.gm.parameters(), (leaf for leaf in self.leaves if isinstance(leaf, Tensor)))
        devices = sorted({tensor.device.index for tensor in tensors if tensor.is_cuda})
        with torch.random.fork_rng(devices=devices):
            # not torch.manual_seed, which would change the generators of all other devices too
            for generator in (torch.default_generator, *(torch.cuda.default_generators[i] for i in devices)):
                generator.manual_seed(self.seed)
            yield


class _OnCopies(fx.Interpreter):
    """Interpreter that runs on copies of the buffers."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm, garbage_collect_values=False)
        self._copies: dict[str, Any] = {}

    def fetch_attr(self, target: str) -> Any:
        if target not in self._copies:
            value = super().fetch_attr(target)
            private = isinstance(value, Tensor) and not isinstance(value, nn.Parameter)
            self._copies[target] = value.clone() if private else value
        return self._copies[target]

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        return None  # the exporter's guard module checks shapes; it computes nothing
