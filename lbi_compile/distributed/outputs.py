"""Outputs of a head that stands on the last rank alone: for all ranks, or as no more than the loss made of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..passes.insert import OutputName
from . import links
from .call import Call

OUTPUT, LOSS = "output", "loss"


def of_head(call: Call) -> list[str]:
    """Names of the outputs that the head makes; every rank has the others."""
    program = call.program
    made = {*program.head.outputs, program.head_entry}
    names = (leaf.name for leaf in program.outputs if isinstance(leaf, OutputName))
    return list(dict.fromkeys(name for name in names if name in made))


def send(call: Call, names: list[str]) -> None:
    """Give every rank the values of these names, which the last rank has; cotangents stay on the last rank.

    Shapes are told once for every kind of input.
    """
    ranks, values, known, kind = call.ranks, call.values, call.model.known_outputs, call.canvas.device.type
    key = call.key, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
    if key not in known:
        mine = [_form(values[name]) for name in names] if ranks.last else None
        known[key] = ranks.objects(mine)[-1]
    for name, form in zip(names, known[key], strict=True):
        if not isinstance(form, tuple):
            values[name] = form
            continue
        value = values[name] if ranks.last else call.canvas.new_empty(form[0], dtype=form[1])
        values[name] = links.take(ranks, ranks.size - 1, OUTPUT, call.thread, value)


def flat(call: Call) -> list[Any]:
    """The call's outputs, once all of them are there."""
    values = call.values
    return [values[leaf.name] if isinstance(leaf, OutputName) else leaf for leaf in call.program.outputs]


def send_loss(call: Call, make: Callable[[], Tensor]) -> Tensor:
    """The loss on every rank, made on the last one; its backward begins there."""
    ranks = call.ranks
    dtype = torch.promote_types(call.canvas.dtype, torch.float32)
    value = make().to(dtype) if ranks.last else call.canvas.new_empty((), dtype=dtype)
    return links.take(ranks, ranks.size - 1, LOSS, call.thread, value)


def _form(value: Any) -> Any:
    return (tuple(value.shape), value.dtype) if isinstance(value, Tensor) else value
