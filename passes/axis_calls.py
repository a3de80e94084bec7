"""What a static axis rule sees of one operator call, and what it answers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from lbi_compile._torch import pytree

Shapes = Mapping[fx.Node, "tuple[int, ...] | None"]


@dataclass(frozen=True, slots=True)
class AxisState:
    """Where a followed axis of size S is in a value.

    Attributes:
        kind: ``"absent"``: the value does not depend on the source. ``"at"``: each element depends only on source
            position ``(i[dim] // stride) % S`` of its index i. ``"mixed"``: it may depend on several.
        dim: Dim that holds the axis.
        stride: Positions of ``dim`` for one step of the axis: above 1 where an inner axis is flattened into the dim.
        node: The operator that mixed, where ``kind`` is ``"mixed"``.
        why: What it does, one clause.
        certain: It surely mixes, so that no measurement is needed.
    """

    kind: str
    dim: int = 0
    stride: int = 1
    node: fx.Node | None = None
    why: str = ""
    certain: bool = False


ABSENT = AxisState("absent")
_PLAIN = (int, float, str, type(None))


class MixedError(Exception):
    """Raised by a rule that cannot keep the axis apart, with the reason; it never leaves ``axis_rules.follow``."""

    def __init__(self, why: str, *, certain: bool = False) -> None:
        super().__init__(why)
        self.why, self.certain = why, certain


@functools.cache
def parameters(target: Any) -> tuple[tuple[str, bool, Any, bool], ...]:
    """Name, keyword only, default and written to, for each argument of an operator; none for what has no schema."""
    schema = getattr(target, "_schema", None)
    return tuple(
        (
            argument.name,
            argument.kwarg_only,
            argument.default_value if argument.has_default_value() else None,
            argument.alias_info is not None and argument.alias_info.is_write,
        )
        for argument in (schema.arguments if schema is not None else ())
    )


class Call:
    """One call of an operator.

    Attributes:
        node: The call.
        args: Its arguments by their names in the operator's schema, defaults filled in.
        size: Size S of the followed axis.
    """

    def __init__(self, node: fx.Node, states: Mapping[fx.Node, AxisState], shapes: Shapes, *, size: int) -> None:
        self.node, self.size, self._states, self._shapes = node, size, states, shapes
        self.args: dict[str, Any] = {}
        for i, (name, keyword_only, default, _) in enumerate(parameters(node.target)):
            positional = not keyword_only and i < len(node.args)
            self.args[name] = node.args[i] if positional else node.kwargs.get(name, default)

    @property
    def first(self) -> str:
        """Name of the first argument: ``self`` or ``input``."""
        return next(iter(self.args))

    @property
    def out(self) -> tuple[int, ...]:
        """Sizes of the result."""
        return self.shape(self.node)

    def state(self, value: Any) -> AxisState:
        """State of an argument."""
        return self._states.get(value, ABSENT) if isinstance(value, fx.Node) else ABSENT

    def shape(self, value: Any) -> tuple[int, ...]:
        """Sizes of a tensor argument; none for a number."""
        shape = self._shapes.get(value) if isinstance(value, fx.Node) else ()
        if shape is None:
            raise MixedError("the sizes of an argument are unknown")
        return shape

    def is_tensor(self, value: Any) -> bool:
        """The value is one tensor, not a number and not a list of tensors."""
        return self._shapes.get(value) is not None

    def carriers(self, *names: str) -> list[fx.Node]:
        """The values among these arguments that carry the axis; among all arguments where none is named."""
        if not names:
            found: list[fx.Node] = self.node.all_input_nodes
        else:
            leaves = (leaf for name in names for leaf in pytree.tree_leaves(self.args.get(name)))
            found = list(dict.fromkeys(leaf for leaf in leaves if isinstance(leaf, fx.Node)))
        return [value for value in found if self.state(value).kind == "at"]

    def only(self, *names: str) -> list[fx.Node]:
        """The carriers among these arguments; a call that carries the axis in another one is refused."""
        # by argument, not by value: one value may be given for two of them
        others = [value for name, value in self.args.items() if name not in names and not isinstance(value, _PLAIN)]
        if any(self.state(leaf).kind == "at" for value in others for leaf in pytree.tree_leaves(value)):
            raise MixedError("the axis comes in by an argument that no rule covers")
        return self.carriers(*names)

    def one(self) -> tuple[AxisState, tuple[int, ...]]:
        """State and sizes of the first argument, the only one that may carry the axis."""
        (value,) = self.only(self.first)
        return self.state(value), self.shape(value)

    def dims(self, name: str, rank: int) -> list[int]:
        """An argument that is a dim or a list of dims, counted from the front."""
        value = self.args.get(name)
        given = value if isinstance(value, (list, tuple)) else [value]
        dims = [dim % max(rank, 1) for dim in given if isinstance(dim, int)]
        if not dims or len(dims) < len(given):
            raise MixedError(f"{name} names no dims")
        return dims


Rule = Callable[[Call], AxisState]


def agree(found: Iterable[tuple[Any, int]]) -> tuple[Any, int]:
    """The one place and stride that all carriers share."""
    places = set(found)
    if len(places) != 1:
        raise MixedError("its arguments carry the axis in different dims")
    return places.pop()


def contract(call: Call, operands: Sequence[tuple[Any, Sequence[Hashable]]], out: Sequence[Hashable]) -> AxisState:
    """The rule of every sum of products: dims have labels as in einsum, labels that are not in ``out`` are summed.

    An axis survives where all operands that carry it do so under one label and ``out`` keeps it. ``operands`` are all
    tensors of the call.
    """
    carried = [(call.state(value), labels) for value, labels in operands]
    label, stride = agree((labels[s.dim], s.stride) for s, labels in carried if s.kind == "at")
    if label not in out:
        raise MixedError("it sums over the axis")
    return AxisState("at", list(out).index(label), stride)
