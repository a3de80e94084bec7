"""Layouts: which dim of a value counts samples, which is its width, and what is left: positions.

Contract: a node of a captured graph in, a frozen record out; the graph is left alone. A layout folds values to
`[B, P, D]` and back, under fixed and symbolic sizes alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from lbi_compile.errors import InterfaceError
from lbi_compile.passes.names import operator_name

# How far from a value an operator may stand that tells its width. A residual block reaches its first norm or its last
# projection in fewer steps, in either direction.
_HOPS = 8


@dataclass(frozen=True, slots=True)
class Layout:
    """Which dim of a value counts samples and which is its width; all others are positions.

    Attributes:
        batch: The dim of the samples.
        width: The dim of the features; ``batch`` in a value of one dim, which has one feature for each sample.
        rank: Number of dims.
    """

    batch: int
    width: int
    rank: int

    @property
    def positions(self) -> tuple[int, ...]:
        """All other dims, in order."""
        # compared one by one: Dynamo may take the fields for symbols, and then finds none of them in a tuple
        return tuple(dim for dim in range(self.rank) if dim != self.batch and dim != self.width)

    @property
    def _order(self) -> tuple[int, ...]:
        batch, width = ([dim for dim in range(self.rank) if dim == field] for field in (self.batch, self.width))
        return (*batch, *self.positions, *width)

    def fold(self, x: Tensor) -> Tensor:
        """The value as `[B, D]` where it has no positions, else as `[B, P, D]`, P counting them in row-major order.

        Args:
            x: A value of this layout.

        Returns:
            ``x`` itself where it has that form already.

        Example:
            >>> Layout(batch=0, width=1, rank=4).fold(torch.zeros(2, 3, 8, 8)).shape
            torch.Size([2, 64, 3])
        """
        if self.rank == 1:
            return x.unsqueeze(1)
        if self._order != tuple(range(self.rank)):
            x = x.permute(self._order)
        return x.flatten(1, -2) if self.rank > 3 else x

    def unfold(self, y: Tensor, shape: Sequence[int]) -> Tensor:
        """The inverse of ``fold``: the same numbers where they were.

        Args:
            y: `[B, D]` or `[B, P, D]`.
            shape: Sizes of the value that was folded; a size may be symbolic.

        Returns:
            A view of ``y`` with these sizes, of which only batch and width may differ from ``shape``.
        """
        if self.rank == 1:
            return y.squeeze(1)
        if self.rank > 3:
            y = y.unflatten(1, [shape[dim] for dim in self.positions])
        if self._order == tuple(range(self.rank)):
            return y
        return y.permute([self._order.index(dim) for dim in range(self.rank)])


def layout(node: fx.Node, *, batch: str | None = None) -> Layout:
    """Decide the layout of a value from its sizes and from how it is made and used.

    The width of a value with positions is the dim that the nearest operator with an opinion works along: a linear
    layer or a LayerNorm says the last one, a convolution or a group norm dim 1. Elementwise operators and views on the
    way are looked through. Without any, images and volumes have their channels in dim 1, sequences their features last.

    Args:
        node: A node that gives one tensor; ``node.meta["val"]`` holds it.
        batch: The batch size as it prints, such as ``"s77"``; dim 0 where it is not given, is no symbol of this value,
            or is met twice.

    Returns:
        The layout.

    Raises:
        InterfaceError: The node gives no tensor or one without dims.

    Example:
        >>> layout(after_conv, batch="s77")
        Layout(batch=0, width=1, rank=4)
    """
    shape = _shape(node)
    if not shape:
        found = "no single tensor" if shape is None else "a number for the whole batch"
        raise InterfaceError(
            f"{found}: {node.name}",
            expected="a tensor with a dim for samples",
            do="choose boundaries at other places",
        )
    rank = len(shape)
    if rank == 1:
        return Layout(0, 0, rank)
    samples = [dim for dim, size in enumerate(shape) if size == batch]
    at = samples[0] if len(samples) == 1 else 0
    if rank == 2:
        return Layout(at, 1 - at, rank)
    found = next((dim for dim in _opinions(node) if dim != at), None)
    if found is None:
        found = 1 if rank in (4, 5) else rank - 1
    if found == at:
        found = rank - 1 if at != rank - 1 else rank - 2
    return Layout(at, found, rank)


# --- what the operators around a value say ------------------------------------------------------------------------


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Operators that keep every dim where it is, whatever they do along it.
_SAME_DIMS = _words("""
    add sub mul div dropout feature_dropout native_dropout to _to_copy type_as contiguous clone alias detach softmax
    cat pad constant_pad_nd slice roll flip cumsum masked_fill where prelu batch_norm expand lift_fresh_copy
