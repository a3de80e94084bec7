"""Every batching rule against one run per cotangent, for full and for compact values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from lbi_compile.errors import EngineError
from lbi_compile.passes.batch_cotangents import Batched, BatchInterpreter

aten = torch.ops.aten
R = 3


def call(target: Any, shape: tuple[int, ...], args: Callable[[fx.Node], tuple[Any, ...]], **kwargs: Any) -> Any:
    """A graph of one operator, whose live input has ``shape``."""
    graph = fx.Graph()
    live = graph.placeholder("live")
    live.meta["val"] = torch.zeros(shape, dtype=torch.double)
    constants: dict[str, Tensor] = {}

    def constant(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        constants[f"c{len(constants)}"] = value
        node = graph.get_attr(f"c{len(constants) - 1}")
        node.meta["val"] = value
        return node

    given = torch.utils._pytree.tree_map_only(Tensor, constant, args(live))
    node = graph.call_function(target, given, kwargs)
    concrete = fx.node.map_arg(given, lambda n: n.meta["val"])
    node.meta["val"] = target(*concrete, **kwargs)
    graph.output(node)
    return fx.GraphModule(constants, graph)


def tensor(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.double)


def index(high: int, *shape: int) -> Tensor:
    return torch.randint(high, shape)


POOL = torch.nn.functional.max_pool2d(tensor(2, 2, 4, 4), 2, return_indices=True)[1]
IMAGE, KERNEL = tensor(2, 2, 4, 4), tensor(3, 2, 3, 3)
KEEP = torch.tensor([[True, False, True, True], [False, True, True, False]])
NONE = [0, 0]

CASES: dict[str, tuple[Any, tuple[int, ...], Callable[[Any], tuple[Any, ...]]]] = {
    "add": (aten.add.Tensor, (2, 4), lambda x: (x, x)),
    "mul by more axes": (aten.mul.Tensor, (4,), lambda x: (tensor(2, 4), x)),
    "mul by fewer axes": (aten.mul.Tensor, (2, 4), lambda x: (x, tensor(4))),
    "div": (aten.div.Tensor, (2, 4), lambda x: (x, tensor(2, 1))),
    "where": (aten.where.self, (2, 4), lambda x: (KEEP, x, torch.zeros((), dtype=torch.double))),
    "scalar": (aten.mul.Tensor, (), lambda x: (x, tensor(2, 4))),
    "scalar of another dtype": (aten.mul.Tensor, (), lambda x: (x, tensor(2, 4).float())),
    "clone": (aten.clone.default, (2, 4), lambda x: (x,)),
    "cast": (aten._to_copy.default, (2, 4), lambda x: (x,)),
    "copy": (aten.copy.default, (4,), lambda x: (tensor(2, 4), x)),
    "copy over": (aten.copy.default, (2, 4), lambda x: (x, tensor(4))),
    "zeros": (aten.zeros_like.default, (2, 4), lambda x: (x,)),
    "new": (aten.new_full.default, (2, 4), lambda x: (x, [3], 0.0)),
    "mm": (aten.mm.default, (2, 4), lambda x: (x, tensor(4, 5))),
    "mm from the left": (aten.mm.default, (2, 4), lambda x: (tensor(3, 2), x)),
    "mm over a compact axis": (aten.mm.default, (2, 1), lambda x: (x, tensor(1, 5))),
    "view, last axis kept": (aten.view.default, (2, 3, 4), lambda x: (x, [6, 4])),
    "view, last axis split": (aten.view.default, (6, 4), lambda x: (x, [6, 2, 2])),
    "view, unknown size": (aten.view.default, (2, 3, 4), lambda x: (x, [-1])),
    "expand": (aten.expand.default, (1, 4), lambda x: (x, [3, 2, 4])),
    "unsqueeze": (aten.unsqueeze.default, (2, 4), lambda x: (x, -1)),
    "permute": (aten.permute.default, (2, 3, 4), lambda x: (x, [-1, 0, 1])),
    "t": (aten.t.default, (2, 4), lambda x: (x,)),
    "t of a vector": (aten.t.default, (4,), lambda x: (x,)),
    "transpose": (aten.transpose.int, (2, 3, 4), lambda x: (x, 0, -1)),
    "sum": (aten.sum.dim_IntList, (2, 3, 4), lambda x: (x, [0, -1])),
    "sum kept": (aten.sum.dim_IntList, (2, 3, 4), lambda x: (x, [-1], True)),
    "sum of all": (aten.sum.dim_IntList, (2, 3, 4), lambda x: (x, [])),
    "cat": (aten.cat.default, (2, 4), lambda x: ([tensor(2, 1), x, x], -1)),
    "slice_scatter": (aten.slice_scatter.default, (2, 2), lambda x: (tensor(2, 4), x, 1, 1, 3)),
    "slice_scatter into": (aten.slice_scatter.default, (2, 4), lambda x: (x, tensor(2, 2), -1, 1, 3)),
    "select_scatter": (aten.select_scatter.default, (4,), lambda x: (tensor(2, 4), x, 0, 1)),
    "gather": (aten.gather.default, (2, 4), lambda x: (x, 1, index(4, 2, 3))),
    "scatter": (aten.scatter.src, (2, 3), lambda x: (tensor(2, 4), -1, torch.tensor([[0, 1, 3], [2, 0, 1]]), x)),
    "scatter value": (aten.scatter.value, (2, 4), lambda x: (x, 1, index(4, 2, 3), 0.0)),
    "scatter_add": (aten.scatter_add.default, (2, 3), lambda x: (tensor(2, 4), 0, index(2, 2, 3), x)),
    "index": (aten._unsafe_index.Tensor, (2, 4), lambda x: (x, [None, index(4, 3)])),
    "index_put": (
        aten._unsafe_index_put.default,
        (2, 3),
        lambda x: (tensor(2, 4), [None, torch.tensor([0, 2, 2])], x, True),
    ),
    "index_put, broadcast": (
        aten._unsafe_index_put.default,
        (1,),
        lambda x: (tensor(2, 4), [None, torch.tensor([0, 2])], x, True),
    ),
    "masked index": (
        aten._unsafe_masked_index.default,
        (2, 4),
        lambda x: (x, KEEP, [None, torch.tensor([3, 0, 1, 1])], 0.0),
    ),
    "masked index_put": (
        aten._unsafe_masked_index_put_accumulate.default,
        (2, 4),
        lambda x: (tensor(2, 4), KEEP, [None, torch.tensor([3, 0, 1, 1])], x),
    ),
    "convolution": (
        aten.convolution_backward.default,
        (2, 3, 2, 2),
        lambda x: (x, IMAGE, KERNEL, None, [1, 1], NONE, [1, 1], False, NONE, 1, [True, False, False]),
    ),
    "max_pool2d": (
        aten.max_pool2d_with_indices_backward.default,
        (2, 2, 2, 2),
        lambda x: (x, IMAGE, [2, 2], [2, 2], NONE, [1, 1], False, POOL),
    ),
    "avg_pool2d": (
        aten.avg_pool2d_backward.default,
        (2, 2, 2, 2),
        lambda x: (x, IMAGE, [2, 2], [2, 2], NONE, False, True, None),
    ),
    "adaptive_avg_pool2d": (aten._adaptive_avg_pool2d_backward.default, (2, 2, 2, 2), lambda x: (x, IMAGE)),
    "bmm": (aten.bmm.default, (2, 3, 4), lambda x: (x, tensor(2, 4, 5))),
    "flip": (aten.flip.default, (2, 4), lambda x: (x, [1])),
}


def values(result: Any, i: int) -> list[Tensor]:
    items = result if isinstance(result, tuple) else (result,)
    return [item.full()[i] if isinstance(item, Batched) else item for item in items if item is not None]


@pytest.mark.parametrize("compact", [False, True], ids=["full", "compact"])
@pytest.mark.parametrize("name", CASES)
def test_a_rule_equals_one_run_per_cotangent(name: str, compact: bool):
    target, shape, args = CASES[name]
    kwargs = {"dtype": torch.float32} if name == "cast" else {}
    module = call(target, shape, args, **kwargs)
    axes = (*[1] * (len(shape) - 1), *shape[-1:]) if compact else shape
    data = torch.randn(R, *axes, dtype=torch.double)
    run = BatchInterpreter(module, R)
    result = run.run(Batched(data, shape))
    assert run.unrolled.keys() <= {"aten.mul.Tensor", "aten._unsafe_index_put.default"}
    assert bool(run.unrolled) == (name in ("scalar of another dtype", "index_put, broadcast"))
    for i in range(R):
        expected = values(module(data[i].expand(shape).contiguous()), i)
        found = values(result, i)
        assert [tuple(x.shape) for x in found] == [tuple(x.shape) for x in expected]
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_linear_maps_stay_compact():
    W = tensor(4, 5)
    graph = fx.Graph()
    x = graph.placeholder("x")
    flat = graph.call_function(aten.view.default, (x, [6, 4]))
    flat.meta["val"] = tensor(6, 4)
    product = graph.call_function(aten.mm.default, (flat, graph.get_attr("W")))
    product.meta["val"] = tensor(6, 5)
    back = graph.call_function(aten.view.default, (product, [2, 3, 5]))
    back.meta["val"] = tensor(2, 3, 5)
    graph.output(back)
    result = BatchInterpreter(fx.GraphModule({"W": W}, graph), 4).run(
        Batched(torch.eye(4, dtype=torch.double).view(4, 1, 1, 4), (2, 3, 4))
    )
    assert result.data.shape == (4, 1, 1, 5)
    assert torch.equal(result.data[:, 0, 0], W)


def attention(*, p: float = 0.0, mask: Tensor | None = None) -> tuple[Any, Tensor]:
    q, k, v = tensor(2, 3, 5, 4), tensor(2, 3, 5, 4), tensor(2, 3, 5, 4)
    out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, False, attn_mask=mask)
    graph = fx.Graph()
    live = graph.placeholder("g")
    saved = {"q": q, "k": k, "v": v, "out": out, "lse": lse, "mask": mask}
    nodes = {name: graph.get_attr(name) if value is not None else None for name, value in saved.items()}
    target = aten._scaled_dot_product_flash_attention_for_cpu_backward.default
    args = (live, *[nodes[name] for name in ("q", "k", "v", "out", "lse")], p, False)
    node = graph.call_function(target, args, {"attn_mask": nodes["mask"]})
    node.meta["val"] = (q, k, v)
    graph.output(node)
    return fx.GraphModule({n: t for n, t in saved.items() if t is not None}, graph), tensor(R, 2, 3, 5, 4)


@pytest.mark.parametrize(
    "mask", [None, tensor(5, 5), tensor(2, 1, 5, 5), tensor(1, 1, 5, 5)], ids=["none", "2", "4", "1"]
)
def test_fused_attention_is_folded(mask: Tensor | None):
    module, g = attention(mask=mask)
    run = BatchInterpreter(module, R)
    found = run.run(Batched(g, tuple(g.shape[1:])))
    assert (run.attention, run.unrolled) == ({"fold"}, {})
    for i in range(R):
        torch.testing.assert_close([x.full()[i] for x in found], list(module(g[i])), rtol=1e-12, atol=1e-12)


def test_attention_with_dropout_is_unrolled():
    class Seen(torch.utils._python_dispatch.TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if "attention" in str(func):
                self.calls += 1
                return args[1:4]  # the CPU has no fused attention with dropout
            return func(*args, **(kwargs or {}))

    module, g = attention(p=0.5)
    run = BatchInterpreter(module, R)
    with Seen() as seen:
        run.run(Batched(g, tuple(g.shape[1:])))
    assert (run.attention, seen.calls) == ({"unroll"}, R)
    assert list(run.unrolled.values()) == ["its dropout mask is drawn for the original batch"]


NONLINEAR: dict[str, tuple[Any, Callable[[Any], tuple[Any, ...]]]] = {
    "square": (aten.mul.Tensor, lambda x: (x, x)),
    "product": (aten.mm.default, lambda x: (x, x)),
    "affine": (aten.add.Tensor, lambda x: (x, tensor(4, 4))),
    "affine number": (aten.add.Tensor, lambda x: (x, 1.0)),
    "divided by itself": (aten.div.Tensor, lambda x: (tensor(4, 4), x)),
    "clamp": (aten.clamp.default, lambda x: (x, -1, 1)),
    "tanh": (aten.tanh.default, lambda x: (x,)),
    "largest": (aten.amax.default, lambda x: (x, [-1])),
    "norm": (aten.linalg_vector_norm.default, lambda x: (x,)),
    "fill": (aten.masked_fill.Scalar, lambda x: (x, torch.ones(4, 4, dtype=torch.bool), 1.0)),
    "addcmul": (aten.addcmul.default, lambda x: (tensor(4, 4), x, tensor(4, 4))),
    "lerp": (aten.lerp.Scalar, lambda x: (x, tensor(4, 4), 0.5)),
}


@pytest.mark.parametrize("name", NONLINEAR)
def test_what_is_not_linear_is_refused(name: str):
    target, args = NONLINEAR[name]
    module = call(target, (4, 4), args)
    with pytest.raises(EngineError, match="not linear in it"):
        BatchInterpreter(module, R).run(Batched(tensor(R, 4, 4), (4, 4)))


LINEAR: dict[str, tuple[Any, Callable[[Any], tuple[Any, ...]]]] = {
    "add zero": (aten.add.Tensor, lambda x: (x, 0)),
    "negative": (aten.neg.default, lambda x: (x,)),
    "fill": (aten.masked_fill.Scalar, lambda x: (x, torch.eye(4, dtype=torch.bool), 0.0)),
    "addcmul": (aten.addcmul.default, lambda x: (x, x, tensor(4, 4))),
    "lerp": (aten.lerp.Scalar, lambda x: (x, x, 0.5)),
    "backward": (aten.tanh_backward.default, lambda x: (x, tensor(4, 4))),
    "addmm": (aten.addmm.default, lambda x: (x, x, tensor(4, 4))),
}


@pytest.mark.parametrize("name", LINEAR)
def test_what_is_linear_passes(name: str):
    target, args = LINEAR[name]
    module = call(target, (4, 4), args)
    data = tensor(R, 4, 4)
    result = BatchInterpreter(module, R).run(Batched(data, (4, 4)))
    for i in range(R):
        torch.testing.assert_close(result.full()[i], module(data[i]))
