"""Names of nodes: module paths without call counters, source lines outside torch."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from lbi_compile.passes.names import describe, module_path, operator_name, source_line


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))])

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = self.blocks[0](x)
        return x * 2


def exported() -> list[fx.Node]:
    program = torch.export.export(Twice(), (torch.randn(4, 3),), strict=False)
    return [node for node in program.module(check_guards=False).graph.nodes if node.op == "call_function"]


def test_module_path_is_the_same_for_every_call_of_a_module():
    norms = [node for node in exported() if "batch_norm" in node.name]
    assert [module_path(node) for node in norms] == ["blocks.0.1", "blocks.0.1"]


def test_module_path_of_the_model_itself_and_of_a_bare_node_is_empty():
    graph = fx.Graph()
    assert module_path(exported()[-1]) == ""
    assert module_path(graph.placeholder("x")) == ""


def test_source_line_is_the_innermost_outside_torch():
    nodes = exported()
    norm = next(node for node in nodes if "batch_norm" in node.name)
    assert source_line(norm).endswith("in forward: x = self.blocks[0](x)")
    assert source_line(norm).startswith(f"{__file__}:")
    assert source_line(nodes[-1]).endswith("in forward: return x * 2")


def test_source_line_falls_back_to_torch_and_to_nothing():
    node = fx.Graph().placeholder("x")
    assert source_line(node) == ""
    node.meta["stack_trace"] = f'  File "{nn.__file__}", line 7, in forward\n    return F.relu(x)\n'
    assert source_line(node) == f"{nn.__file__}:7, in forward: return F.relu(x)"


def test_describe_names_operator_module_and_line():
    norm = next(node for node in exported() if "batch_norm" in node.name)
    assert operator_name(norm) == "aten.batch_norm"
    assert describe(norm) == f"aten.batch_norm in blocks.0.1 ({source_line(norm)})"
