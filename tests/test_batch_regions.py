"""Regions that are alike run as one graph: the same gradients, the same random numbers, fewer operators."""

from __future__ import annotations

import importlib
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

import lbi_compile
from lbi_compile import BoundedModule
from lbi_compile.passes.alike import CHAIN, REGION, BatchRecord, groups
from lbi_compile.passes.batch_regions import batch_regions
from lbi_compile.passes.region_sums import sum_over_regions
from lbi_compile.passes.scan_backward import ScanRecord
from lbi_compile.verify import relative_errors
from tests.cases import call, gradients, in_float64, with_batch

K, B, R, D = 5, 3, 4, 6


def record(bounded: BoundedModule) -> ScanRecord:
    """What became of the one graph that the scan engine compiled."""
    ((_, found),) = bounded._compiled.values()
    return found


@pytest.mark.parametrize(
    ("name", "depth", "regions", "options"),
    [
        ("mlp", 8, 4, {"interface": "pooled"}),
        pytest.param("transformer", 4, 4, {"interface": "token", "cell": "gru"}, marks=pytest.mark.slow),
        pytest.param("mlp", 9, 3, {"interface": "pooled"}, marks=pytest.mark.slow),
        pytest.param("transformer", 5, 4, {"interface": "token", "cell": "linear"}, marks=pytest.mark.slow),
        pytest.param("transformer", 6, 3, {"interface": "chunked"}, marks=pytest.mark.slow),
        pytest.param("vit", 6, 3, {"interface": "pooled"}, marks=pytest.mark.slow),
        pytest.param("gpt2", 6, 4, {"interface": "token"}, marks=pytest.mark.slow),
    ],
)
def test_gradients_and_random_numbers_are_those_of_autograd(
    name: str, depth: int, regions: int, options: dict[str, Any]
) -> None:
    model, inputs = in_float64(name, depth=depth)
    bounded = lbi_compile.transform(model, inputs, regions=regions, r=R, **options)
    for size in (3, 5):
        some = with_batch(inputs, size)
        expected = gradients(bounded, some, "autograd")
        state = torch.get_rng_state()
        found = gradients(bounded, some, "scan")
        assert torch.equal(torch.get_rng_state(), state)
        assert max(relative_errors(found, expected).values()) <= 1e-10
    batched = record(bounded).batched
    assert bounded.engine.batched == batched.groups >= 20
    assert batched.nodes >= 2 * batched.groups
    assert not batched.unbatched


@pytest.mark.slow
def test_without_batching_every_region_runs_by_itself() -> None:
    model, inputs = in_float64("mlp", depth=4)
    nodes = {}
    for batched in (True, False):
        bounded = lbi_compile.transform(model, inputs, regions=4, r=R, interface="pooled", batch_regions=batched)
        expected = gradients(bounded, inputs, "autograd")
        assert max(relative_errors(gradients(bounded, inputs, "scan"), expected).values()) <= 1e-10
        assert bool(record(bounded).batched.groups) == batched
        nodes[batched] = record(bounded).backward_nodes
        torch.manual_seed(7)
        with bounded.with_engine("scan"):
            out = call(bounded, inputs)
        torch.manual_seed(7)
        with bounded.with_engine("autograd"):
            assert torch.equal(out, call(bounded, inputs))  # the pooled forward is a chain and stays one
    assert nodes[True] < nodes[False]


class Uneven(nn.Module):
    """Blocks of two kinds, so that regions are not alike; two of them share their weights."""

    def __init__(self) -> None:
        super().__init__()
        tied = nn.Linear(D, D)
        wide = [nn.Sequential(nn.Linear(D, 9), nn.GELU(), nn.Linear(9, D)) for _ in range(2)]
        self.stem = nn.Linear(D, D)
        self.blocks = nn.ModuleList([nn.Linear(D, D), wide[0], tied, nn.Linear(D, D), wide[1], tied])
        self.head = nn.Linear(D, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x).tanh()
        return self.head(x)


def test_regions_that_are_not_alike_are_batched_where_they_are() -> None:
    model, x = Uneven().double(), torch.randn(B, D).double()
    names = [f"blocks.{i}" for i in range(1, 6)]
    bounded = lbi_compile.transform(model, x, regions=names, r=R, interface="pooled", readout="sum")
    found = gradients(bounded, x, "scan")
    assert max(relative_errors(found, gradients(bounded, x, "autograd")).values()) <= 1e-10
    assert record(bounded).batched.groups >= 20


# -- the pass on graphs written by hand


def traced(function: Any, *inputs: Tensor) -> fx.GraphModule:
    """The graph of ``function``, all of it forward."""
    gm = make_fx(function, tracing_mode="fake")(*inputs)
    for node in gm.graph.nodes:
        node.meta["partitioner_tag"] = "is_forward"
    return gm


def label(gm: fx.GraphModule, regions: list[list[str]]) -> None:
    by_name = {node.name: node for node in gm.graph.nodes}
    for k, names in enumerate(regions):
        for name in names:
            by_name[name].meta["custom"] = {CHAIN: 0, REGION: k}


def targets(gm: fx.GraphModule) -> list[str]:
    return [str(node.target) for node in gm.graph.nodes if node.op == "call_function"]


