"""Static axis rules of what moves elements by numbers: indices, scatters, sorts, tables and lists of experts.

Numbers that depend on the followed value carry the axis like any other argument: a sample that is routed by its own
scores stays apart, a list sorted over the batch does not.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, fx

from lbi_compile._torch import pytree
from lbi_compile.passes.axis_calls import AxisState, Call, MixedError, Rule, agree, contract

ROUTING_RULES: dict[str, Rule] = {}


def _rule(names: str) -> Callable[[Rule], Rule]:
    def add(rule: Rule) -> Rule:
        ROUTING_RULES.update({f"aten.{name}": rule for name in names.split()})
        return rule

    return add


@_rule("embedding")
def _embedding(call: Call) -> AxisState:
    weight, indices = call.args["weight"], call.args["indices"]
    places: list[Hashable] = list(range(len(call.shape(indices))))
    return contract(call, [(weight, ["row", "feature"]), (indices, places)], [*places, "feature"])


@_rule("one_hot bucketize isin")
def _each_alone(call: Call) -> AxisState:
    return call.one()[0]


@_rule("sort argsort topk msort")
def _sorted(call: Call) -> AxisState:
    """Runs along one dim and keeps the others apart."""
    state, shape = call.one()
    if state.dim in (call.dims("dim", len(shape)) if "dim" in call.args else [0]):
        raise MixedError("it sorts along the axis")
    return state


@_rule("gather take_along_dim scatter scatter_add scatter_reduce")
def _moved(call: Call) -> AxisState:
    """Elements move along one dim; in the others every index is met by itself."""
    inputs = call.only("self", "index", "indices", "src")
    dim, stride = agree((call.state(x).dim, call.state(x).stride) for x in inputs)
    if dim in call.dims("dim", len(call.out)):
        raise MixedError("it moves elements along the axis")
    return AxisState("at", dim, stride)


@_rule("index_select")
def _selected(call: Call) -> AxisState:
    """Positions of one dim, by a list of numbers."""
    shape = call.shape(call.args["self"])
    (along,) = call.dims("dim", len(shape))
    (carrier, *others) = call.only("self", "index")
    state = call.state(carrier)
    if others or (carrier is call.args["self"] and state.dim == along):
        raise MixedError("it takes parts of the axis")
    return AxisState("at", along, state.stride) if carrier is call.args["index"] else state


@_rule("index_add index_copy index_fill index_reduce")
def _written(call: Call) -> AxisState:
    """Writes or adds to positions of one dim, by a list of numbers."""
    inputs = call.only("self", "source")
    dim, stride = agree((call.state(x).dim, call.state(x).stride) for x in inputs)
    if dim in call.dims("dim", len(call.out)):
        raise MixedError("it moves elements along the axis")
    return AxisState("at", dim, stride)


@_rule("index _unsafe_index")
def _index(call: Call) -> AxisState:
    """Fancy indexing. The indexed dims become one block: in their place where they are neighbours, else in front."""
    block = _Block(call)
    if call.state(call.args["self"]).kind == "absent":
        return AxisState("at", *agree(block.of_index(index) for index in block.carriers()))
    state, _ = call.one()
    if state.dim in block.indexed:
        raise MixedError("it picks positions of the axis")
    return AxisState("at", block.dims.index(state.dim), state.stride)


@_rule("index_put _unsafe_index_put")
def _index_put(call: Call) -> AxisState:
    """Writes at indexed places of dims other than the axis."""
    block, values = _Block(call), call.args["values"]
    found = []
    for carrier in call.only("self", "values"):
        state = call.state(carrier)
        if carrier is values:  # broadcast from the right to what would be read there
            place = state.dim - len(call.shape(values)) + len(block.dims)
            found.append((block.dims[place], state.stride))
        if carrier is call.args["self"]:
            found.append((state.dim, state.stride))
    dim, stride = agree(found)
    if dim is None or dim in block.indexed:
        raise MixedError("it moves elements along the axis")
    return AxisState("at", dim, stride)


class _Block:
    """How the dims of an indexed tensor come out.

    Attributes:
        indexed: Dims of the tensor that have an index.
        dims: For every dim of the result the dim of the tensor; ``None`` for those of the indices.
    """

    def __init__(self, call: Call) -> None:
        given: list[Any] = list(call.args["indices"])
        self._call = call
        self.indexed = [dim for dim, index in enumerate(given) if index is not None]
        self._indices = [given[dim] for dim in self.indexed]
        values = [index.meta.get("val") for index in pytree.tree_leaves(self._indices)]
        if not all(isinstance(value, Tensor) and value.dtype in (torch.int64, torch.int32) for value in values):
            raise MixedError("it picks by a mask")
        rest = [dim for dim in range(len(call.shape(call.args["self"]))) if dim not in self.indexed]
        self._rank = max(len(call.shape(index)) for index in self._indices)
        together = self.indexed == list(range(self.indexed[0], self.indexed[-1] + 1))
        self._start = sum(dim < self.indexed[0] for dim in rest) if together else 0
        self.dims: list[int | None] = [*rest[: self._start], *[None] * self._rank, *rest[self._start :]]

    def carriers(self) -> list[fx.Node]:
        """The indices that carry the axis."""
        return self._call.only("indices")

    def of_index(self, index: fx.Node) -> tuple[int, int]:
        """Where the result has the axis of an index, and its stride."""
        state = self._call.state(index)
        return self._start + self._rank - len(self._call.shape(index)) + state.dim, state.stride


@_rule("cdist")
def _distances(call: Call) -> AxisState:
    """Of every row of one table to every row of another."""
    a, b = call.args["x1"], call.args["x2"]
    batch = [("batch", back) for back in range(len(call.out) - 2, 0, -1)]

    def labels(operand: Any, row: str) -> list[Hashable]:
        return [*batch[len(batch) - (len(call.shape(operand)) - 2) :], row, "feature"]

    return contract(call, [(a, labels(a, "i")), (b, labels(b, "j"))], [*batch, "i", "j"])
