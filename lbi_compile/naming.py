"""Names for the values of a captured graph, by which another capture of the same model finds them again."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from ._torch import size_key
from .capture import Capture
from .errors import PlanError, RegionsError
from .passes.liveness import is_float_tensor
from .passes.names import module_path, operator_name
from .passes.separators import Separator
from .plan import Point


class Naming:
    """Names nodes so that another capture of the same model finds them again."""

    def __init__(self, gm: fx.GraphModule, capture: Capture) -> None:
        self.gm = gm
        self._point: dict[fx.Node, Point] = {}
        self._node: dict[tuple[str, str, int], fx.Node] = {}
        symbols = _symbols(gm)
        names: dict[Any, int | str] = {}  # printing a size takes long, and few differ
        counts: dict[tuple[str, str], int] = {}
        for node in gm.graph.nodes:
            if node.op not in ("placeholder", "call_function") or not is_float_tensor(node):
                continue
            op = str(node.target) if hasattr(node.target, "overloadpacket") else operator_name(node)
            module, op = ("", "input") if node.op == "placeholder" else (module_path(node), op)
            index = counts[module, op] = counts.get((module, op), -1) + 1
            value = node.meta["val"]
            for size in value.shape:
                if size_key(size) not in names:
                    names[size_key(size)] = size if isinstance(size, int) else _readable(str(size), symbols)
            shape = tuple(names[size_key(size)] for size in value.shape)
            self._point[node] = Point(module, op, index, shape, str(value.dtype).removeprefix("torch."))
            self._node[module, op, index] = node

    def point(self, node: fx.Node) -> Point:
        return self._point[node]

    def find(self, point: Point) -> fx.Node:
        node = self._node.get((point.module, point.op, point.index))
        found = node and self._point[node].shape
        if node is None or found is None or not _fits(found, point.shape):
            raise PlanError(
                f"no value {point.name} of shape {list(point.shape)} in this capture (found {found})",
                expected="the model and mode the plan was made for",
                do="make a new plan for this model",
            )
        return node

    def before_module(self, path: str, points: Sequence[Separator]) -> fx.Node:
        """The last separator before the first node of a module."""
        seen = [point.node for point in points]
        last = None
        for node in self.gm.graph.nodes:
            if any(p == path or p.startswith(path + ".") for p in module_paths(node)):
                if last is None:
                    break
                return last
            if node in seen:
                last = node
        known = sorted({p for n in self.gm.graph.nodes for p in module_paths(n) if p})
        raise RegionsError(
            f"regions names the module {path!r}",
            expected=f"a module that runs after the first separator, for example {', '.join(known[:8])}",
            do="name the module that starts a region, as model.named_modules() spells it",
        )

    def start_of(self, path: str, main: frozenset[fx.Node]) -> fx.Node:
        """The first node of a module that leads to the main output.

        Raises:
            RegionsError: No such node.
        """
        for node in self.gm.graph.nodes:
            if node in main and any(p == path or p.startswith(path + ".") for p in module_paths(node)):
                return node
        raise RegionsError(
            f"regions names the module {path!r}, which does nothing that leads to the main output",
            expected="modules the output is computed by",
            do="name another module",
        )


def batch_symbol(gm: fx.GraphModule) -> str | None:
    """The size of the first input's dim 0 as it prints, where it may vary; ``None`` where it is fixed."""
    for node in gm.graph.find_nodes(op="placeholder"):
        value = node.meta.get("val")
        if isinstance(value, Tensor) and value.dim():
            return str(value.shape[0]) if isinstance(value.shape[0], torch.SymInt) else None
    return None


def _symbols(gm: fx.GraphModule) -> dict[str, str]:
    """Names for the symbolic sizes of the inputs: B, T, and B2, T2 ... where inputs differ."""
    names: dict[str, str] = {}
    for node in gm.graph.find_nodes(op="placeholder"):
        sizes = getattr(node.meta.get("val"), "shape", ())
        for size, letter in zip(sizes, ("B", "T"), strict=False):
            if isinstance(size, torch.SymInt) and str(size) not in names:
                used = sum(name[0] == letter for name in names.values())
                names[str(size)] = f"{letter}{used + 1}" if used else letter
    return names


def _readable(size: str, names: dict[str, str]) -> str:
    return re.sub(r"[A-Za-z]\w*", lambda symbol: names.get(symbol[0], symbol[0]), size)


def _fits(found: Sequence[int | str], wanted: Sequence[int | str]) -> bool:
    """Equal rank, and equal sizes where both are fixed."""
    return len(found) == len(wanted) and all(
        a == b for a, b in zip(found, wanted, strict=True) if isinstance(a, int) and isinstance(b, int)
    )


def module_paths(node: fx.Node) -> list[str]:
    """Paths of all modules whose forward was running, outermost first."""
    stack = node.meta.get("nn_module_stack") or {}
    return [path.split("@")[0] for path, _ in stack.values() if not path.startswith("_empty")]


def class_name(model: nn.Module) -> str:
    """Qualified name of the model's class."""
    return f"{type(model).__module__}.{type(model).__qualname__}"
