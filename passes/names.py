"""Names of nodes for people: the module that ran them and the source line they come from."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import fx

_FRAME = re.compile(r'^\s*File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<function>.+)\n\s*(?P<code>.*)$', re.M)
_TORCH = str(Path(torch.__file__).parent)


def module_path(node: fx.Node) -> str:
    """Path of the innermost module whose forward ran the node; ``""`` for the model itself or where it is unknown.

    Args:
        node: Node of an exported graph.

    Example:
        >>> module_path(node)
        'blocks.0.attn'
    """
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path, _ = next(reversed(stack.values()))
    return re.sub(r"@\d+", "", path)  # the exporter numbers repeated calls of one module


def source_line(node: fx.Node) -> str:
    """Where the node was written, as ``file:line, in function: code``; ``""`` where it is unknown.

    The innermost line outside torch is given: a call of ``F.batch_norm`` inside ``nn.BatchNorm1d`` helps nobody.

    Args:
        node: Node of an exported graph.

    Example:
        >>> source_line(node)
        'model.py:31, in forward: x = self.norm(x)'
    """
    frames = list(_FRAME.finditer(node.meta.get("stack_trace") or ""))
    if not frames:
        return ""
    own = [frame for frame in frames if not frame["file"].startswith(_TORCH)]
    frame = (own or frames)[-1]
    return f"{frame['file']}:{frame['line']}, in {frame['function']}: {frame['code'].strip()}"


def operator_name(node: fx.Node) -> str:
    """The operator without its overload, for example ``"aten.linear"``; ``"getitem"`` for a Python function."""
    packet = getattr(node.target, "overloadpacket", None)
    return str(packet) if packet is not None else str(getattr(node.target, "__name__", node.target))


def describe(node: fx.Node) -> str:
    """Operator, module path and source line of a node in one phrase for messages.

    Example:
        >>> describe(node)
        'aten.batch_norm in blocks.0.norm (model.py:31, in forward: x = self.norm(x))'
    """
    place, line = module_path(node), source_line(node)
    return operator_name(node) + (f" in {place}" if place else "") + (f" ({line})" if line else "")
