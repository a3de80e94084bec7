"""Rules for running an operator once for several regions; those that hold for cotangents too are taken from there."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from lbi_compile._torch import pytree
from lbi_compile.passes.batch_cotangents import RULES, Batched, BatchInterpreter, Refused, Rule

aten = torch.ops.aten


# Backward operators that work number by number: with regions in front of all operands they mean what they meant. (For
# cotangents they are decomposed: what does not depend on the cotangent is then computed once and not R times.)
POINTWISE = frozenset({
    aten.gelu_backward.default, aten.tanh_backward.default, aten.sigmoid_backward.default, aten.silu_backward.default,
    aten.threshold_backward.default, aten.hardtanh_backward.default, aten.leaky_relu_backward.default,
    aten.elu_backward.default, aten.softplus_backward.default, aten.mish_backward.default,
})  # fmt: skip


class RegionInterpreter(BatchInterpreter):
    """Interpret a piece of a graph for several regions; every operand may differ from region to region."""

    rules: ClassVar[dict[Any, Rule]] = dict(RULES)

    def check(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Regions, unlike cotangents, need no linear operators."""


def _rule(*targets: Any) -> Any:
    def register(function: Rule) -> Rule:
        RegionInterpreter.rules.update(dict.fromkeys(targets, function))
        return function

    return register


def _stacked(run: BatchInterpreter, x: Any) -> Tensor:
    return x.full() if isinstance(x, Batched) else x.expand(run.r, *x.shape)


@_rule(*POINTWISE)
def _each(run: BatchInterpreter, target: Any, *args: Any, **kwargs: Any) -> Batched:
    inner, inner_kwargs = pytree.tree_map_only((Batched, Tensor), lambda x: _stacked(run, x), (args, kwargs))
    return run.wrap(target(*inner, **inner_kwargs))


@_rule(aten.mm.default)
def _mm(run: BatchInterpreter, target: Any, a: Any, b: Any) -> Batched:
    return run.wrap(aten.bmm.default(_stacked(run, a), _stacked(run, b)))


@_rule(aten.addmm.default)
def _addmm(run: BatchInterpreter, target: Any, c: Any, a: Any, b: Any, **kwargs: Any) -> Batched:
    c = _stacked(run, c)
    c = c if c.dim() == 3 else c.unsqueeze(1)
    return run.wrap(aten.baddbmm.default(c, _stacked(run, a), _stacked(run, b), **kwargs))


@_rule(aten.bmm.default)
def _bmm(run: BatchInterpreter, target: Any, a: Any, b: Any) -> Batched:
    a, b = _stacked(run, a), _stacked(run, b)
    return run.wrap(aten.bmm.default(a.flatten(0, 1), b.flatten(0, 1)).unflatten(0, a.shape[:2]))


@_rule(aten.native_layer_norm.default)
def _layer_norm(
    run: BatchInterpreter, target: Any, x: Any, size: Any, weight: Any, bias: Any, eps: float
) -> tuple[Batched, ...]:
    """The norm of all regions at once, then each region's own scale and shift."""
    whole = _stacked(run, x)
    out, *statistics = target(whole, size, None, None, eps)
    inner = [1] * (whole.dim() - 1 - len(size))
    if weight is not None:
        own = _stacked(run, weight)
        out = out * own.reshape(run.r, *inner, *own.shape[1:])
    if bias is not None:
        own = _stacked(run, bias)
        out = out + own.reshape(run.r, *inner, *own.shape[1:])
    return run.wrap(out), *map(run.wrap, statistics)


@_rule(
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_flash_attention_for_cpu_backward.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_efficient_attention_backward.default,
)
def _attention(run: BatchInterpreter, target: Any, *args: Any, **kwargs: Any) -> Any:
    """Put the regions into the batch axis of a fused attention."""
    names = [argument.name for argument in target._schema.arguments]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    if given.get("dropout_p", 0.0) != 0:
        raise Refused("its dropout mask is drawn for the batch of one region")
    batch = given["query"].shape[0]

    def fold(x: Any) -> Any:
        # a mask of two axes holds for every sample, seeds have no batch axis
        if not isinstance(x, (Batched, Tensor)) or len(x.shape) <= 2:
            if isinstance(x, Batched):
                raise Refused("a mask without a batch axis that differs from region to region")
            return x
        whole = _stacked(run, x)
        return whole.expand(run.r, batch, *whole.shape[2:]).reshape(run.r * batch, *whole.shape[2:])

    inner, inner_kwargs = pytree.tree_map_only((Batched, Tensor), fold, (args, kwargs))
    results = target(*inner, **inner_kwargs)
    return tuple(
        run.wrap(x.view(run.r, batch, *x.shape[1:])) if isinstance(x, Tensor) and x.dim() > 1 else x for x in results
    )
