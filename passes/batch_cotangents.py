"""Run a slice of a backward graph for R cotangents at once, operator by operator.

A value that depends on the cotangents has a leading axis R in front of its own axes. An axis of its own along which all
entries are equal may be kept at size 1: until an operator meets a value that differs from index to index (a saved
activation, say), the Jacobian of a linear map is computed once and not once per index.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx

import lbi_compile.kernels.ops  # noqa: F401  registers the operators
from lbi_compile._torch import same_shape, same_size
from lbi_compile.passes.linearity import require_linear

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Batched:
    """R values of one node.

    Attributes:
        data: ``[R, *axes]``, each axis of ``shape`` or 1.
        shape: The node's own shape.
    """

    data: Tensor
    shape: tuple[Any, ...]

    def full(self) -> Tensor:
        """``[R, *shape]``."""
        if same_shape(self.data.shape[1:], self.shape):
            return self.data
        return self.data.expand(self.data.shape[0], *self.shape)

    def aligned(self, rank: int) -> Tensor:
        """``data`` with new axes of size 1 in front of the node's own, so that it broadcasts against ``rank`` axes."""
        data = self.data
        for _ in range(rank - len(self.shape)):
            data = data.unsqueeze(1)
        return data

    def compact(self, axis: int) -> bool:
        """Axis ``axis`` of the node is kept at size 1."""
        size = self.data.shape[axis + 1]
        return isinstance(size, int) and size == 1


Rule = Callable[..., Any]
RULES: dict[Any, Rule] = {}


class Refused(Exception):
    """A rule cannot batch this call."""


class BatchInterpreter(fx.Interpreter):
    """Interpret a slice, some of whose inputs are :class:`Batched`.

    Every operator is batched by a rule of this file, else by its vmap rule, else run once per cotangent.

    Args:
        module: The slice; call nodes carry ``meta["val"]``.
        r: Number of cotangents.

    Attributes:
        unrolled: Operator to the reason why it ran once per cotangent.
        attention: How attention backwards were batched: ``"fold"`` or ``"unroll"``.
    """

    rules: ClassVar[dict[Any, Rule]] = RULES

    def __init__(self, module: fx.GraphModule, r: int) -> None:
        super().__init__(module)
        self.r = r
        self.unrolled: dict[str, str] = {}
        self.attention: set[str] = set()
        self._node: fx.Node | None = None

    def run_node(self, n: fx.Node) -> Any:
        self._node = n
        return super().run_node(n)

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        leaves, spec = pytree.tree_flatten((args, kwargs))
        if target is operator.getitem or not any(isinstance(leaf, Batched) for leaf in leaves):
            return super().call_function(target, args, kwargs)
        self.check(target, args, kwargs)
        try:
            rule = self.rules.get(target, _pointwise if torch.Tag.pointwise in target.tags else _vmap)
            return rule(self, target, *args, **kwargs)
        except Exception as error:  # whatever refused to be batched can still be run once per cotangent
            self.unrolled.setdefault(str(target), f"{type(error).__name__}: {str(error).splitlines()[0][:160]}")
            return self._unroll(target, leaves, spec)

    def check(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Refuse what is not linear in the cotangents.

        Raises:
            EngineError: It is not, or is not known to be.
        """
        require_linear(target, args, kwargs, live=lambda x: isinstance(x, Batched))

    def _unroll(self, target: Any, leaves: list[Any], spec: Any) -> Any:
        full = [leaf.full() if isinstance(leaf, Batched) else leaf for leaf in leaves]
        live = [isinstance(leaf, Batched) for leaf in leaves]
        results = []
        for i in range(self.r):
            args, kwargs = pytree.tree_unflatten([x[i] if on else x for x, on in zip(full, live, strict=True)], spec)
            results.append(target(*args, **kwargs))
        if isinstance(results[0], (tuple, list)):
            return tuple(None if one[0] is None else self.wrap(torch.stack(one)) for one in zip(*results, strict=True))
        return self.wrap(torch.stack(results))

    def wrap(self, data: Tensor, shape: Sequence[Any] | None = None) -> Batched:
        """A result; its own shape is that of ``data`` unless given."""
        return Batched(data, tuple(data.shape[1:] if shape is None else shape))

    def result_shape(self) -> tuple[Any, ...]:
        """Shape of the current node for one cotangent."""
        assert self._node is not None
        return tuple(self._node.meta["val"].shape)

    def result_value(self) -> Any:
        """Fake value of the current node for one cotangent."""
        assert self._node is not None
        return self._node.meta["val"]


def rule(*targets: Any) -> Callable[[Rule], Rule]:
    """Register a batching rule ``rule(run, target, *args, **kwargs)``; at least one argument is Batched."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(targets, function))
        return function

    return register


def _vmap(run: BatchInterpreter, target: Any, *args: Any, **kwargs: Any) -> Any:
    leaves, spec = pytree.tree_flatten((args, kwargs))
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Batched)]
    several, present = False, []

    def one(*live: Tensor) -> tuple[Tensor, ...]:
        nonlocal several, present
        values = list(leaves)
        for place, value in zip(places, live, strict=True):
            values[place] = value
        inner_args, inner_kwargs = pytree.tree_unflatten(values, spec)
        result = target(*inner_args, **inner_kwargs)
        several = isinstance(result, (tuple, list))
        results = result if several else (result,)
        present = [x is not None for x in results]
        return tuple(x for x in results if x is not None)

    left = iter(torch.vmap(one)(*[leaves[i].full() for i in places]))
    results = tuple(run.wrap(next(left)) if on else None for on in present)
    return results if several else results[0]


