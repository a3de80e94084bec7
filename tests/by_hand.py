"""Graphs and their liveness written by hand: what a pass is told, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from lbi_compile._torch import FakeTensorMode
from lbi_compile.passes.liveness import INPUT, LIVE, Liveness


class ByHand:
    """A graph that grows node by node; every call is live, every input an input."""

    def __init__(self) -> None:
        self.graph = fx.Graph()
        self.memory: dict[fx.Node, tuple[fx.Node, ...]] = {}
        self.overwritten: set[fx.Node] = set()

    def input(self, name: str, value: Any = (2, 3)) -> fx.Node:
        """An input of this value, or of this shape."""
        node = self.graph.placeholder(name)
        node.meta["val"] = torch.empty(value, device="meta") if isinstance(value, tuple) else value
        return node

    def call(
        self,
        name: str,
        *reads: fx.Node,
        target: Callable[..., Any] = torch.relu,
        value: Any = (2, 3),
        after: Sequence[fx.Node] = (),
    ) -> fx.Node:
        """A live call that reads nodes by value, and waits for those of ``after`` through memory."""
        node = self.graph.call_function(target, reads, name=name)
        node.meta["val"] = torch.empty(value, device="meta") if isinstance(value, tuple) else value
        if after:
            self.memory[node] = tuple(after)
        return node

    def chain(self, count: int, *, start: fx.Node, name: str = "n") -> list[fx.Node]:
        """Calls that each read the one before."""
        nodes = [start]
        for i in range(count):
            nodes.append(self.call(f"{name}{i}", nodes[-1]))
        return nodes[1:]

    def output(self, *results: fx.Node) -> fx.GraphModule:
        """The graph with these results."""
        self.graph.output(results)
        return fx.GraphModule(nn.Module(), self.graph)

    def live(self, *sinks: fx.Node) -> Liveness:
        """The record; without ``sinks`` the last call is the output."""
        kind = {n: INPUT if n.op == "placeholder" else LIVE for n in self.graph.nodes if n.op != "output"}
        waits = {n: tuple(dict.fromkeys((*n.all_input_nodes, *self.memory.get(n, ())))) for n in self.graph.nodes}
        live = tuple(n for n, k in kind.items() if k == LIVE)
        return Liveness(kind, waits, self.memory, frozenset(self.overwritten), live, sinks or live[-1:])


def symbolic() -> Callable[..., Tensor]:
    """Makes tensors of symbolic sizes: one symbol for each number, so that equal numbers are the same size."""
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    mode = FakeTensorMode(shape_env=ShapeEnv())
    return lambda *sizes, dtype=torch.float32: mode.from_tensor(torch.empty(sizes, dtype=dtype))
