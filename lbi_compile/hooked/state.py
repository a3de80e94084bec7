"""What hooks on blocks share: the hidden state in a call, which block a call is, and calls that run a second time."""

from __future__ import annotations

import copy
import dataclasses
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import CodeType
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from ..capture import undisturbed
from ..errors import CaptureError


def hidden_of(value: Any) -> Tensor | None:
    """The hidden state in what a block is given or gives: the first float tensor, in order of position and name.

    Args:
        value: A tensor, or tuples, lists, mappings and dataclasses of them; anything else holds none.

    Example:
        >>> hidden_of(((torch.ones(2, dtype=torch.long),), {"x": torch.ones(3)}))
        tensor([1., 1., 1.])
    """
    if isinstance(value, Tensor):
        return value if value.is_floating_point() else None
    return next((found for item in _items(value) if (found := hidden_of(item)) is not None), None)


def with_hidden(value: Any, hidden: Tensor) -> Any:
    """A copy of ``value`` with another tensor in place of ``hidden_of(value)``; containers that hold none are shared.

    Example:
        >>> with_hidden((torch.ones(1), "rest"), torch.zeros(1))
        (tensor([0.]), 'rest')
    """
    if isinstance(value, Tensor):
        return hidden
    items = list(_items(value))
    at = next(i for i, item in enumerate(items) if hidden_of(item) is not None)
    items[at] = with_hidden(items[at], hidden)
    if isinstance(value, Mapping):
        other: Any = copy.copy(value)
        other[list(value)[at]] = items[at]
        return other
    if isinstance(value, (tuple, list)):
        return value._make(items) if hasattr(value, "_make") else type(value)(items)  # pyright: ignore
    return dataclasses.replace(value, **{dataclasses.fields(value)[at].name: items[at]})


def _items(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        yield from value.values()
    elif isinstance(value, (tuple, list)):
        yield from value
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from (getattr(value, field.name) for field in dataclasses.fields(value))


class Places:
    """Tells calls of blocks apart: which place in the order of blocks the next call of a module has.

    A module that stands in the list several times (shared weights) has its places in turn, then its last one.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._of: dict[int, list[int]] = {}
        for place, module in enumerate(modules):
            self._of.setdefault(id(module), []).append(place)
        self._seen = dict.fromkeys(self._of, 0)

    def __contains__(self, module: nn.Module) -> bool:
        return id(module) in self._of

    def next(self, module: nn.Module) -> int:
        places, seen = self._of[id(module)], self._seen[id(module)]
        self._seen[id(module)] += 1
        return places[min(seen, len(places) - 1)]


def recomputed_later(until: CodeType) -> bool:
    """Whether this runs inside ``torch.utils.checkpoint``, below the innermost frame of ``until``.

    What hooks change in there would be missing when the backward runs it again, and the gradient wrong.
    """
    frame = sys._getframe(1)
    while frame is not None and frame.f_code is not until:
        if frame.f_code.co_filename == torch.utils.checkpoint.__file__:
            return True
        frame = frame.f_back
    return False


def checkpointed(path: str) -> CaptureError:
    """The error for a block that is recomputed in the backward."""
    return CaptureError(
        f"activation checkpointing by the model around {path}, where it is to be cut",
        expected="blocks that run once: what enters a region would be missing when the backward runs them again",
        do="switch it off, or let the blocks do it inside their own forward",
    )


@contextmanager
def probing(model: nn.Module) -> Iterator[None]:
    """Inside, runs of the model are for looking at it: they leave it as it is, and nothing is compiled for them."""
    with undisturbed(model), torch.compiler.set_stance("force_eager"):
        yield


@contextmanager
def in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Inside, the model itself (not its children) is in training mode or not."""
    before, model.training = model.training, training
    try:
        yield
    finally:
        model.training = before
