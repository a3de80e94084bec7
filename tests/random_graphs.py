"""Small random graphs of aten operators, and what their results really depend on."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

aten = torch.ops.aten
Choose = Callable[[Sequence[Any]], Any]


class Builder:
    """A graph under construction that also holds a value of every node, so that only calls that run are added."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.graph = fx.Graph()
        self.values: dict[fx.Node, Any] = {}
        self.source = self.graph.placeholder("x")
        self.x = torch.rand(shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64) + 0.5
        self.values[self.source] = self.x.clone()
        self.constants: list[Tensor] = []

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node | None:
        """Add a call; nothing where it does not run."""
        real = fx.node.map_arg((args, kwargs), self.values.__getitem__)
        try:
            value = target(*real[0], **real[1])  # type: ignore[misc]
        except (RuntimeError, IndexError, TypeError, ValueError):
            return None
        if isinstance(value, Tensor) and value.numel() > 20_000:
            return None
        node = self.graph.call_function(target, args, kwargs)
        self.values[node] = value
        return node

    def item(self, node: fx.Node | None, i: int) -> fx.Node | None:
        """One of several results."""
        return None if node is None else self.call(operator.getitem, node, i)

    def constant(self, *shape: int, high: int | None = None) -> fx.Node:
        """A value that does not depend on the source: floats, or integers below ``high``."""
        generator = torch.Generator().manual_seed(len(self.constants))
        if high is None:
            value = torch.rand(shape, generator=generator, dtype=torch.float64) + 0.1
        else:
            value = torch.randint(max(high, 1), shape, generator=generator)
        node = self.graph.placeholder(f"c{len(self.constants)}")
        self.constants.append(value)
        self.values[node] = value.clone()
        return node

    def tensors(self) -> list[fx.Node]:
        """Nodes that give a float tensor and may depend on the source."""
        return [
            node
            for node, value in self.values.items()
            if isinstance(value, Tensor)
            and value.is_floating_point()
            and (node is self.source or node.op == "call_function")
        ]


