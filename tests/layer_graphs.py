"""Small random graphs of what image models and routed models are made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from tests.random_graphs import Builder, Choose

aten = torch.ops.aten


def grow_layers(shape: tuple[int, ...], steps: int, choose: Choose) -> Builder:
    """A random graph of up to ``steps`` steps on `[B, C, H, W]` or `[B, T, D]`; its last float tensor counts."""
    build = Builder(shape)
    for _ in range(steps):
        pool = build.tensors()[-3:]
        node = choose(pool)
        sizes = tuple(build.values[node].shape)
        if len(sizes) in (3, 4) and 0 not in sizes:
            moves = [*_common(build, node, sizes, choose(pool), choose)]
            moves += _of_images(build, node, sizes, choose) if len(sizes) == 4 else _of_rows(build, node, sizes, choose)
            choose(moves)()
    return build


def _common(b: Builder, x: fx.Node, sizes: tuple[int, ...], other: fx.Node, choose: Choose) -> list[Callable[[], Any]]:
    n, last, dim = len(sizes), sizes[-1], choose(range(len(sizes)))
    scores = lambda: b.call(aten.argsort.default, x, dim)  # noqa: E731
    number = lambda: b.call(aten.argmax.default, x, dim)  # noqa: E731

    def normalise() -> None:
        training, c = choose([True, False]), b.constant(sizes[1])
        b.call(aten.batch_norm.default, x, None, None, c, c, training, 0.0, 1e-5, False)

    def route() -> None:
        index = number()
        assert index is not None
        kind = choose(["table", "index", "one_hot", "select", "put"])
        if kind == "table":
            b.call(aten.embedding.default, b.constant(24, 3), index)
        elif kind == "index":
            b.call(aten.index.Tensor, b.constant(5, 24, 3), [None, index] if choose([True, False]) else [index])
        elif kind == "one_hot":
            b.call(aten.to.dtype, b.call(aten.one_hot.default, index, 24), torch.float64)
        elif kind == "select":
            b.call(aten.index_select.default, b.constant(24, 3), 0, b.call(aten.flatten.using_ints, index))
        else:
            place = [None] * dim + [b.constant(2, high=sizes[dim])]
            b.call(aten.index_put.default, x, place, choose([b.constant(1), b.call(aten.narrow.default, x, dim, 0, 2)]))

    return [
        lambda: b.call(aten.relu.default, x),
        lambda: b.call(aten.add.Tensor, x, other),
        lambda: b.call(aten.mul.Tensor, x, b.constant(last)),
        lambda: b.call(aten.linear.default, x, b.constant(choose([3, 4, last]), last)),
        lambda: b.call(aten.layer_norm.default, x, list(sizes[choose([1, n - 1]) :])),
        lambda: b.call(aten.group_norm.default, x, choose([1, 2])),
        lambda: b.call(aten.instance_norm.default, x, None, None, None, None, True, 0.1, 1e-5, False),
        normalise,
        lambda: b.call(aten.feature_dropout.default, x, 0.5, True),
        lambda: b.call(aten.softmax.int, x, dim),
        lambda: b.call(choose([aten.mean.dim, aten.amax.default]), x, [dim], choose([True, False])),
        lambda: b.call(aten.cat.default, [x, choose([other, b.constant(*sizes)])], dim),
        lambda: b.call(aten.roll.default, x, [1], [dim]),
        lambda: b.call(aten.transpose.int, x, dim, choose(range(n))),
        lambda: b.call(aten.gather.default, x, dim, scores()),
        lambda: b.call(aten.take_along_dim.default, x, scores(), dim),
        lambda: b.call(aten.scatter_add.default, choose([x, b.constant(*sizes)]), dim, scores(), x),
        lambda: b.call(aten.index_add.default, x, dim, b.constant(sizes[dim], high=sizes[dim]), other),
        lambda: b.call(aten.index_copy.default, b.constant(*sizes), dim, b.constant(sizes[dim], high=sizes[dim]), x),
        lambda: b.item(b.call(aten.topk.default, x, 1, dim), 0),
        lambda: b.call(aten.real.default, b.call(aten.fft_fft.default, x, None, dim)),
        lambda: b.call(aten.sub.Tensor, x, b.call(aten.mean.dim, x, [dim], True)),
        route,
    ]


def _of_images(b: Builder, x: fx.Node, sizes: tuple[int, ...], choose: Choose) -> list[Callable[[], Any]]:
    n, c, h, w = sizes
    across, down = choose([1, 1, 3]), choose([1, 1, 3])

    def convolve() -> None:
        groups, out = choose([(1, 4), (c, c), (2, 4)])
        kernel = b.constant(out, max(c // groups, 1), down, across)
        pads = choose([[down // 2, across // 2], [0, 0]])
        b.call(aten.conv2d.default, x, kernel, None, [choose([1, 1, 2]), 1], pads, [1, choose([1, 2])], groups)

    def partition() -> None:
        side = choose([1, 2, 3])
        windows = b.call(
            aten.view.default, b.call(aten.contiguous.default, x), [n, c, h // side, side, w // side, side]
        )
        if windows is not None:
            b.call(
                aten.reshape.default, b.call(aten.permute.default, windows, [0, 2, 4, 3, 5, 1]), [-1, side * side, c]
            )

    def sample() -> None:
        grid = b.call(aten.tanh.default, b.call(aten.permute.default, x, [0, 2, 3, 1]))
        b.call(aten.grid_sampler.default, x, b.call(aten.slice.Tensor, grid, 3, 0, 2), 0, 0, False)

    return [
        convolve,
        convolve,
        partition,
        sample,
        lambda: b.call(aten.conv2d.padding, x, b.constant(4, c, down, across), None, [1, 1], choose(["same", "valid"])),
        lambda: b.call(aten.conv_transpose2d.input, x, b.constant(c, 4, down, across), None, [1, choose([1, 2])]),
        lambda: b.call(aten.avg_pool2d.default, x, [down, across], choose([[], [1, 1]]), [down // 2, across // 2]),
        lambda: b.call(aten.max_pool2d.default, x, [down, across], choose([[], [1, 1]])),
        lambda: b.call(aten.adaptive_avg_pool2d.default, x, [choose([1, 2, h]), choose([1, w])]),
        lambda: b.item(b.call(aten.adaptive_max_pool2d.default, x, [choose([1, h]), choose([1, w])]), 0),
        lambda: b.call(aten.upsample_nearest2d.vec, x, None, [2.0, choose([1.0, 2.0])]),
        lambda: b.call(aten.upsample_bilinear2d.vec, x, [h + choose([0, 1]), w], False, None),
        lambda: b.call(aten.pixel_shuffle.default, x, 2),
        lambda: b.call(aten.pixel_unshuffle.default, x, 2),
        lambda: b.call(aten.channel_shuffle.default, x, 2),
        lambda: b.call(aten.im2col.default, x, [2, 2], [1, 1], [0, 0], [choose([1, 2]), 1]),
        lambda: b.call(aten.permute.default, x, [0, 2, 3, 1]),
        lambda: b.call(aten.permute.default, x, [0, 3, 1, 2]),
        lambda: b.call(aten.flatten.using_ints, x, choose([1, 2]), choose([2, 3])),
        lambda: b.call(aten.constant_pad_nd.default, x, [choose([0, 1]), 0, choose([0, 1]), choose([0, -1])]),
        lambda: b.call(aten.pad.default, x, [0, 0, choose([0, 1]), 0], "reflect"),
    ]


def _of_rows(b: Builder, x: fx.Node, sizes: tuple[int, ...], choose: Choose) -> list[Callable[[], Any]]:
    n, t, d = sizes
    first, both = choose([True, False]), choose([1, 2])

    def recur() -> None:
        kind, gates = choose([(aten.gru.input, 3), (aten.lstm.input, 4), (aten.rnn_tanh.input, 1)])
        state = b.constant(both, n if first else t, 2)
        flat = [part for _ in range(both) for part in (b.constant(2 * gates, d), b.constant(2 * gates, 2))]
        states = [state, state] if gates == 4 else state
        found = b.call(kind, x, states, flat, False, 1, 0.0, False, both == 2, first)
        b.item(found, choose([0, 1]))

    def unflatten() -> None:
        splits = [(i, t // i) for i in range(1, t + 1) if t % i == 0]
        b.call(aten.view.default, b.call(aten.contiguous.default, x), [n, *choose(splits), d])

    return [
        recur,
        unflatten,
        unflatten,
        lambda: b.call(aten.scaled_dot_product_attention.default, x, choose([x, b.constant(*sizes)]), x),
        lambda: b.call(aten.scaled_dot_product_attention.default, x, b.constant(n, 2, d), b.constant(n, 2, 3)),
        lambda: b.call(aten.cdist.default, x, choose([x, b.constant(4, d)])),
        lambda: b.call(aten.conv1d.default, x, b.constant(4, t, choose([1, 3]))),
        lambda: b.call(aten.transpose.int, x, 1, 2),
        lambda: b.call(aten.unsqueeze.default, x, choose([1, 2, 3])),
        lambda: b.call(aten.matmul.default, x, b.call(aten.transpose.int, x, 1, 2)),
    ]
