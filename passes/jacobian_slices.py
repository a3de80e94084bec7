"""Cut the adjoint path of a region out of a joint graph, with the adjoints that join it from elsewhere set to zero."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from lbi_compile._torch import core_aten_decompositions, same_shape, traced
from lbi_compile.errors import EngineError
from lbi_compile.passes.batch_cotangents import Batched

aten, prims = torch.ops.aten, torch.ops.prims


@dataclass(frozen=True, slots=True)
class Slice:
    """A piece of a joint graph that can be traced again.

    Attributes:
        module: The piece; its placeholders are the live inputs, then ``constants``, then ``zeros``.
        constants: Nodes of the joint graph it reads, tensors and symbolic sizes.
        zeros: Nodes of the joint graph it reads as zero.
    """

    module: fx.GraphModule
    constants: tuple[fx.Node, ...]
    zeros: tuple[fx.Node, ...]

    def zero_values(self) -> list[Tensor]:
        """Zeros in the shapes of ``zeros``, without memory of their own."""
        values = [node.meta["val"] for node in self.zeros]
        return [torch.zeros((), dtype=v.dtype, device=v.device).expand(v.shape) for v in values]

    def zero_cotangents(self, r: int) -> list[Batched]:
        """Zeros for R cotangents at once."""
        values = [node.meta["val"] for node in self.zeros]
        sizes = [(r, *[1] * v.dim()) for v in values]
        return [
            Batched(torch.zeros(size, dtype=v.dtype, device=v.device), tuple(v.shape))
            for v, size in zip(values, sizes, strict=True)
        ]

    def signature(self) -> Hashable | None:
        """Equal for two pieces exactly where their traces are equal, so that like regions are traced once.

        ``None`` where the piece reads an attribute of its own.
        """
        nodes = list(self.module.graph.nodes)
        if any(node.op == "get_attr" for node in nodes):
            return None
        place = {node: i for i, node in enumerate(nodes)}
        lines = [f"{len(self.constants)} {len(self.zeros)}"]
        for node in nodes:
            args, kwargs = map_arg((node.args, node.kwargs), lambda a: _Place(place[a]))
            lines.append(
                f"{node.op} {_describe(node.meta.get('val'))} {'' if node.op == 'placeholder' else node.target}"
            )
            lines.append(f"{args} {kwargs}")
        return "\n".join(lines)


class _Place(int):
    """Index of a node, printed so that it differs from a number."""

    def __repr__(self) -> str:
        return f"%{int(self)}"


def _describe(value: Any) -> str:
    if not isinstance(value, Tensor):
        return str(value)
    layout = f"{tuple(value.shape)} {value.stride()} {value.storage_offset()}"
    return f"{layout} {value.dtype} {value.device} {value.layout}"


def downstream(starts: Iterable[fx.Node], *, stop: Collection[fx.Node] = ()) -> set[fx.Node]:
    """Nodes that depend on ``starts`` (which are left out), not looking past nodes in ``stop`` (left out too)."""
    return _closure(starts, lambda node: node.users, stop)


def upstream(starts: Iterable[fx.Node], *, stop: Collection[fx.Node] = ()) -> set[fx.Node]:
    """Nodes that ``starts`` depend on (which are left out), not looking past nodes in ``stop`` (left out too)."""
    return _closure(starts, lambda node: node.all_input_nodes, stop)


def _closure(
    starts: Iterable[fx.Node], step: Callable[[fx.Node], Iterable[fx.Node]], stop: Collection[fx.Node]
) -> set[fx.Node]:
    seen: set[fx.Node] = set()
    stack = list(starts)
    while stack:
        for node in step(stack.pop()):
            if node not in seen and node not in stop:
                seen.add(node)
                stack.append(node)
    return seen


def cut(
    root: fx.GraphModule,
    path: Sequence[fx.Node],
    *,
    live: Sequence[fx.Node],
    dead: Collection[fx.Node],
    end: fx.Node,
) -> Slice:
    """Copy ``path`` into a graph of its own.

    Args:
        root: Owner of the joint graph.
        path: Nodes to copy, in topological order.
        live: Nodes the copy takes as its first inputs.
        dead: Nodes the copy reads as zero. A backward graph is linear in the adjoints that enter it, so zeroing some of
            them gives exactly the part that the others contribute.
        end: Node whose copy is the output.

    Raises:
        EngineError: The path calls a submodule (a higher-order operator).
    """
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}

    def take(node: fx.Node, prefix: str) -> None:
        copies[node] = graph.placeholder(f"{prefix}{len(copies)}")
        copies[node].meta = dict(node.meta)

    for node in live:
        take(node, "live")
    inside = {*path, *copies}
    alone = {node: _alone(node, dead) for node in path}
    outside = dict.fromkeys(a for node in path for a in node.all_input_nodes if a not in inside and a not in dead)
    constants = tuple(node for node in outside if node.op != "get_attr")
    zeros = tuple(dict.fromkeys(a for node in path if alone[node] is None for a in node.all_input_nodes if a in dead))
    for node in constants:
        take(node, "constant")
    for node in zeros:
        take(node, "zero")
    for node in outside:
        if node.op == "get_attr":
            _refuse_submodule(root, node)
            copies[node] = graph.node_copy(node)
    for node in path:
        other = alone[node]
        copies[node] = copies[other] if other is not None else graph.node_copy(node, copies.__getitem__)
        if other is None:
            _drop_unused_outputs(copies[node], node, inside)
    graph.output(copies[end])
    graph.eliminate_dead_code()
    graph.lint()
    return Slice(fx.GraphModule(root, graph), constants, zeros)


def _refuse_submodule(root: fx.GraphModule, node: fx.Node) -> None:
    if isinstance(getattr(root, str(node.target), None), torch.nn.Module):
        users = ", ".join(sorted({str(user.target) for user in node.users}))
        raise EngineError(
            f"a higher-order operator ({users}) on the way between two latents",
            expected="plain tensor operators there",
            do="use backward='chain', or take the operator out of the regions",
        )


def _alone(node: fx.Node, dead: Collection[fx.Node]) -> fx.Node | None:
    """The one summand that is left of ``a + b`` where the other is zero and the sum changes neither shape nor dtype."""
    if node.target is not aten.add.Tensor or node.kwargs or not all(isinstance(a, fx.Node) for a in node.args):
        return None
    left = [a for a in node.args if a not in dead]
    if len(left) != 1 or not isinstance(left[0], fx.Node):
        return None
    kept, total = left[0].meta["val"], node.meta["val"]
    alike = kept.dtype == total.dtype and same_shape(kept.shape, total.shape)
    return left[0] if alike else None


def _drop_unused_outputs(copy: fx.Node, node: fx.Node, inside: Collection[fx.Node]) -> None:
    """Tell an operator with an output mask not to compute, r times over, gradients that the path does not use."""
    schema = getattr(node.target, "_schema", None)
    for at, argument in enumerate(schema.arguments if schema is not None else ()):
        if argument.name in ("output_mask", "grad_input_mask") and at < len(copy.args):
            used = [user.args[1] for user in node.users if user in inside]
            mask: Any = copy.args[at]
            copy.update_arg(at, [bool(on) and i in used for i, on in enumerate(mask)])


def simplify(piece: Slice, live: Sequence[Tensor]) -> fx.GraphModule:
    """The slice in operators that have batching rules; see ``simplified``."""
    constants = [node.meta["val"] for node in piece.constants]
    return simplified(piece.module, [*live, *constants, *piece.zero_values()])


def simplified(module: fx.GraphModule, values: Sequence[Any], *, keep: Collection[Any] = ()) -> fx.GraphModule:
    """A graph in operators that have batching rules: ``*_backward`` and Inductor's primitives are decomposed.

    Without this, vmap over a symbolic batch size would fix that size in several of them.

    Args:
        module: The graph.
        values: Its inputs, fake.
        keep: Operators to leave as they are.
    """
    table = {op: rule for op, rule in _decompositions().items() if op not in keep}
    if not any(node.target in table for node in module.graph.nodes):
        return module
    return traced(module, list(map(distinct, values)), decompositions=table)


def distinct(value: Any) -> Any:
    """The value as an object of its own: a trace tells its inputs apart by identity, and nodes may share one value."""
    return value.detach() if isinstance(value, Tensor) else value


@functools.cache  # torch collects its table anew, from all operators there are, whenever it is asked
def _decompositions() -> Mapping[Any, Callable[..., Any]]:
    table: dict[Any, Callable[..., Any]] = {
        op: rule for op, rule in core_aten_decompositions().items() if "backward" in str(op)
    }
    # Inductor's decompositions leave these two, which have no batching rule.
    table[prims.convert_element_type.default] = lambda x, dtype: aten._to_copy.default(x, dtype=dtype)
    if hasattr(prims, "fma"):
        table[prims.fma.default] = lambda a, b, c: aten.add.Tensor(aten.mul.Tensor(a, b), c)
    return table
