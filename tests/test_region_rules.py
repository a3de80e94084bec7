"""Rules that run an operator once for several regions, against one run for each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_map_only

from lbi_compile.passes.batch_cotangents import Batched
from lbi_compile.passes.region_rules import RegionInterpreter

aten = torch.ops.aten
REGIONS = 3


def value(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.double)


class Each:
    """An operand that differs from region to region, ``[*shape]`` in each."""

    def __init__(self, *shape: int) -> None:
        self.data = value(REGIONS, *shape)


class Same(Each):
    """One that differs by what it is, but has the same numbers along its first axis, which is kept at size 1."""

    def __init__(self, *shape: int) -> None:
        super().__init__(1, *shape[1:])
        self.shape = shape


def both(target: Any, *args: Any, **kwargs: Any) -> tuple[list[Any], list[Any], RegionInterpreter]:
    """Results of a rule, those of the operator region by region stacked, and what ran the rule."""

    def one(k: int) -> Sequence[Any]:
        inner, named = tree_map_only(Each, lambda x: _full(x)[k], (args, kwargs))
        return _several(target(*inner, **named))

    graph, given = fx.Graph(), []

    def place(x: Any) -> fx.Node:
        given.append(Batched(x.data, tuple(_full(x).shape[1:])) if isinstance(x, Each) else x)
        return graph.placeholder(f"x{len(given)}")

    node = graph.call_function(target, *tree_map_only((Each, Tensor), place, (args, kwargs)))
    node.meta["val"] = one(0)[0]
    graph.output(node)
    run = RegionInterpreter(fx.GraphModule({}, graph), REGIONS)
    found = [x.full() if isinstance(x, Batched) else x for x in _several(run.run(*given))]
    columns = zip(*map(one, range(REGIONS)), strict=True)
    return found, [torch.stack(c) if isinstance(c[0], Tensor) else c[0] for c in columns], run


def _several(result: Any) -> Sequence[Any]:
    return result if isinstance(result, (tuple, list)) else (result,)


def _full(operand: Each) -> Tensor:
    return operand.data.expand(REGIONS, *operand.shape) if isinstance(operand, Same) else operand.data


CASES: dict[str, tuple[Any, ...]] = {
    "gelu_backward": (aten.gelu_backward.default, Each(2, 4), Each(2, 4)),
    "gelu_backward of what all share": (aten.gelu_backward.default, Each(2, 4), value(2, 4)),
    "gelu_backward of one for all rows": (aten.gelu_backward.default, Same(2, 4), Each(2, 4)),
    "threshold_backward": (aten.threshold_backward.default, Each(2, 4), Each(2, 4), 0.25),
    "mm": (aten.mm.default, Each(2, 4), Each(4, 5)),
    "mm of what all share": (aten.mm.default, value(2, 4), Each(4, 5)),
    "mm by what all share": (aten.mm.default, Each(2, 4), value(4, 5)),
    "addmm": (aten.addmm.default, Each(5), Each(2, 4), Each(4, 5)),
    "addmm of rows": (aten.addmm.default, Each(2, 5), Each(2, 4), Each(4, 5)),
    "addmm of a shared bias": (aten.addmm.default, value(5), Each(2, 4), Each(4, 5)),
    "bmm": (aten.bmm.default, Each(2, 3, 4), Each(2, 4, 5)),
    "bmm by what all share": (aten.bmm.default, Each(2, 3, 4), value(2, 4, 5)),
    "layer_norm": (aten.native_layer_norm.default, Each(2, 3, 4), [4], Each(4), Each(4), 1e-5),
    "layer_norm of what all share": (aten.native_layer_norm.default, value(2, 4), [4], Each(4), value(4), 1e-5),
    "layer_norm over two axes": (aten.native_layer_norm.default, Each(2, 3, 4), [3, 4], Each(3, 4), None, 0.5),
    "layer_norm without a scale": (aten.native_layer_norm.default, Each(2, 4), [4], None, Each(4), 1e-5),
    "layer_norm alone": (aten.native_layer_norm.default, Each(2, 4), [4], None, None, 1e-5),
}


@pytest.mark.parametrize("name", CASES)
def test_a_rule_equals_one_run_per_region(name: str):
    target, *args = CASES[name]
    kwargs = {"beta": 0.5, "alpha": 2.0} if name == "addmm of rows" else {}
    found, expected, run = both(target, *args, **kwargs)
    assert not run.unrolled
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a, b, rtol=0, atol=1e-14)


ATTENTION = aten._scaled_dot_product_flash_attention_for_cpu.default
QKV = (2, 2, 5, 4)


@pytest.mark.parametrize(
    "args",
    [
        [Each(*QKV), Each(*QKV), Each(*QKV)],
        [Each(*QKV), value(*QKV), Same(*QKV)],
        [value(*QKV), value(*QKV), Each(*QKV), 0.0, True],
    ],
    ids=["all", "some shared", "causal"],
)
def test_regions_join_the_batch_of_an_attention(args: list[Any]):
    found, expected, run = both(ATTENTION, *args)
    assert not run.unrolled
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a, b, rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("mask", "why"),
    [
        (value(5, 5), ""),
        (value(2, 1, 5, 5), ""),
        (value(1, 1, 5, 5), ""),
        (Each(2, 1, 5, 5), ""),
        (Each(5, 5), "Refused: a mask without a batch axis that differs from region to region"),
    ],
    ids=["of all samples", "of each sample", "of one sample", "of each region", "of all samples of each region"],
)
def test_masks_of_an_attention(mask: Any, why: str):
    found, expected, run = both(ATTENTION, Each(*QKV), Each(*QKV), Each(*QKV), attn_mask=mask)
    assert list(run.unrolled.values()) == ([why] if why else [])
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-14)


def test_an_attention_with_dropout_is_not_folded():
    # the CPU's has none: each region by itself is refused too, by the operator
    with pytest.raises(RuntimeError, match="dropout"):
        both(ATTENTION, Each(*QKV), value(*QKV), value(*QKV), 0.5)