def _factors(shape: Sequence[int], choose: Choose) -> list[int]:
    """Another shape with as many elements: two neighbouring dims merged, or one split, or both."""
    sizes = list(shape)
    if len(sizes) > 1 and choose([True, False]):
        i = choose(range(len(sizes) - 1))
        sizes[i : i + 2] = [sizes[i] * sizes[i + 1]]
    i = choose(range(len(sizes)))
    divisors = [d for d in range(1, sizes[i] + 1) if sizes[i] % d == 0]
    first = choose(divisors)
    sizes[i : i + 1] = [first, sizes[i] // first]
    return sizes


def grow(shape: tuple[int, ...], steps: int, choose: Choose) -> tuple[fx.GraphModule, Builder]:
    """A random graph of up to ``steps`` operators on one input; its output is the last float tensor."""
    build = Builder(shape)
    for _ in range(steps):
        pool = build.tensors()[-4:]
        node = choose(pool)
        sizes = tuple(build.values[node].shape)
        if not sizes or 0 in sizes or len(sizes) > 5:
            continue
        dim = choose(range(-len(sizes), len(sizes)))
        _step(build, node, sizes, dim, choose(pool), choose)
    build.graph.output(build.tensors()[-1])
    return fx.GraphModule(torch.nn.Module(), build.graph), build


def _step(b: Builder, x: fx.Node, sizes: tuple[int, ...], dim: int, other: fx.Node, choose: Choose) -> None:
    n, size, last, constant = len(sizes), sizes[dim], sizes[-1], b.constant
    pick = choose(range(max(size, 1)))

    def cut() -> None:
        b.item(b.call(aten.split.Tensor, x, max(size // 2, 1), dim), choose([0, -1]))

    def attention() -> None:
        b.call(aten.scaled_dot_product_attention.default, x, choose([x, other, constant(*sizes)]), choose([x, other]))

    def convolve() -> None:
        if n == 3:
            kernel = choose([1, 3])
            b.call(aten.conv1d.default, x, constant(4, sizes[1], kernel), constant(4), [1], [kernel // 2])

    def normalise() -> None:
        training = choose([True, False])
        if n > 1:
            c = sizes[1]
            b.call(aten.batch_norm.default, x, None, None, constant(c), constant(c), training, 0.0, 1e-5, False)

    def write() -> None:
        target = choose([x, constant(*sizes), b.call(aten.select.int, x, dim, pick)])
        b.call(choose([aten.add_.Tensor, aten.copy_.default, aten.mul_.Tensor]), target, choose([other, x]))

    moves: list[Callable[[], Any]] = [
        lambda: b.call(aten.relu.default, x),
        lambda: b.call(aten.add.Tensor, x, other),
        lambda: b.call(aten.mul.Tensor, x, constant(last)),
        lambda: b.call(aten.where.self, b.call(aten.gt.Scalar, x, 1.0), x, other),
        lambda: b.call(aten.linear.default, x, constant(choose([2, 3, last]), last), None),
        lambda: b.call(aten.addmm.default, constant(3), x, constant(last, 3)),
        lambda: b.call(aten.matmul.default, x, choose([other, constant(last, 2), constant(last)])),
        lambda: b.call(aten.matmul.default, x, b.call(aten.transpose.int, other, -1, -2)),
        lambda: b.call(aten.einsum.default, "...ij,...kj->...ik", [x, choose([other, constant(3, last)])]),
        lambda: b.call(aten.einsum.default, "ab,cb->abc", [x, other]),
        lambda: b.call(aten.layer_norm.default, x, [last], constant(last), None),
        lambda: b.call(aten.rms_norm.default, x, list(sizes[-2:])),
        lambda: b.call(aten.group_norm.default, x, choose([1, 2])),
        lambda: b.call(aten.instance_norm.default, x, None, None, None, None, True, 0.1, 1e-5, False),
        normalise,
        lambda: b.call(choose([aten.softmax.int, aten.log_softmax.int, aten.cumsum.default]), x, dim),
        lambda: b.call(
            choose([aten.mean.dim, aten.sum.dim_IntList, aten.amax.default]), x, [dim], choose([True, False])
        ),
        lambda: b.call(aten.linalg_vector_norm.default, x, 2, [dim], choose([True, False])),
        lambda: b.item(b.call(aten.max.dim, x, dim, choose([True, False])), 0),
        lambda: b.item(b.call(aten.sort.default, x, dim), 0),
        lambda: b.item(b.call(aten.topk.default, x, 1, dim), 0),
        lambda: b.call(aten.glu.default, x, dim),
        lambda: b.call(aten.view.default, b.call(aten.contiguous.default, x), _factors(sizes, choose)),
        lambda: b.call(aten.reshape.default, x, _factors(sizes, choose)),
        lambda: b.call(aten.flatten.using_ints, x, choose(range(n)), -1),
        lambda: b.call(aten.unsqueeze.default, x, dim),
        lambda: b.call(aten.squeeze.dim, x, dim),
        lambda: b.call(aten.transpose.int, x, dim, choose(range(n))),
        lambda: b.call(
            aten.permute.default, x, choose([list(range(n))[::-1], [n - 1, *range(n - 1)], [*range(1, n), 0]])
        ),
        lambda: b.call(aten.movedim.int, x, dim, choose(range(n))),
        lambda: b.call(aten.expand.default, x, [2, *sizes]),
        lambda: b.call(aten.repeat.default, x, [choose([1, 2]), *[choose([1, 2]) for _ in sizes]]),
        lambda: b.call(aten.repeat_interleave.self_int, x, choose([1, 2, 3]), dim),
        lambda: b.call(aten.slice.Tensor, x, dim, choose([0, 1]), choose([size, 2**62, 1]), choose([1, 2])),
        lambda: b.call(aten.select.int, x, dim, pick),
        lambda: b.item(b.call(aten.unbind.int, x, dim), 0),
        cut,
        lambda: b.call(aten.index_select.default, x, dim, constant(choose([2, size]), high=size)),
        lambda: b.call(aten.gather.default, x, dim, constant(*sizes, high=size)),
        lambda: b.call(aten.scatter_add.default, other, dim, constant(*sizes, high=size), x),
        lambda: b.call(aten.index.Tensor, x, [*[None] * choose(range(n)), constant(2, 2, high=2)]),
        lambda: b.call(aten.index.Tensor, x, [constant(2, high=2), None, constant(2, high=2)]),
        lambda: b.call(aten.cat.default, [x, choose([other, constant(*sizes)])], dim),
        lambda: b.call(aten.stack.default, [x, choose([other, x, constant(*sizes)])], dim),
        lambda: b.call(aten.flip.default, x, [dim]),
        lambda: b.call(aten.roll.default, x, [1], [dim]),
        lambda: b.call(aten.constant_pad_nd.default, x, [choose([0, 1]), choose([0, -1, 1]), 0, choose([0, 1])]),
        lambda: b.call(aten.tril.default, x),
        lambda: b.call(aten.unfold.default, x, dim, choose([1, 2]), 1),
        lambda: b.call(aten.embedding.default, constant(4, 3), b.call(aten.ge.Scalar, x, 1.0)),
        lambda: b.call(
            aten.embedding.default, constant(40, 3), b.call(aten.to.dtype, b.call(aten.abs.default, x), torch.int64)
        ),
        lambda: b.call(aten.avg_pool1d.default, x, [2], [1]),
        lambda: b.call(aten.pixel_shuffle.default, x, 2),
        attention,
        convolve,
        write,
        lambda: b.call(aten.relu_.default, x),
        lambda: b.call(aten.add_.Tensor, x, constant(last)),
        lambda: b.call(aten.zeros_like.default, x),
        lambda: b.call(aten.dropout.default, x, 0.5, True),
        lambda: b.call(aten.to.dtype, x, torch.float64),
    ]
    choose(moves)()


class _Snapshots(fx.Interpreter):
    """Keeps a copy of what every node gives, as it is before a later write."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm)
        self.seen: dict[fx.Node, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self.seen[n] = value.clone()
        return value


def run(gm: fx.GraphModule, build: Builder, x: Tensor) -> dict[fx.Node, Tensor]:
    """Value of every node that gives a tensor; the same random numbers and constants in every run."""
    torch.manual_seed(0)
    snapshots = _Snapshots(gm)
    snapshots.run(x.clone(), *(value.clone() for value in build.constants))
    return snapshots.seen


def changed(gm: fx.GraphModule, build: Builder, *, axis: int, position: int) -> dict[fx.Node, Tensor]:
    """Mask of the elements of every node that change when the source does at one position of an axis."""
    x = build.x
    other = x.clone()
    other.select(axis, position).copy_(1.5 - x.flip(axis).select(axis, position) * 2)
    before, after = run(gm, build, x), run(gm, build, other)
    return {node: ~((before[node] == after[node]) | (before[node].isnan() & after[node].isnan())) for node in before}
