"""Repeats: tell that an operator meets arguments of a form it has met before, as in every layer of a deep model.

Contract: an operator and its arguments on fake tensors in, a key out; nothing is changed.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

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
