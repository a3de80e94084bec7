"""The hybrid: three Mamba-3 blocks, then one with attention, over and over."""

from __future__ import annotations

from torch import nn

from .mamba3 import mamba3_block
from .transformer import transformer_block

PERIOD = 4


def hybrid_block(
    index: int, width: int, *, heads: int, kv_heads: int, hidden: int, state: int, head_width: int, chunk: int
) -> nn.Module:
    """Block ``index`` of the hybrid, `[B, T, D]` -> `[B, T, D]`: every fourth has attention and an MLP.

    Args:
        index: From 0.
        width: Width D.
        heads: Heads of queries of the attention.
        kv_heads: Heads of keys and values of the attention.
        hidden: Width inside the MLP.
        state: Size S of the state of a Mamba-3 mixer.
        head_width: Channels P of its heads.
        chunk: Positions in a chunk of its scan.

    Example:
        >>> sizes = dict(heads=4, kv_heads=2, hidden=64, state=8, head_width=16, chunk=32)
        >>> [type(hybrid_block(index, 32, **sizes)).__name__ for index in range(4)]
        ['Residual', 'Residual', 'Residual', 'Sequential']
    """
    if index % PERIOD == PERIOD - 1:
        return transformer_block(width, heads=heads, kv_heads=kv_heads, hidden=hidden)
    return mamba3_block(width, state=state, head_width=head_width, chunk=chunk)
