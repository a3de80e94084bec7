"""Run a part of a captured graph on real numbers, for passes that measure what they cannot prove.

Contract: inputs, buffers, random state and gradients of the model are afterwards as before.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn

from lbi_compile._torch import is_fake
from lbi_compile.passes.liveness import LIVE, Liveness, is_mutating


class Evaluator:
    """Reruns parts of a graph from any float value, with every other value as in one forward run.

    Of that run only what parts of the graph are likely to read is kept; the rest is computed again when asked for.

    Args:
        gm: Captured graph.
        live: Its liveness.
        leaves: Input leaves to run on.
        seed: Seed of the random operators; every run of one part draws the same numbers.
        keep: Live nodes whose values are going to be asked for; those of other kinds are kept anyway.
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        live: Liveness,
        leaves: Sequence[Any],
        *,
        seed: int = 0,
        keep: Iterable[fx.Node] = (),
    ) -> None:
        self.gm, self.live, self.leaves, self.seed = gm, live, leaves, seed
        self.values: Mapping[fx.Node, Any] = _Values(self)
        self._nodes = list(gm.graph.nodes)
        self._position = {node: i for i, node in enumerate(self._nodes)}
        self._keep = {*keep, *(node for node in self._nodes if node.op != "output" and live.kind[node] != LIVE)}
        self._kept: dict[fx.Node, Any] = {}
        self._interpreter = _OnCopies(gm)

    def take(self, nodes: Iterable[fx.Node]) -> dict[fx.Node, Any]:
        """Values of these nodes in the run, without gradient."""
        wanted = dict.fromkeys(nodes)
        missing = wanted.keys() - self._kept.keys()
        if missing:
            with self._draws():
                self._kept.update(self._until(None, keep=missing if self._kept else missing | self._keep))
        return {node: self._kept[node] for node in wanted}

    @cached_property
    def has_numbers(self) -> bool:
        """The model has real numbers to run on (it is not on the meta device, and not fake)."""
        return not any(p.is_meta or is_fake(p) for p in self.gm.parameters())

    def outputs(self, leaves: Sequence[Any]) -> list[Any]:
        """The model's outputs on other input leaves."""
        (results,) = self.gm.graph.output_node().args
        assert isinstance(results, (tuple, list))
        with self._draws():
            values = self._until(None, leaves, keep={leaf for leaf in results if isinstance(leaf, fx.Node)})
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
        nodes, at = self._nodes, self._position
        first = at[source] + 1 if inside is None else min((at[node] for node in inside), default=at[sink])

        @functools.cache
        def plan() -> tuple[bool, _Steps, list[fx.Node]]:
            between = nodes[first : at[sink] + 1]
            again = set(between if inside is None else inside)
            live = [node for node in between if node in again and self.live.kind.get(node) == LIVE]
            # nodes that write to memory need it as it was before them, and would spoil the values that are kept
            writes = any(is_mutating(node) for node in live)
            steps = _Steps([node for node in (between if writes else live) if node is not source], keep=[sink])
            return writes, steps, [node for node in steps.reads if node is not source]

        def run(value: Tensor) -> Tensor:
            writes, steps, reads = plan()
            with self._draws():
                if writes:
                    # the source among them: what is written before it is made is not to be repeated
                    last = source if inside is None else nodes[first - 1]
                    # recorded, for autograd has to know which views share the memory that is written to
                    env = {**self._until(last, keep=reads, recorded=torch.is_grad_enabled()), source: value.clone()}
                else:
                    env = {**self.take(reads), source: value}
                return self._run(steps, env)[sink]

        return run

    def _until(
        self,
        last: fx.Node | None,
        given: Sequence[Any] | None = None,
        *,
        keep: Collection[fx.Node],
        recorded: bool = False,
    ) -> dict[fx.Node, Any]:
        """Values of the nodes of ``keep`` up to ``last``, computed on copies of inputs and buffers."""
        given = self.leaves if given is None else given
        leaves = [leaf.detach().clone() if isinstance(leaf, Tensor) else leaf for leaf in given]
        env = dict(zip(self.gm.graph.find_nodes(op="placeholder"), leaves, strict=True))
        end = len(self._nodes) if last is None else self._position[last] + 1
        steps = _Steps([n for n in self._nodes[:end] if n.op not in ("placeholder", "output")], keep=keep)
        with torch.set_grad_enabled(recorded):
            return self._run(steps, env)

    def _run(self, steps: _Steps, env: dict[fx.Node, Any]) -> dict[fx.Node, Any]:
        run = self._interpreter
        run.start(env)
        try:
            for node, call, dead in zip(steps.nodes, steps.calls, steps.dead, strict=True):
                env[node] = run.run_node(node) if call is None else call(env)
                for seen in dead:
                    env.pop(seen, None)
        finally:
            run.start({})
        return {node: env[node] for node in steps.keep if node in env}

    @contextlib.contextmanager
    def _draws(self) -> Iterator[None]:
        """Random numbers from the seed; afterwards the generators are as they were."""
        with torch.random.fork_rng(devices=self._devices):
            # not torch.manual_seed, which would change the generators of all other devices too
            for generator in (torch.default_generator, *(torch.cuda.default_generators[i] for i in self._devices)):
                generator.manual_seed(self.seed)
            yield

    @cached_property
    def _devices(self) -> list[int]:
        tensors = itertools.chain(self.gm.parameters(), (leaf for leaf in self.leaves if isinstance(leaf, Tensor)))
        return sorted({tensor.device.index for tensor in tensors if tensor.is_cuda})


