"""Captured models for tests: a part of a graph with its shapes, its values and a function that runs it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim

from lbi_compile._torch import silent_export
from lbi_compile.passes.axes import Verdict, classify, classify_positions
from lbi_compile.passes.costs import costs
from lbi_compile.passes.layouts import Layout


@dataclass
class Program:
    """A captured model and the part of it from ``source`` to ``output``, its first output by default."""

    gm: fx.GraphModule
    x: Tensor
    source: fx.Node
    output: fx.Node | None = None

    def __post_init__(self) -> None:
        order = list(self.gm.graph.nodes)
        self.sink: fx.Node = self.output or self.gm.graph.output_node().all_input_nodes[0]
        self.nodes = [n for n in order[order.index(self.source) + 1 :] if n.op == "call_function"]
        self.shapes = costs(self.gm, example=(self.x,)).shape
        self._kept = _Keep(self.gm)
        with torch.no_grad():
            self._kept.run(self.x)
        self.values = dict(self._kept.env)

    def run(self, value: Tensor) -> Tensor:
        """The nodes on real numbers."""
        self._kept.env = {**self.values, self.source: value}
        for node in self.nodes:
            self._kept.env[node] = self._kept.run_node(node)
        return self._kept.env[self.sink]

    def ask(self, axis: int, *, measure: bool = False) -> Verdict:
        """``classify`` along an axis of input and output."""
        extra: dict[str, Any] = {"fn": self.run, "example": self.values[self.source]} if measure else {}
        ends: dict[str, Any] = {"source": self.source, "sink": self.sink, "shapes": self.shapes}
        return classify(self.nodes, axis_in=axis, axis_out=axis, **ends, **extra)

    def positions(self, before: Layout, after: Layout | None = None, *, measure: bool = False) -> Verdict:
        """``classify_positions`` from the input's layout to the output's."""
        extra: dict[str, Any] = {"fn": self.run, "example": self.values[self.source]} if measure else {}
        layouts: dict[str, Any] = {"source_layout": before, "sink_layout": after or before}
        return classify_positions(
            self.nodes, source=self.source, sink=self.sink, **layouts, shapes=self.shapes, **extra
        )


class _Keep(fx.Interpreter):
    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm, garbage_collect_values=False)


def program(
    model: nn.Module, x: Tensor, *, training: bool = True, dims: int | Sequence[int] = 0, source: str = ""
) -> Program:
    """Capture; the first ``dims`` axes (or these) are dynamic; ``source`` is the node named so, else the input."""
    axes = range(dims) if isinstance(dims, int) else dims
    shapes = ({i: Dim.DYNAMIC for i in axes},) if axes else None
    with silent_export():
        exported = torch.export.export(model.train(training), (x,), dynamic_shapes=shapes, strict=False)
    gm = exported.module(check_guards=False)
    assert isinstance(gm, fx.GraphModule)
    nodes = list(gm.graph.nodes)
    found = next(n for n in nodes if (n.name.startswith(source) if source else n.op == "placeholder"))
    return Program(gm, x, found)


class Apply(nn.Module):
    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)
