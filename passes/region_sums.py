"""Sum values of all regions at once where a graph adds them up one after another."""

from __future__ import annotations

import operator
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, fx

from lbi_compile._torch import same_shape

aten = torch.ops.aten
# Fewer additions than this are no slower than a sum.
_FEWEST = 3


def sum_over_regions(graph: fx.Graph) -> int:
    """Replace chains of additions whose terms are items of one tensor ``[regions, ...]`` by a sum over its regions.

    Args:
        graph: Changed in place; nodes carry ``meta["val"]`` and need not stand in an order. Dead nodes are left.

    Returns:
        How many sums were made. They round otherwise than the chains, and no worse.
    """
    made = 0
    for root in reversed(list(graph.nodes)):
        if not _adds(root) or any(_adds(user) and _plain(user, root) for user in root.users if len(root.users) == 1):
            continue
        terms = _terms(root, root)
        by_base: dict[fx.Node, dict[int, fx.Node]] = defaultdict(dict)
        rest = []
        for term in terms:
            base, at = item_of(term) or (term, 0)
            if base is term or at in by_base[base]:
                rest.append(term)
            else:
                by_base[base][at] = term
        sums = []
        for base, items in by_base.items():
            if len(items) < _FEWEST or sorted(items) != list(range(min(items), max(items) + 1)):
                rest += items.values()
                continue
            with graph.inserting_before(root):
                whole = base
                if len(items) < base.meta["val"].shape[0]:
                    whole = _call(graph, aten.slice.Tensor, (base, 0, min(items), max(items) + 1), root)
                    whole.meta["val"] = base.meta["val"][min(items) : max(items) + 1]
                sums.append(_call(graph, aten.sum.dim_IntList, (whole, [0]), root))
        if not sums:
            continue
        made += len(sums)
        total, *others = [*rest, *sums]
        with graph.inserting_before(root):
            for term in others:
                total = _call(graph, aten.add.Tensor, (total, term), root)
        root.replace_all_uses_with(total)
    return made


def item_of(node: fx.Node) -> tuple[fx.Node, int] | None:
    """Tensor and index on its first axis, where ``node`` takes one item of a tensor."""
    args: Any = node.args
    if node.target is operator.getitem and args[0].target is aten.unbind.int and len(args[0].args) == 1:
        return args[0].args[0], args[1]
    if node.target is aten.select.int and args[1] == 0 and isinstance(args[2], int):
        return args[0], args[2]
    return None


def _call(graph: fx.Graph, target: object, args: tuple[object, ...], like: fx.Node) -> fx.Node:
    node = graph.call_function(target, args)  # pyright: ignore[reportArgumentType]
    node.meta = {key: value for key, value in like.meta.items() if key in ("val", "tensor_meta", "partitioner_tag")}
    return node


def _adds(node: fx.Node) -> bool:
    return node.target is aten.add.Tensor and not node.kwargs and all(_plain(node, arg) for arg in node.args)


def _plain(node: fx.Node, arg: object) -> bool:
    """``arg`` enters the sum ``node`` without broadcasting or a change of dtype."""
    if not isinstance(arg, fx.Node) or not isinstance(arg.meta.get("val"), Tensor):
        return False
    value, total = arg.meta["val"], node.meta["val"]
    return value.dtype == total.dtype and same_shape(value.shape, total.shape)


def _terms(node: fx.Node, root: fx.Node) -> list[fx.Node]:
    stack, terms = [node], []
    while stack:
        here = stack.pop()
        if here is root or (_adds(here) and len(here.users) == 1):
            stack += reversed([arg for arg in here.args if isinstance(arg, fx.Node)])
        else:
            terms.append(here)
    return terms