def _pointwise(run: BatchInterpreter, target: Any, *args: Any, **kwargs: Any) -> Batched:
    leaves, spec = pytree.tree_flatten((args, kwargs))
    shape = run.result_shape()
    rank = len(shape)

    def align(leaf: Any) -> Any:
        if not isinstance(leaf, Batched):
            return leaf
        if not leaf.shape and rank and leaf.data.dtype != run.result_value().dtype:
            raise Refused("a scalar would change the dtype rules of its operator")
        return leaf.aligned(rank)

    inner_args, inner_kwargs = pytree.tree_unflatten([align(leaf) for leaf in leaves], spec)
    return run.wrap(target(*inner_args, **inner_kwargs), shape)


@rule(
    aten.clone.default,
    aten.alias.default,
    aten.detach.default,
    aten.lift_fresh_copy.default,
    torch.ops.lbi.boundary_bwd.default,  # of a bounded model inside a region of another
)
def _same(run: BatchInterpreter, target: Any, x: Batched, *_: Any, **__: Any) -> Batched:
    # Memory formats and copies mean nothing to a functional graph, and channels_last does not exist with one more axis.
    return x


@rule(aten._to_copy.default)
def _cast(run: BatchInterpreter, target: Any, x: Batched, **kwargs: Any) -> Batched:
    kwargs.pop("memory_format", None)
    return run.wrap(target(x.data, **kwargs), x.shape)


@rule(aten.copy.default)
def _copy(run: BatchInterpreter, target: Any, into: Any, source: Any, non_blocking: bool = False) -> Any:
    value = run.result_value()
    if not isinstance(source, Batched):
        return source.to(device=value.device, dtype=value.dtype).expand(value.shape)
    data = source.aligned(value.dim())
    return run.wrap(data.to(device=value.device, dtype=value.dtype), value.shape)


@rule(
    aten.new_zeros.default,
    aten.new_ones.default,
    aten.new_full.default,
    aten.new_empty.default,
    aten.new_empty_strided.default,
    aten.zeros_like.default,
    aten.ones_like.default,
    aten.full_like.default,
    aten.empty_like.default,
)
def _shape_only(run: BatchInterpreter, target: Any, x: Batched, *args: Any, **kwargs: Any) -> Tensor:
    return target(torch.empty(x.shape, dtype=x.data.dtype, device=x.data.device), *args, **kwargs)


@rule(aten.mm.default)
def _mm(run: BatchInterpreter, target: Any, a: Any, b: Any) -> Batched:
    if not isinstance(a, Batched) or isinstance(b, Batched):
        return _vmap(run, target, a, b)
    data = a.full() if a.compact(1) else a.data  # [R, N or 1, A]
    rows = data.reshape(data.shape[0] * data.shape[1], data.shape[2])
    return run.wrap(aten.mm.default(rows, b).view(data.shape[0], data.shape[1], b.shape[1]), run.result_shape())


@rule(aten.view.default, aten._unsafe_view.default, aten.reshape.default)
def _view(run: BatchInterpreter, target: Any, x: Batched, size: Sequence[Any]) -> Batched:
    old, new = x.shape, run.result_shape()
    tail = 0
    while tail < min(len(old), len(new)) and same_size(old[-1 - tail], new[-1 - tail]):
        tail += 1
    lead = len(old) - tail
    kept = x.data.shape[1 + lead :]
    if all(x.compact(axis) for axis in range(lead)):
        return run.wrap(x.data.reshape(x.data.shape[0], *[1] * (len(new) - tail), *kept), new)
    data = x.data
    if any(x.compact(axis) for axis in range(lead)):
        # reshape would ask of each symbolic size whether it is one, to avoid this copy of an expanded tensor
        data = aten.clone.default(x.full(), memory_format=torch.contiguous_format)
    return run.wrap(data.reshape(data.shape[0], *new), new)


