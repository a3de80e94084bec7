"""Repeats: tell that operators meet arguments of a form that was met before, as in every layer of a deep model.

Contract: operators and their arguments in, a key out; nothing is changed.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from lbi_compile._torch import pytree


def form_of_call(target: Any, args: Any, kwargs: Any) -> Hashable | None:
    """A key that is equal exactly where an operator meets equal numbers and tensors of equal shape, strides and dtype.

    On fake tensors it then gives tensors of equal form.

    Returns:
        The key; ``None`` for what may differ all the same: what is no operator, writes to arguments, or reads single
        numbers, whose values fake tensors may know.
    """
    schema = getattr(target, "_schema", None)
    if schema is None or schema.is_mutable:
        return None
    leaves, tree = pytree.tree_flatten((args, kwargs))
    forms: list[Any] = []
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            if leaf.numel() < 2 or leaf.layout is not torch.strided:
                return None
            forms.append((leaf.shape, leaf.stride(), leaf.storage_offset(), leaf.dtype, leaf.device))
        elif isinstance(leaf, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            return None
        else:
            forms.append((type(leaf), leaf))
    key = (target, tree, *forms)
    try:
        hash(key)
    except TypeError:
        return None
    return key


def form_of_nodes(nodes: Sequence[fx.Node], *, source: fx.Node, shapes: Mapping[fx.Node, Any]) -> Hashable:
    """A key that is equal where operators are wired alike and read values of equal shapes from elsewhere.

    Args:
        nodes: The operators, in program order.
        source: A node they read, which has to have the same part in them.
        shapes: Sizes of every node that gives one tensor (``Costs.shape``).

    Returns:
        The key. Values read from elsewhere (weights, a mask) may differ under equal keys.
    """
    names = {source: f"source {shapes[source]}"}

    def name(node: fx.Node) -> str:
        if node not in names:
            names[node] = f"from elsewhere {len(names)} {shapes.get(node)}"
        return names[node]

    form = []
    for at, node in enumerate(nodes):
        form.append((node.op, node.target, repr(map_arg((node.args, node.kwargs), name))))
        names[node] = f"operator {at}"
    return tuple(form)
