"""Data parallel copies of a bounded model by DistributedDataParallel and by FSDP2, beside one process."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from lbi_compile import BoundedModule, EngineError, NotBuiltError, transform
from tests.models import ResidualMLP
from tests.ranks import run

ENGINES = ["auto", "chain", pytest.param("scan", marks=pytest.mark.slow)]


def made(engine: str) -> tuple[BoundedModule, Tensor, Tensor, dict[str, Tensor]]:
    """A bounded model, a batch, and the gradients of one process on all of it."""
    model = ResidualMLP(5, width=8, depth=4, classes=3).double()
    x, y = torch.randn(8, 5, dtype=torch.float64), torch.randn(8, 3, dtype=torch.float64)
    bounded = transform(model, x, regions=3, r=4, backward=engine)
    with bounded.with_engine("autograd"):
        loss(bounded, x, y).backward()
    expected = {name: p.grad.clone() for name, p in bounded.named_parameters() if p.grad is not None}
    bounded.zero_grad()
    return bounded, x, y, expected


def loss(module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return (module(x) - y).square().mean()


def apart(bounded: BoundedModule, expected: dict[str, Tensor], whole: Any = lambda grad: grad) -> float:
    named = dict(bounded.named_parameters())
    assert named.keys() == expected.keys()
    return max((whole(p.grad) - expected[name]).abs().max().item() for name, p in named.items())


@pytest.mark.parametrize("engine", ENGINES)
def test_ddp(engine):
    bounded, x, y, expected = made(engine)

    def work(rank: int) -> float:
        mine = slice(4 * rank, 4 * rank + 4)
        copies = DistributedDataParallel(bounded)
        loss(copies, x[mine], y[mine]).backward()
        return apart(bounded, expected)

    assert max(run(2, work)) < 1e-14


@pytest.mark.parametrize("engine", ENGINES)
def test_fsdp_on_the_whole(engine):
    bounded, x, y, expected = made(engine)

    def work(rank: int) -> float:
        fully_shard(bounded, mesh=init_device_mesh("cpu", (2,)))
        mine = slice(4 * rank, 4 * rank + 4)
        loss(bounded, x[mine], y[mine]).backward()
        return apart(bounded, expected, lambda grad: grad.full_tensor())

    assert max(run(2, work)) < 1e-14


def shard(bounded: BoundedModule) -> None:
    mesh = init_device_mesh("cpu", (2,))
    for region in bounded.regions:
        fully_shard(region, mesh=mesh, reshard_after_forward=True)
    theirs = {p for region in bounded.regions for p in region.parameters()}
    fully_shard(bounded, mesh=mesh, ignored_params=theirs)


def test_fsdp_on_regions_and_the_rest():
    bounded, x, y, expected = made("auto")
    parts = [sum(1 for _ in region.parameters()) for region in bounded.regions]
    assert min(parts) >= 6

    def work(rank: int) -> tuple[float, float, list[int]]:
        shard(bounded)
        mine = slice(4 * rank, 4 * rank + 4)
        optimizer = torch.optim.SGD(bounded.parameters(), 0.1)
        first = loss(bounded, x[mine], y[mine])
        first.backward()
        error = apart(bounded, expected, lambda grad: grad.full_tensor())
        optimizer.step()
        held = [p.to_local().numel() for region in bounded.regions for p in region.parameters()]
        return error, loss(bounded, x[mine], y[mine]).item() - first.item(), held

    whole = [p.numel() for region in bounded.regions for p in region.parameters()]
    (error, step, held), (other, _, rest) = run(2, work)
    assert max(error, other) < 1e-14
    assert step < 0
    # each rank keeps its share only
    assert [a + b for a, b in zip(held, rest, strict=True)] == whole
    assert sum(held) < 0.6 * sum(whole)


def test_a_capture_of_shards_is_refused():
    bounded, x, _, _ = made("auto")

    def work(rank: int) -> str:
        shard(bounded)
        bounded.eval()
        with pytest.raises(NotBuiltError, match="sharded over ranks") as refused:
            bounded(x)
        return refused.value.do

    assert "train and eval" in run(2, work)[0]


@pytest.mark.slow
def test_a_scan_over_regions_with_hooks_is_refused():
    bounded, x, _, _ = made("scan")

    def work(rank: int) -> str:
        shard(bounded)
        with pytest.raises(EngineError, match=r"torch\.compile does not trace") as refused:
            bounded(x)
        return refused.value.do

    assert "chain" in run(2, work)[0]


def test_regions_hold_what_they_alone_read():
    tied = ResidualMLP(5, width=8, depth=3, classes=3)
    tied.blocks[2].branch[0].weight = tied.blocks[0].branch[0].weight
    bounded = transform(tied, torch.randn(4, 5), regions=3, r=4)
    names = [{name for name, _ in region.named_parameters()} for region in bounded.regions]
    assert "blocks.0.norm.weight" in names[0]
    assert not any("branch.0" in name for name in names[0] | names[2])
    assert {"blocks.1.branch.0.weight", "blocks.1.branch.0.bias"} < names[1]
    twin = copy.deepcopy(bounded).double()
    for region in twin.regions:
        for name, p in region.named_parameters():
            assert p is twin.get_parameter(name)
            assert p.dtype == torch.float64
