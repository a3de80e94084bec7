"""Does an output position depend on later input positions? Measured by value on a model that can only be run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._torch import pytree
from ..passes.layouts import Layout
from .state import probing

# Runs the model on input leaves, with another canvas where one is given; gives its output and which blocks ran.
Call = Callable[[list[Any], Tensor | None], tuple[Any, list[int]]]


def positions(out: Any, canvas: Tensor, layout: Layout) -> Tensor | None:
    """The first float output with the positions of the canvas, folded to `[B, P, ...]`.

    Such an output has the canvas's layout and sizes but for the width, or is `[B, T, ...]` where there is one axis of
    positions.

    Args:
        out: Whatever the model returns.
        canvas: The input of the first block.
        layout: Its layout.
    """
    if not layout.positions:
        return None
    for leaf in pytree.tree_leaves(out):
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            continue
        sizes = list(leaf.shape)
        if len(sizes) == layout.rank:
            sizes[layout.width] = canvas.shape[layout.width]
            if sizes == list(canvas.shape):
                return layout.fold(leaf)
        if len(layout.positions) == 1 and sizes[:2] == [canvas.shape[layout.batch], canvas.shape[layout.positions[0]]]:
            return leaf
    return None


def sees_later(model: nn.Module, call: Call, leaves: Sequence[Any], canvas: Tensor, layout: Layout) -> bool | None:
    """Whether changing later positions changes an earlier position of the output, in any bit.

    Later positions of the inputs get values from elsewhere in the same input, so that they stay what the model takes;
    those of the canvas get other numbers. Runs in which other blocks are called than before say nothing and are left
    out: through the choice of branches everything may depend on everything, in the model as in the bounded model.

    Args:
        model: The model whose state every run finds, and all leave, as it is now.
        call: Runs it, or its bounded form.
        leaves: One call's inputs.
        canvas: The input of the first block with them.
        layout: Its layout.

    Returns:
        ``None`` where the output has no positions or no run says anything, for example because two runs on the same
        inputs differ.
    """

    def run(inputs: Sequence[Any], other: Tensor | None) -> tuple[Tensor | None, list[int]]:
        with probing(model), torch.no_grad():
            out, trace = call(list(inputs), other)
            found = positions(out, canvas, layout)
            return None if found is None else found.clone(), trace

    expected, trace = run(leaves, None)
    again, same = run(leaves, None)
    if expected is None or again is None or trace != same or not _equal(expected, again):
        return None
    informed = False
    for t, inputs, other in _changes(leaves, canvas, layout):
        try:
            got, blocks = run(inputs, other)
        except Exception:  # made-up inputs that the model refuses are no finding
            continue
        if got is None or got.shape != expected.shape or blocks != trace:
            continue
        if not _equal(got[:, :t], expected[:, :t]):
            return True
        informed = True
    return False if informed else None


def _equal(a: Tensor, b: Tensor) -> bool:
    return bool(((a == b) | (a.isnan() & b.isnan())).all())


def _changes(leaves: Sequence[Any], canvas: Tensor, layout: Layout) -> Iterator[tuple[int, list[Any], Tensor | None]]:
    """Inputs, or a canvas, that differ from ``t`` on."""
    folded = layout.fold(canvas.detach())
    size, by_input = folded.shape[1], len(layout.positions) == 1
    generator = torch.Generator().manual_seed(0)
    for t in sorted({1, size // 2, size - 1} & set(range(1, size))):
        inputs = [_changed(leaf, t, size, generator) if by_input else leaf for leaf in leaves]
        if any(new is not old for new, old in zip(inputs, leaves, strict=True)):
            yield t, inputs, None
        # the small change is for models that branch on the value of the large one
        for scale, shift in ((-1.5, 0.5), (1.001, 0.001)):
            other = folded.clone()
            other[:, t:] = other[:, t:].flip(1) * scale + shift if scale < 0 else other[:, t:] * scale + shift
            yield t, list(leaves), layout.unfold(other, canvas.shape).contiguous()


def _changed(leaf: Any, t: int, size: int, generator: torch.Generator) -> Any:
    if not isinstance(leaf, Tensor) or leaf.dim() < 2 or leaf.shape[1] != size:
        return leaf
    pool = leaf.detach().flatten(0, 1)
    count = leaf.shape[0] * (size - t)
    rows = torch.randint(pool.shape[0], (count,), generator=generator).to(leaf.device)
    other = leaf.detach().clone()
    other[:, t:] = pool[rows].unflatten(0, (leaf.shape[0], size - t))
    return leaf if torch.equal(other, leaf) else other
