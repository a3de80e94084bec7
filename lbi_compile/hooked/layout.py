"""Which dim of a hidden state counts samples, which is its width, and what is left: told by sizes and by modules."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor, nn

from ..capture import Inputs
from ..passes.layouts import Layout

_ALONG_LAST = (nn.Linear, nn.LayerNorm, nn.RMSNorm, nn.MultiheadAttention)
_ALONG_SECOND = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.GroupNorm),
    *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
)
_POSITIONS = {1: ("T",), 2: ("H", "W"), 3: ("T", "H", "W")}


def canvas_layout(shape: Sequence[int], inputs: Inputs, blocks: Iterable[nn.Module]) -> Layout:
    """The layout of a hidden state.

    Samples are the dim as large as the batch, the first one where several are. The width is the dim that the first
    module with an opinion inside the blocks works along: the last one for a linear layer or a LayerNorm, dim 1 for a
    convolution or a norm of channels.

    Args:
        shape: Sizes of the hidden state, at least two.
        inputs: One call's inputs, whose first tensor tells the batch size.
        blocks: The modules it passes.

    Example:
        >>> canvas_layout((2, 8, 5, 5), Inputs((torch.zeros(2, 3, 5, 5),), {}), [nn.Conv2d(8, 8, 3)])
        Layout(batch=0, width=1, rank=4)
    """
    rank = len(shape)
    batch = next((leaf.shape[0] for leaf in inputs.leaves if isinstance(leaf, Tensor) and leaf.dim()), None)
    at = next((dim for dim, size in enumerate(shape) if size == batch), 0)
    opinions = (
        rank - 1 if isinstance(module, _ALONG_LAST) else 1
        for block in blocks
        for module in block.modules()
        if isinstance(module, (*_ALONG_LAST, *_ALONG_SECOND))
    )
    width = next((dim for dim in opinions if dim != at), 1 if rank in (4, 5) and at != 1 else rank - 1)
    return Layout(at, width if width != at else rank - 2, rank)


def named_shape(shape: Sequence[int], layout: Layout) -> tuple[int | str, ...]:
    """A hidden state's shape with names for the sizes that may change.

    Example:
        >>> named_shape((2, 32, 64), Layout(batch=0, width=2, rank=3))
        ('B', 'T', 64)
    """
    names: list[int | str] = list(shape)
    names[layout.batch] = "B"
    for dim, name in zip(layout.positions, _POSITIONS.get(len(layout.positions), ()), strict=False):
        names[dim] = name
    return tuple(names)
