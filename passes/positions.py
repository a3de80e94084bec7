"""Positions: which outputs share their position axes with the canvas or the inputs, and do they look back only.

Contract: a captured graph, or a function that runs a model on input leaves, in; a frozen record or a verdict out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from lbi_compile.passes.layouts import Layout, layout
from lbi_compile.passes.liveness import Liveness


@dataclass(frozen=True, slots=True)
class Outputs:
    """An output with positions.

    Attributes:
        sink: The output.
        index: Its place among the model's outputs.
        axes: Its position axes, in order.
        length: Number of positions at the example inputs.
        canvas: Layout of the canvas where it has the same positions, else ``None``.
        inputs: ``(leaf, axis)`` of the input tensors that have the same position axis (one-axis positions only).
        size: The size of its position axis as it prints, where there is one.
    """

    sink: fx.Node
    index: int
    axes: tuple[int, ...]
    length: int
    canvas: Layout | None
    inputs: tuple[tuple[int, int], ...]
    size: str | None

    def fold(self, value: Tensor) -> Tensor:
        """The output as `[B, P, ...]`: positions in one axis behind the samples."""
        rest = [dim for dim in range(value.dim()) if dim not in self.axes]
        moved = value.permute(rest[0], *self.axes, *rest[1:])
        return moved.flatten(1, len(self.axes)) if len(self.axes) > 1 else moved


def outputs_along(gm: fx.GraphModule, live: Liveness, canvas: fx.Node, *, batch: str | None) -> tuple[Outputs, ...]:
    """Find the outputs with positions: those of the canvas, else those of an input.

    Args:
        gm: Captured graph.
        live: Its liveness.
        canvas: The canvas.
        batch: The batch size as it prints.
    """
    value = canvas.meta["val"]
    form = layout(canvas, batch=batch) if value.dim() > 1 else None
    leaves = [node.meta.get("val") for node in gm.graph.find_nodes(op="placeholder")]
    (results,) = gm.graph.output_node().args
    assert isinstance(results, (tuple, list))
    found = []
    for sink in live.sinks:
        axes = None
        if form is not None and form.positions:
            axes = _shared(sink.meta["val"], [value.shape[dim] for dim in form.positions], form.positions)
        of_canvas = form if axes is not None else None
        axes = axes or _along_input(sink.meta["val"], leaves)
        if axes is not None:
            found.append(_record(sink, list(results).index(sink), axes, of_canvas, leaves))
    return tuple(found)


def _shared(sink: Tensor, sizes: Sequence[Any], dims: Sequence[int]) -> tuple[int, ...] | None:
    """The dims of ``sink`` that have these sizes, one behind the other."""
    count = len(sizes)
    for first in range(1, sink.dim() - count + 1):
        here = sink.shape[first : first + count]
        if [str(a) for a in here] != [str(b) for b in sizes]:
            continue
        # two fixed sizes may be equal by chance, so without symbols only the canvas's own dims count
        named = any(isinstance(size, torch.SymInt) for size in here)
        usual = sink.dim() >= count + 2 and (first == dims[0] or count > 1)
        if named or usual:
            return tuple(range(first, first + count))
    return None


def _along_input(sink: Tensor, leaves: Sequence[Any]) -> tuple[int, ...] | None:
    """``(1,)`` where the output ``[B, T, ...]`` has the length of a sequence among the inputs."""
    if sink.dim() < 2:
        return None
    for leaf in leaves:
        if _is_sequence(leaf) and str(leaf.shape[1]) == str(sink.shape[1]):
            named = isinstance(leaf.shape[1], torch.SymInt)
            if named or sink.dim() >= 3:
                return (1,)
    return None


def _is_sequence(leaf: Any) -> bool:
    # integers [B, T] or floats [B, T, D]; a float matrix is features
    return isinstance(leaf, Tensor) and (leaf.dim() == 3 or (leaf.dim() == 2 and not leaf.is_floating_point()))


def _record(sink: fx.Node, index: int, axes: tuple[int, ...], canvas: Layout | None, leaves: Sequence[Any]) -> Outputs:
    sizes = [sink.meta["val"].shape[axis] for axis in axes]
    length = 1
    for size in sizes:
        length *= size.node.hint if isinstance(size, torch.SymInt) else size
    inputs: tuple[tuple[int, int], ...] = ()
    if len(axes) == 1:
        inputs = tuple(
            (i, 1) for i, leaf in enumerate(leaves) if _is_sequence(leaf) and str(leaf.shape[1]) == str(sizes[0])
        )
    size = str(sizes[0]) if len(axes) == 1 else None
    return Outputs(sink, index, axes, int(length), canvas, inputs, size)


def later_inputs(
    run: Callable[[list[Any]], Sequence[Any]], leaves: Sequence[Any], outputs: Sequence[Outputs]
) -> tuple[frozenset[tuple[int, int]], frozenset[tuple[int, int]]]:
    """Pairs of output and input: those where later positions of the input change an earlier one of the output, and not.

    Complements the probes on the canvas where values enter by other ways (a decoder's tokens, a second embedding).
    Integers at later positions are reflected within the range of the example's own, so that they stay valid. An input
    that cannot be changed so (a mask of ones) is in neither set.

    Args:
        run: Maps input leaves to the model's outputs; random operators draw the same numbers in every run.
        leaves: The example inputs.
        outputs: Where positions are.

    Returns:
        Pairs ``(Outputs.index, index of the leaf)`` that see later positions, and that do not, in any bit.
    """
    sees: set[tuple[int, int]] = set()
    blind: set[tuple[int, int]] = set()
    changes = {
        (i, axis): [one for one in outputs if (i, axis) in one.inputs] for one in outputs for i, axis in one.inputs
    }
    with torch.no_grad():
        expected = list(run(list(leaves))) if changes else []
        for (index, axis), along in changes.items():
            size = along[0].length
            for t in sorted({1, size // 2, size - 1} & set(range(1, size))):
                leaf = leaves[index].detach().clone()
                late = leaf.narrow(axis, t, size - t)
                if leaf.is_floating_point():
                    late.copy_(late.flip(axis) * -1.5 + 0.5)
                elif leaf.dtype != torch.bool:
                    late.copy_(leaf.min() + leaf.max() - late)
                if torch.equal(leaf, leaves[index]):
                    continue
                got = run([leaf if i == index else other for i, other in enumerate(leaves)])
                for one in along:
                    early, before = (one.fold(all_[one.index]).narrow(1, 0, t) for all_ in (got, expected))
                    (blind if torch.equal(early, before) else sees).add((one.index, index))
    return frozenset(sees), frozenset(blind - sees)