@rule(aten.expand.default)
def _expand(run: BatchInterpreter, target: Any, x: Batched, size: Sequence[Any], implicit: bool = False) -> Batched:
    shape = run.result_shape()
    return run.wrap(x.aligned(len(shape)), shape)


@rule(aten.unsqueeze.default)
def _unsqueeze(run: BatchInterpreter, target: Any, x: Batched, dim: int) -> Batched:
    return run.wrap(x.data.unsqueeze(dim % (len(x.shape) + 1) + 1), run.result_shape())


@rule(aten.permute.default)
def _permute(run: BatchInterpreter, target: Any, x: Batched, dims: Sequence[int]) -> Batched:
    return run.wrap(x.data.permute(0, *[d % len(x.shape) + 1 for d in dims]), run.result_shape())


@rule(aten.t.default)
def _t(run: BatchInterpreter, target: Any, x: Batched) -> Batched:
    return run.wrap(x.data.mT if len(x.shape) == 2 else x.data, run.result_shape())


@rule(aten.transpose.int)
def _transpose(run: BatchInterpreter, target: Any, x: Batched, a: int, b: int) -> Batched:
    rank = len(x.shape)
    return run.wrap(x.data.transpose(a % rank + 1, b % rank + 1), run.result_shape())


@rule(aten.sum.dim_IntList)
def _sum(
    run: BatchInterpreter, target: Any, x: Batched, dims: Sequence[int] | None, keepdim: bool = False, **kwargs: Any
) -> Batched:
    rank = len(x.shape)
    axes = sorted({d % rank for d in dims}) if dims else list(range(rank))
    data = x.full() if any(x.compact(axis) for axis in axes) else x.data
    return run.wrap(target(data, [axis + 1 for axis in axes], keepdim, **kwargs), run.result_shape())


def _with_lead(run: BatchInterpreter, x: Any) -> Tensor:
    return x.full() if isinstance(x, Batched) else x.expand(run.r, *x.shape)


@rule(aten.cat.default)
def _cat(run: BatchInterpreter, target: Any, tensors: Sequence[Any], dim: int = 0) -> Batched:
    # The legacy form in which an empty 1-d tensor joins any shape is left out: it is refused by torch.cat below.
    return run.wrap(target([_with_lead(run, t) for t in tensors], dim % len(run.result_shape()) + 1))


@rule(aten.slice_scatter.default, aten.select_scatter.default)
def _scatter(
    run: BatchInterpreter, target: Any, into: Any, source: Any, dim: int = 0, *args: Any, **kw: Any
) -> Batched:
    at = (dim % len(run.result_shape()) + 1, *args)
    return run.wrap(target(_with_lead(run, into), _with_lead(run, source), *at, **kw))


@rule(aten.gather.default, aten.scatter.src, aten.scatter.value, aten.scatter_add.default)
def _along(run: BatchInterpreter, target: Any, x: Any, dim: int, index: Tensor, *rest: Any, **kwargs: Any) -> Batched:
    if not index.dim() or isinstance(index, Batched):
        raise Refused("an index that is a scalar or depends on the cotangent")
    rest = tuple(_with_lead(run, item) if isinstance(item, (Batched, Tensor)) else item for item in rest)
    return run.wrap(target(_with_lead(run, x), dim % index.dim() + 1, _with_lead(run, index), *rest, **kwargs))


def _lead_index(indices: Sequence[Any]) -> list[Any]:
    used = [i for i, index in enumerate(indices) if index is not None]
    if any(isinstance(index, Batched) for index in indices) or used != list(range(used[0], used[-1] + 1)):
        raise Refused("indices apart from each other")
    return [None, *indices]


@rule(aten._unsafe_index.Tensor)
def _index(run: BatchInterpreter, target: Any, x: Batched, indices: Sequence[Any]) -> Batched:
    return run.wrap(target(x.full(), _lead_index(indices)))


@rule(aten._unsafe_index_put.default)
def _index_put(
    run: BatchInterpreter, target: Any, x: Any, indices: Sequence[Any], values: Any, accumulate: bool = False
) -> Batched:
    return run.wrap(target(_with_lead(run, x), _lead_index(indices), _lead_values(run, x, indices, values), accumulate))


@rule(aten._unsafe_masked_index.default)
def _masked_index(run: BatchInterpreter, target: Any, x: Any, mask: Any, indices: Sequence[Any], fill: Any) -> Batched:
    if isinstance(mask, Batched):
        raise Refused("a mask that depends on the cotangent")
    return run.wrap(target(_with_lead(run, x), mask, _lead_index(indices), fill))


