"""The longest chain of operators that wait for each other."""

from __future__ import annotations

import operator

import pytest
import torch
from torch import fx, nn

from lbi_compile.passes.critical_path import critical_path

aten = torch.ops.aten


def test_the_longest_of_two_ways_counts() -> None:
    graph = fx.symbolic_trace(lambda x, y: (x.sin().cos().tan() + y.exp(), x.relu())).graph
    assert critical_path(graph) == 4


def test_inputs_attributes_and_outputs_are_no_steps() -> None:
    module = fx.symbolic_trace(nn.Linear(2, 2), concrete_args={})
    assert critical_path(module.graph) == 1
    graph = fx.Graph()
    assert critical_path(graph) == 0
    graph.output(graph.placeholder("x"))
    assert critical_path(graph) == 0


def test_calls_of_every_kind_are_steps() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(self.layer(x).abs())

    graph = fx.symbolic_trace(Model()).graph
    assert {node.op for node in graph.nodes} >= {"call_module", "call_method", "call_function"}
    assert critical_path(graph) == 3


def test_views_and_picking_an_output_cost_nothing() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    turned = graph.call_function(aten.t.default, (x,))
    pair = graph.call_function(aten.aminmax.default, (turned,))
    first = graph.call_function(operator.getitem, (pair, 0))
    graph.output(graph.call_function(aten.sin.default, (graph.call_function(aten.view.default, (first, [-1])),)))
    assert critical_path(graph) == 2


@pytest.mark.parametrize(
    ("K", "steps"), [(1, 1), (2, 1), (3, 2), (4, 2), (5, 3), (8, 3), (9, 4), (16, 4), (17, 5), (64, 6)]
)
@pytest.mark.parametrize("scan", [torch.ops.lbi.suffix_scan.default, torch.ops.lbi.prefix_scan.default])
def test_a_scan_takes_the_logarithm_of_its_steps(scan: torch._ops.OpOverload, K: int, steps: int) -> None:
    graph = fx.Graph()
    J, last = graph.placeholder("J"), graph.placeholder("last")
    node = graph.call_function(scan, (J, last))
    node.meta["val"] = torch.empty(K + 1, 2, 3)
    graph.output(graph.call_function(aten.sin.default, (node,)))
    assert critical_path(graph) == steps + 1


def test_a_scan_without_a_value_is_one_step() -> None:
    graph = fx.Graph()
    graph.output(graph.call_function(torch.ops.lbi.suffix_scan.default, (graph.placeholder("J"),)))
    assert critical_path(graph) == 1