def test_independent_products_become_one() -> None:
    x, w = torch.randn(B, D), [torch.randn(D, D) for _ in range(3)]

    def three(x: Tensor, *w: Tensor) -> Tensor:
        return (x @ w[0]).tanh() + (x @ w[1]).tanh() + (x @ w[2]).tanh()

    gm = traced(three, x, *w)
    label(gm, [["mm", "tanh"], ["mm_1", "tanh_1"], ["mm_2", "tanh_2"]])
    found = BatchRecord()
    batch_regions(gm, record=found)
    assert (found.groups, found.nodes, found.stacks, found.sums) == (2, 6, 1, 1)
    assert found.stacked_numbers == 3 * D * D
    assert targets(gm).count("aten.bmm.default") == targets(gm).count("aten.sum.dim_IntList") == 1
    assert "aten.mm.default" not in targets(gm)
    torch.testing.assert_close(gm(x, *w), three(x, *w))


def test_a_chain_is_left_alone() -> None:
    x, w = torch.randn(B, D), [torch.randn(D, D) for _ in range(3)]

    def chain(x: Tensor, *w: Tensor) -> Tensor:
        for one in w:
            x = (x @ one).tanh()
        return x

    gm = traced(chain, x, *w)
    label(gm, [["mm", "tanh"], ["mm_1", "tanh_1"], ["mm_2", "tanh_2"]])
    before = targets(gm)
    batch_regions(gm, record=BatchRecord())
    assert targets(gm) == before


def test_a_member_that_all_others_wait_for_is_left_out() -> None:
    x, w = torch.randn(B, D), [torch.randn(D, D) for _ in range(4)]

    def first_then_rest(x: Tensor, *w: Tensor) -> Tensor:
        x = x @ w[0]
        return (x @ w[1]) * (x @ w[2]) * (x @ w[3])

    gm = traced(first_then_rest, x, *w)
    label(gm, [["mm"], ["mm_1"], ["mm_2"], ["mm_3"]])
    (group,) = groups(gm.graph)
    assert group.regions == (1, 2, 3)
    batch_regions(gm, record=BatchRecord())
    assert targets(gm).count("aten.mm.default") == 1
    torch.testing.assert_close(gm(x, *w), first_then_rest(x, *w))


def test_groups_that_wait_for_each_other_crosswise_are_given_up() -> None:
    x, w = torch.randn(D, D), [torch.randn(D, D) for _ in range(2)]

    def crossed(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        p0, q0 = x @ a, torch.addmm(x, x, b)
        return (q0 @ a) * torch.addmm(p0, x, b)  # p1 waits for q0, q1 for p0

    gm = traced(crossed, x, *w)
    label(gm, [["mm", "addmm"], ["mm_1", "addmm_1"]])
    assert not groups(gm.graph)


def test_random_numbers_keep_their_order() -> None:
    x, w = torch.randn(B, D), [torch.randn(D, D) for _ in range(2)]

    def drop(x: Tensor, *w: Tensor) -> Tensor:
        return torch.ops.aten.add(*[_drop(x, one) for one in w])

    gm = traced(drop, x, *w)
    names = [node.name for node in gm.graph.nodes if node.op == "call_function"][:-1]
    half = len(names) // 2
    label(gm, [names[:half], names[half:]])
    batch_regions(gm, record=BatchRecord())
    assert "aten.bmm.default" in targets(gm)
    torch.manual_seed(1)
    expected = drop(x, *w)
    torch.manual_seed(1)
    torch.testing.assert_close(gm(x, *w), expected)


def _drop(x: Tensor, w: Tensor) -> Tensor:
    x = torch.ops.aten.native_dropout(x @ w, 0.5, True)[0]
    return torch.ops.aten.native_dropout(x @ w, 0.5, True)[0]


def test_a_chain_of_sums_over_items_is_one_sum() -> None:
    x, y = torch.randn(K, B, D), torch.randn(B, D)

    def total(x: Tensor, y: Tensor) -> Tensor:
        for item in x.unbind():
            y = y + item
        return y

    gm = traced(total, x, y)
    assert sum_over_regions(gm.graph) == 1
    gm.graph.eliminate_dead_code()
    gm.recompile()
    assert targets(gm).count("aten.add.Tensor") == 1
    torch.testing.assert_close(gm(x, y), total(x, y))


def test_sums_of_another_dtype_or_shape_are_left_alone() -> None:
    x, y = torch.randn(K, D), torch.randn(B, D, dtype=torch.double)

    def total(x: Tensor, y: Tensor) -> Tensor:
        for item in x.unbind():
            y = y + item
        return y

    gm = traced(total, x, y)
    assert sum_over_regions(gm.graph) == 0


def test_what_cannot_be_traced_for_all_regions_stays_as_it_is_and_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("lbi_compile.passes.batch_regions")
    trace, calls = module._Emitter._trace, itertools.count()

    def every_other(self: Any, *args: Any) -> Any:
        if next(calls) % 2:
            raise RuntimeError("not today")
        return trace(self, *args)

    monkeypatch.setattr(module._Emitter, "_trace", every_other)
    model, inputs = in_float64("mlp", depth=4)
    bounded = lbi_compile.transform(model, inputs, regions=4, r=R, interface="pooled")
    found = gradients(bounded, inputs, "scan")
    assert max(relative_errors(found, gradients(bounded, inputs, "autograd")).values()) <= 1e-10
    with bounded.with_engine("scan"):
        call(bounded, inputs)
    assert bounded.engine.batched
    assert {why for _, why in bounded.engine.unbatched} == {"RuntimeError: not today"}
    assert "not batched over regions: aten." in str(bounded.engine)