""")
_RESIZING = _words("cat pad constant_pad_nd slice")
_MOVES = _words("permute transpose movedim t mT swapaxes")
_VIEWS = _words("view reshape _unsafe_view flatten unflatten squeeze unsqueeze")
_OF_CHANNELS = _words("batch_norm group_norm instance_norm native_group_norm dropout1d dropout2d dropout3d")
_OF_LAST = _words("""
    linear layer_norm native_layer_norm rms_norm _fused_rms_norm embedding scaled_dot_product_attention
    lstm gru rnn_tanh rnn_relu
""")

# For every dim of the value in question the dim that holds it, or the innermost part of it, in another value.
_Places = tuple["int | None", ...]


def _opinions(node: fx.Node) -> Iterator[int]:
    """The dims of ``node`` that operators around it take for its width, nearest first, producers before users."""
    shape = _shape(node)
    assert shape is not None
    start: _Places = tuple(range(len(shape)))
    queue, seen = [(node, start)], {node}
    for _ in range(_HOPS):
        reached: list[tuple[fx.Node, _Places]] = []
        for value, places in queue:
            edges = [(value, value), *((user, value) for user in value.users)]
            for operator, operand in edges:
                dim = _says(operator, operand)
                if dim is not None and dim in places:
                    yield places.index(dim)
            ways = [(before, _through(value, before, places, back=True)) for before in value.all_input_nodes]
            ways += [(user, _through(user, value, places, back=False)) for user in value.users]
            for other, there in ways:
                if there is not None and other not in seen:
                    seen.add(other)
                    reached.append((other, there))
        queue = reached


def _says(operator: fx.Node, value: fx.Node) -> int | None:
    """The dim of ``value`` (an argument of the operator, or its result) that the operator takes for the width."""
    shape, name = _shape(value), _name(operator)
    if shape is None:
        return None
    rank = len(shape)
    if name in ("matmul", "mm", "addmm"):
        return _of_product(operator, value, rank)
    features = operator.args[: 3 if name == "scaled_dot_product_attention" else 1]
    if operator is not value and value not in features:
        return None
    if name in _OF_LAST:
        return _norm_dim(operator, rank) if "norm" in name else rank - 1
    if name in _OF_CHANNELS:
        return 1 if rank > 1 else None
    if "conv" in name:
        weight = operator.args[1] if len(operator.args) > 1 else operator.kwargs.get("weight")
        kernel = _shape(weight) if isinstance(weight, fx.Node) else None
        return None if kernel is None else rank - len(kernel) + 1
    if "pool" in name or "upsample" in name:
        spatial = next((int(c) for c in name if c in "123"), None)
        return None if spatial is None else rank - spatial - 1
    if name in ("pixel_shuffle", "pixel_unshuffle"):
        return rank - 3
    if name in ("mean", "amax") and operator is not value:
        return _of_reduction(operator, rank)
    return None


def _norm_dim(operator: fx.Node, rank: int) -> int | None:
    """A norm over `[C, H, W]` has its channels in front of the places, a norm over `[D]` has nothing else."""
    over = operator.args[1] if len(operator.args) > 1 else None
    count = len(over) if isinstance(over, (list, tuple)) else 1
    return rank - count if count in (1, 3, 4) else None


def _of_reduction(operator: fx.Node, rank: int) -> int | None:
    """A mean over all dims but two leaves samples and features; one over the last dim that keeps it is of a norm."""
    dims, keeps = (operator.args[i] if len(operator.args) > i else None for i in (1, 2))
    given = dims if isinstance(dims, (list, tuple)) else [dims]
    reduced = {dim % rank for dim in given if isinstance(dim, int)}
    if keeps and reduced == {rank - 1}:
        return rank - 1
    left = [dim for dim in range(rank) if dim not in reduced]
    return left[1] if reduced and len(left) == 2 and (rank > 3 or not keeps) else None


def _of_product(operator: fx.Node, value: fx.Node, rank: int) -> int | None:
    """A product with a parameter from the right works along the last dim, from the left along the one before."""
    operands = [operand for operand in operator.args if isinstance(operand, fx.Node)][-2:]
    if len(operands) < 2 or rank < 2:
        return None
    left, right = (_is_parameter(operand) for operand in operands)
    if left == right or (operator is not value and value is not operands[0 if right else 1]):
        return None
    return rank - 1 if right else rank - 2


def _is_parameter(node: fx.Node) -> bool:
    """A parameter, or a view of one (``weight.t()``)."""
    while node.op == "call_function" and len(node.all_input_nodes) == 1:
        node = node.all_input_nodes[0]
    return node.op == "get_attr"


def _through(operator: fx.Node, value: fx.Node, places: _Places, *, back: bool) -> _Places | None:
    """Places in an operator's argument from places in its result (``back``), or the other way round.

    Nothing where the operator does not keep the dims apart.
    """
    inside, outside = _shape(value), _shape(operator)
    if operator.op != "call_function" or inside is None or outside is None:
        return None
    name, rank = _name(operator), len(inside)
    if name in _MOVES and rank == len(outside):
        # the operator itself tells where a tensor without memory of the same rank goes
        probe = torch.empty([*range(2, rank + 2)], device="meta")
        try:
            moved = operator.target(probe, *operator.args[1:], **operator.kwargs)  # type: ignore[operator]
        except (TypeError, RuntimeError):
            return None
        order = [size - 2 for size in moved.shape]  # for every dim of the result the dim of the argument
        return tuple(None if d is None else (order[d] if back else order.index(d)) for d in places)
    if name in _VIEWS:
        blocks = _matching(outside, inside) if back else _matching(inside, outside)
        return tuple(None if d is None else blocks.get(d) for d in places)
    if name in _SAME_DIMS or torch.Tag.pointwise in getattr(operator.target, "tags", ()):
        return places if rank == len(outside) and (name in _RESIZING or inside == outside) else None
    return None


def _matching(a: Sequence[str], b: Sequence[str]) -> dict[int, int]:
    """Dims of a view that are dims of its base: equal ones from both ends; a dim that was split or merged is held on to
    by its innermost part.
    """
    front = 0
    while front < min(len(a), len(b)) and a[front] == b[front]:
        front += 1
    end = 0
    while end < min(len(a), len(b)) - front and a[-1 - end] == b[-1 - end]:
        end += 1
    pairs = {dim: dim for dim in range(front)}
    pairs |= {len(a) - 1 - i: len(b) - 1 - i for i in range(end)}
    if front + end < min(len(a), len(b)):
        pairs[len(a) - 1 - end] = len(b) - 1 - end
    return pairs


def _name(node: fx.Node) -> str:
    return operator_name(node).removeprefix("aten.").removesuffix("_")


def _shape(node: fx.Node) -> tuple[str, ...] | None:
    """Sizes as they print; nothing for what is not one tensor."""
    value = node.meta.get("val")
    return tuple(str(size) for size in value.shape) if isinstance(value, Tensor) else None
