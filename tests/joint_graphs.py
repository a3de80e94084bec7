"""Joint graphs written by hand, for the tests of what is cut out of them and put into them."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode


def value(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.double)


class Graph:
    """A joint graph written by hand; every node carries its value, or a fake one."""

    def __init__(self, *, fake: bool = False) -> None:
        self.graph = fx.Graph()
        self.root = nn.Module()
        self._mode = FakeTensorMode(allow_non_fake_inputs=True) if fake else contextlib.nullcontext()

    def input(self, name: str, *shape: int) -> fx.Node:
        node = self.graph.placeholder(name)
        with self._mode:
            node.meta["val"] = value(*shape)
        return node

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        node = self.graph.call_function(target, args, kwargs)
        with self._mode:
            node.meta["val"] = target(*fx.node.map_arg(args, lambda n: n.meta["val"]), **kwargs)
        return node

    def done(self, *results: fx.Node) -> fx.GraphModule:
        self.graph.output(results)
        return fx.GraphModule(self.root, self.graph)

    def constant(self, name: str, held: Tensor) -> fx.Node:
        self.root.register_buffer(name, held)
        node = self.graph.get_attr(name)
        with self._mode:
            node.meta["val"] = torch.empty_like(held)
        return node


def results(gm: fx.GraphModule, nodes: fx.Node | Sequence[fx.Node], *inputs: Any) -> Any:
    """What nodes of a joint graph give for these inputs, whatever the graph itself returns."""
    gm.graph.output_node().args = (nodes,)
    gm.graph.lint()
    gm.recompile()
    return gm(*inputs)