@rule(aten._unsafe_masked_index_put_accumulate.default)
def _masked_index_put(
    run: BatchInterpreter, target: Any, x: Any, mask: Any, indices: Sequence[Any], values: Any
) -> Batched:
    if isinstance(mask, Batched):
        raise Refused("a mask that depends on the cotangent")
    return run.wrap(target(_with_lead(run, x), mask, _lead_index(indices), _lead_values(run, x, indices, values)))


def _lead_values(run: BatchInterpreter, x: Any, indices: Sequence[Any], values: Any) -> Tensor:
    placed = [index for index in indices if index is not None]
    if len(values.shape) != len(x.shape) - len(placed) + max(index.dim() for index in placed):
        raise Refused("values that broadcast over the indices")
    return _with_lead(run, values)


def _fold(run: BatchInterpreter, tensor: Any, batch: Any) -> Tensor:
    """Put R into the batch axis: ``[B, ...]`` or ``[R, B, ...]`` -> ``[R*B, ...]``; a batch axis of 1 grows to B."""
    lead = _with_lead(run, tensor)
    return lead.expand(run.r, batch, *lead.shape[2:]).reshape(run.r * batch, *lead.shape[2:])


def _unfold(run: BatchInterpreter, tensor: Tensor, batch: Any) -> Batched:
    return run.wrap(tensor.view(run.r, batch, *tensor.shape[1:]))


def _fold_shape(run: BatchInterpreter, tensor: Tensor, batch: Any) -> Tensor:
    """Stands for a folded input that an operator reads no values of."""
    return tensor.new_empty(run.r * batch, *tensor.shape[1:])


@rule(aten.convolution_backward.default)
def _convolution(
    run: BatchInterpreter, target: Any, grad: Any, x: Any, weight: Any, sizes: Any, *args: Any
) -> tuple[Batched, None, None]:
    *place, mask = args
    if not isinstance(grad, Batched) or isinstance(weight, Batched) or mask[1] or mask[2]:
        raise Refused("a convolution whose weight depends on the cotangent")
    batch = x.shape[0]
    wanted = [True, False, False]
    result = target(_fold(run, grad, batch), _fold_shape(run, x, batch), weight, sizes, *place, wanted)[0]
    return _unfold(run, result, batch), None, None


@rule(
    aten.avg_pool2d_backward.default,
    aten.avg_pool3d_backward.default,
    aten._adaptive_avg_pool2d_backward.default,
    aten._adaptive_avg_pool3d_backward.default,
    aten.max_pool2d_with_indices_backward.default,
    aten.max_pool3d_with_indices_backward.default,
)
def _pool(run: BatchInterpreter, target: Any, grad: Any, x: Any, *args: Any) -> Batched:
    if x.dim() != (5 if "3d" in str(target) else 4):
        raise Refused("pooling without a batch axis")
    batch = x.shape[0]
    folded = [_fold(run, item, batch) if isinstance(item, Tensor) else item for item in args]
    return _unfold(run, target(_fold(run, grad, batch), _fold_shape(run, x, batch), *folded), batch)


@rule(
    aten._scaled_dot_product_flash_attention_for_cpu_backward.default,
    aten._scaled_dot_product_flash_attention_backward.default,
    aten._scaled_dot_product_efficient_attention_backward.default,
    aten._scaled_dot_product_cudnn_attention_backward.default,
)
def _attention(run: BatchInterpreter, target: Any, *args: Any, **kwargs: Any) -> Any:
    """Fold R into the batch axis of a fused attention backward, or run it R times."""
    names = [argument.name for argument in target._schema.arguments]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    leaves, spec = pytree.tree_flatten((args, kwargs))
    if any(isinstance(value, Batched) for name, value in given.items() if name not in ("grad_out", "grad_out_")):
        raise Refused("a saved value that depends on the cotangent")
    if (why := _cannot_fold(given)) is not None:
        run.attention.add("unroll")
        run.unrolled.setdefault(str(target), why)
        return run._unroll(target, leaves, spec)
    run.attention.add("fold")
    batch = given["query"].shape[0]
    for name, value in given.items():
        # Seeds and ragged offsets have no batch axis; a mask of two axes holds for every sample.
        if isinstance(value, (Batched, Tensor)) and len(value.shape) > 2:
            given[name] = _fold(run, value, batch)
    results = target(*[given.pop(name) for name in names[: len(args)]], **given)
    return tuple(None if result is None else _unfold(run, result, batch) for result in results)


def _cannot_fold(given: dict[str, Any]) -> str | None:
    if given["dropout_p"] != 0:
        return "its dropout mask is drawn for the original batch"
    if given.get("cum_seq_q") is not None:
        return "its batch is ragged"
    bias = given.get("attn_bias")
    if bias is not None and (bias.dim() != 4 or not isinstance(bias.shape[-1], int) or bias.shape[-1] % 8):
        return "its bias is laid out in padded rows, which folding would lose"
    return None
