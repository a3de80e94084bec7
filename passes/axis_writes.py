"""Operators that write into memory: what their writes leave true of the axis states of other nodes.

An exported graph is not functional. A write into memory that has one name changes the state of that name; where other
nodes may see the memory under names of their own, nothing is known of what follows.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, MutableMapping
from typing import Any

import torch
from torch import fx

from lbi_compile.passes.axis_calls import ABSENT, AxisState, parameters
from lbi_compile.passes.liveness import is_mutating
from lbi_compile.passes.names import operator_name


def settle_writes(
    node: fx.Node, states: MutableMapping[fx.Node, AxisState], ahead: Collection[fx.Node]
) -> AxisState | None:
    """Bring states up to date behind a node that may write.

    Args:
        node: The node, which has its state.
        states: States of all nodes up to it; those of overwritten names are replaced.
        ahead: Nodes that run after it.

    Returns:
        The state of all that follows where a write may have left the states of other names of its memory untrue.
    """
    result = states[node]
    if not _writes(node.target):
        # a block under no_grad or autocast is one node and may write inside
        inside = result.kind == "mixed" and not hasattr(node.target, "_schema") and is_mutating(node)
        return _spoilt(node) if inside else None
    if result.kind == "absent":
        return None
    value = node.args[0] if _in_place(node.target) and node.args else None
    if not isinstance(value, fx.Node):
        return _spoilt(node)
    if result.kind != "mixed" and states.get(value, ABSENT) == result:
        return None
    names = _names(value, node, ahead)
    if names is None:
        return _spoilt(node)
    states.update(dict.fromkeys(names, result))
    return None


def _spoilt(node: fx.Node) -> AxisState:
    return AxisState("mixed", node=node, why=f"{operator_name(node)} writes the axis into memory other nodes may read")


def _names(value: fx.Node, writer: fx.Node, ahead: Collection[fx.Node]) -> set[fx.Node] | None:
    """All nodes that show the memory of ``value`` in full; nothing where there may be views of it by now."""
    found, queue = set(), [value]
    while queue:
        name = queue.pop()
        found.add(name)
        others = [user for user in name.users if _rewrites(user, name)]
        if _rewrites(name, name.args[0] if name.args else None):
            others.append(name.args[0])  # type: ignore[arg-type]
        elif not _makes_memory(name.target):
            return None
        for user in name.users:
            safe = user is writer or user.op == "output" or user in ahead or user in others
            if not safe and not _makes_memory(user.target):
                return None
        queue += [other for other in others if other is not writer and other not in ahead and other not in found]
    return found


def _rewrites(node: fx.Node, value: Any) -> bool:
    """The node gives ``value`` back after it has written to it."""
    return isinstance(value, fx.Node) and _in_place(node.target) and node.args[:1] == (value,)


def _words(text: str) -> frozenset[str]:
    return frozenset(f"aten.{name}" for name in text.split())


# Operators with results in memory of their own, beside the elementwise ones.
_MAKERS = _words("""
    zeros ones empty full zeros_like ones_like empty_like full_like new_zeros new_ones new_empty new_full arange clone
    linear addmm mm bmm matmul baddbmm conv1d conv2d conv3d convolution conv_transpose1d conv_transpose2d
    conv_transpose3d batch_norm layer_norm group_norm softmax cat stack embedding index gather
""")


@functools.cache
def _makes_memory(target: Any) -> bool:
    """No result shows the memory of an argument; or there is no tensor among the results."""
    schema = getattr(target, "_schema", None)
    if schema is None or schema.is_mutable or any(result.alias_info is not None for result in schema.returns):
        return False
    name = str(target.overloadpacket)
    made = name in _MAKERS or (torch.Tag.pointwise in target.tags and name != "aten.conj_physical")  # gives reals back
    return made or not any("Tensor" in str(result.type) for result in schema.returns)


@functools.cache
def _writes(target: Any) -> bool:
    return any(writes for _, _, _, writes in parameters(target))


@functools.cache
def _in_place(target: Any) -> bool:
    """It writes to its first argument alone, and gives it back."""
    written = [i for i, (_, _, _, writes) in enumerate(parameters(target)) if writes]
    if written != [0] or len(target._schema.returns) != 1:
        return False
    alias = target._schema.returns[0].alias_info
    return alias is not None and alias.is_write
