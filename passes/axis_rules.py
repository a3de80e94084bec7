"""Static rules: where an operator leaves an axis that its arguments carry.

Each rule answers for one family of operators. A rule that does not cover a case says so: unsure is never independent.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import fx

from lbi_compile._torch import pytree
from lbi_compile.passes.names import operator_name


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
Shapes = Mapping[fx.Node, "tuple[int, ...] | None"]


class _Mixed(Exception):
    """A rule that cannot keep the axis raises this with the reason."""

    def __init__(self, why: str, *, certain: bool = False) -> None:
        super().__init__(why)
        self.why, self.certain = why, certain


def follow(node: fx.Node, states: Mapping[fx.Node, AxisState], shapes: Shapes, *, size: int) -> AxisState:
    """The state of ``node`` from the states of its arguments.

    Args:
        node: The node; arguments without a state do not depend on the source.
        states: States of the nodes before it.
        shapes: Sizes of every node that gives one tensor.
        size: Size S of the axis.

    Returns:
        Its state; ``"mixed"`` names the operator that mixed first.
    """
    carried = [state for before in node.all_input_nodes if (state := states.get(before, ABSENT)).kind != "absent"]
    name = _plain(operator_name(node))
    if not carried or name in _SHAPE_ONLY:
        return ABSENT
    for state in carried:
        if state.kind == "mixed":
            return state
    rule = _RULES.get(name)
    if rule is None and torch.Tag.pointwise in getattr(node.target, "tags", ()):
        rule = _elementwise
    try:
        if rule is None:
            raise _Mixed("no rule covers it")
        state = rule(_Call(node, states, shapes))
        shape = shapes.get(node)
        if state.kind == "at" and shape is not None and (
            not 0 <= state.dim < len(shape) or shape[state.dim] % (state.stride * size)
        ):
            raise _Mixed("it leaves only part of the axis")
    except _Mixed as mixed:
        why = f"{operator_name(node)}: {mixed.why}"
        return AxisState("mixed", node=node, why=why, certain=mixed.certain)
    return state


def _plain(name: str) -> str:
    """``aten.relu_`` follows the rule of ``aten.relu``."""
    return name if name.endswith("__") else name.removesuffix("_")


class _Call:
    """One call of an operator as its rule sees it."""

    def __init__(self, node: fx.Node, states: Mapping[fx.Node, AxisState], shapes: Shapes) -> None:
        self.node, self._states, self._shapes = node, states, shapes
        self.args: dict[str, Any] = {}
        schema = getattr(node.target, "_schema", None)
        for i, argument in enumerate(schema.arguments if schema is not None else ()):
            default = argument.default_value if argument.has_default_value() else None
            positional = not argument.kwarg_only and i < len(node.args)
            self.args[argument.name] = node.args[i] if positional else node.kwargs.get(argument.name, default)

    def state(self, value: Any) -> AxisState:
        return self._states.get(value, ABSENT) if isinstance(value, fx.Node) else ABSENT

    def shape(self, value: Any) -> tuple[int, ...]:
        shape = self._shapes.get(value) if isinstance(value, fx.Node) else ()
        if shape is None:
            raise _Mixed("the sizes of an argument are unknown")
        return shape

    @property
    def out(self) -> tuple[int, ...]:
        return self.shape(self.node)

    def carriers(self, *names: str) -> list[fx.Node]:
        """Arguments that carry the axis; without names of all arguments."""
        values = [self.args.get(name) for name in names] if names else [self.node.args, dict(self.node.kwargs)]
        found = [leaf for leaf in pytree.tree_leaves(values) if self.state(leaf).kind == "at"]
        return list(dict.fromkeys(found))

    def only(self, *names: str) -> None:
        """Refuse a call that carries the axis in another argument than these."""
        if set(self.carriers()) != set(self.carriers(*names)):
            raise _Mixed("the axis comes in by an argument the rule does not cover")

    def one(self, name: str = "self") -> tuple[AxisState, tuple[int, ...]]:
        """State and sizes of the only argument that may carry the axis."""
        self.only(name)
        return self.state(self.args[name]), self.shape(self.args[name])

    def number(self, name: str) -> int:
        """An integer argument that is a constant."""
        if not isinstance(self.args.get(name), int):
            raise _Mixed(f"{name} is no constant")
        return self.args[name]

    def dims(self, name: str, rank: int) -> list[int]:
        """A dim or a list of dims, counted from the front."""
        value = self.args.get(name)
        dims = [value] if isinstance(value, int) else value
        if not isinstance(dims, (list, tuple)) or not all(isinstance(dim, int) for dim in dims):
            raise _Mixed(f"{name} is no constant")
        return [dim % max(rank, 1) for dim in dims]


_Rule = Callable[[_Call], AxisState]
_RULES: dict[str, _Rule] = {}


def _rule(names: str) -> Callable[[_Rule], _Rule]:
    def add(rule: _Rule) -> _Rule:
        _RULES.update({name if name == "getitem" else f"aten.{name}": rule for name in names.split()})
        return rule

    return add


def _agree(found: Iterable[tuple[Any, int]]) -> tuple[Any, int]:
    places = set(found)
    if len(places) != 1:
        raise _Mixed("its arguments carry the axis in different dims")
    return places.pop()


# Results that depend on the sizes and the type of an argument, or that are no values at all.
_SHAPE_ONLY = frozenset(
    f"aten.{name}"
    for name in "sym_size sym_stride sym_numel sym_storage_offset zeros_like ones_like empty_like rand_like randn_like "
    "randint_like new_zeros new_ones new_empty new_empty_strided _assert_tensor_metadata _assert_async "
    "_assert_scalar".split()
)


@_rule(
    "__and__ __or__ __xor__ rsub masked_fill where polar complex log_sigmoid tril triu alpha_dropout dropout "
    "feature_dropout feature_alpha_dropout native_dropout bernoulli conj resolve_conj resolve_neg real imag maximum "
    "minimum"
)
def _elementwise(call: _Call) -> AxisState:
    """Elementwise over arguments that are broadcast from the right."""
    inputs = call.carriers()
    rank = max(len(call.shape(leaf)) for leaf in _tensors(call))

    def place(value: fx.Node) -> tuple[int, int]:
        state = call.state(value)
        return state.dim - len(call.shape(value)) + rank, state.stride

    return AxisState("at", *_agree(map(place, inputs)))


def _tensors(call: _Call) -> list[fx.Node]:
    leaves = pytree.tree_leaves((call.node.args, dict(call.node.kwargs)))
    return [leaf for leaf in leaves if isinstance(leaf, fx.Node)]


@_rule(
    "to _to_copy type_as clone contiguous alias detach lift_fresh lift_fresh_copy view_as_real one_hot prelu "
    "broadcast_tensors cpu cuda float double half bfloat16 long"
)
def _same_leading(call: _Call) -> AxisState:
    """Copies of the first argument, and what adds dims behind its own; others give a type or a device."""
