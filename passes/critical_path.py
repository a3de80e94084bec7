"""Count the operators of a graph that have to run one after another, however many could run at a time."""

from __future__ import annotations

import operator

import torch
from torch import Tensor, fx

import lbi_compile.kernels.ops  # noqa: F401  registers the operators
from lbi_compile.passes.alike import VIEWS

SCANS = {torch.ops.lbi.suffix_scan.default, torch.ops.lbi.prefix_scan.default}


def critical_path(graph: fx.Graph) -> int:
    """Length of the longest chain of operators that wait for each other.

    Views and picking one of several outputs cost nothing, a scan of K steps `ceil(log2 K)` (by products of affine maps;
    the kernels may choose more dependent steps of less work), any other operator 1, whatever its size.

    Args:
        graph: Nodes carry ``meta["val"]``.

    Example:
        >>> from torch import fx
        >>> critical_path(fx.symbolic_trace(lambda x: (x.sin() + x.cos()).exp()).graph)
        3
    """
    depth: dict[fx.Node, int] = {}
    for node in graph.nodes:
        depth[node] = _steps(node) + max((depth[a] for a in node.all_input_nodes), default=0)
    return max(depth.values(), default=0)


def _steps(node: fx.Node) -> int:
    if node.op not in ("call_function", "call_method", "call_module"):
        return 0
    if node.target in VIEWS or node.target is operator.getitem:
        return 0
    value = node.meta.get("val")
    if node.target in SCANS and isinstance(value, Tensor):
        return max(1, (int(value.shape[0]) - 2).bit_length())
    return 1