class _Steps:
    """Nodes to run one after another.

    Attributes:
        nodes: The nodes in program order.
        keep: Nodes whose values are wanted at the end.
        dead: For each node those whose values nobody wants any more once it has run.
        reads: Other nodes whose values they read.
        calls: For each node how to run it with the values so far; ``None`` where that takes an interpreter.
    """

    def __init__(self, nodes: Sequence[fx.Node], *, keep: Iterable[fx.Node]) -> None:
        self.nodes, self.keep = nodes, frozenset(keep)
        self.calls = [_call(node) for node in nodes]
        last = {node: i for i, node in enumerate(nodes)}
        inside = set(last)
        for i, node in enumerate(nodes):
            last.update(dict.fromkeys(node.all_input_nodes, i))
        self.dead: list[list[fx.Node]] = [[] for _ in nodes]
        for node, i in last.items():
            if node not in self.keep:
                self.dead[i].append(node)
        self.reads = [node for node in last if node not in inside]


def _call(node: fx.Node) -> Callable[[Mapping[fx.Node, Any]], Any] | None:
    """Calls the node's operator; an interpreter would look for nodes among its arguments anew in every run."""
    if node.op != "call_function" or node.kwargs:
        return None
    target, given = node.target, list(node.args)
    reads = [(i, arg) for i, arg in enumerate(given) if isinstance(arg, fx.Node)]
    if not callable(target) or len(reads) != len(node.all_input_nodes):  # a list of nodes, or a node read twice
        return None

    def call(env: Mapping[fx.Node, Any]) -> Any:
        args = given.copy()
        for i, source in reads:
            args[i] = env[source]
        return target(*args)

    return call


class _Values(Mapping[fx.Node, Any]):
    """The values of an evaluator's run by node."""

    def __init__(self, of: Evaluator) -> None:
        self._of = of

    def __getitem__(self, node: fx.Node) -> Any:
        return self._of.take([node])[node]

    def __iter__(self) -> Iterator[fx.Node]:
        return (node for node in self._of.gm.graph.nodes if node.op != "output")

    def __len__(self) -> int:
        return sum(1 for _ in self)


class _OnCopies(fx.Interpreter):
    """Interpreter that runs on copies of the buffers."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm, garbage_collect_values=False)
        self._copies: dict[str, Any] = {}

    def start(self, env: dict[fx.Node, Any]) -> None:
        """Read values from ``env`` and buffers as they are now."""
        self.env, self._copies = env, {}

    def run_node(self, n: fx.Node) -> Any:
        # without the bookkeeping for tracers, which takes longer than a small operator
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        return getattr(self, n.op)(n.target, args, kwargs)

    def fetch_attr(self, target: str) -> Any:
        if target not in self._copies:
            value = super().fetch_attr(target)
            private = isinstance(value, Tensor) and not isinstance(value, nn.Parameter)
            self._copies[target] = value.clone() if private else value
        return self._copies[target]

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        return None  # the exporter's guard module checks shapes; it computes nothing
