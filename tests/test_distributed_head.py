"""A head on the last rank alone: every rank still returns, and differentiates, what one process does."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lbi_compile import BoundedModule, DistributedError, OptionError, transform
from lbi_compile.distributed import RegionParallel, clip_grad_norm_, parallelize, traffic
from tests import ranks
from tests.cases import call
from tests.distributed_models import FORMS, differences, form, gradients, held, model, spread_gradients

HEADS = [name for name in FORMS if "-head" in name]
QUICK = HEADS[:1]


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in HEADS])
def test_gradients_are_those_of_one_process(name: str):
    bounded, inputs, options = form(name)
    expected = gradients(bounded, inputs)
    for world in (3,) if name in QUICK else (1, 2, 4):
        assert differences(expected, spread_gradients(bounded, inputs, world, options)) < 1e-12


def squared(out: Tensor, target: Tensor) -> Tensor:
    """A loss."""
    return (out - target).square().sum()


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in HEADS])
def test_the_loss_alone_is_sent(name: str):
    bounded, inputs, options = form(name)
    target = torch.randn(call(bounded, inputs).shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = gradients(bounded, inputs, lambda module, x: squared(call(module, x), target))
    args, kwargs = ((), inputs) if isinstance(inputs, dict) else ((inputs,), {})

    def by_loss(module: nn.Module, _: object) -> Tensor:
        assert isinstance(module, RegionParallel)
        if isinstance(inputs, dict):
            return module.loss(**kwargs, criterion=lambda out, y: squared(out.logits, y), target=target)
        return module.loss(*args, criterion=squared, target=target)

    def work(rank: int) -> tuple[dict[str, Tensor], dict[tuple[str, str], int], set[str]]:
        parallel = parallelize(bounded, ranks.mesh(3), **options)
        with traffic() as counted:
            found = gradients(parallel, inputs, by_loss)
        return found, counted.by_kind(), held(parallel)

    found = ranks.run(3, work)
    assert differences(expected, [grads for grads, _, _ in found]) < 1e-12
    sent = [kinds for _, kinds, _ in found]
    assert [kinds["broadcast", "loss"] for kinds in sent] == [0, 0, 8]
    assert not any("readout" in what or "output" in what for kinds in sent for _, what in kinds)
    if name.startswith("pooled"):
        heads = [{key for key in holds if key.startswith("head")} for _, _, holds in found]
        assert heads[0] == heads[1] == set()
        assert heads[2] == {key for key in expected if key.startswith("head")} != set()


def test_outputs_cost_what_outputs_weigh():
    bounded, inputs, options = form("pooled-last-chain-head-stem")
    B, classes, R = *call(bounded, inputs).shape, bounded.plan.r

    def work(rank: int) -> tuple[dict[tuple[str, str], int], int]:
        parallel = parallelize(bounded, ranks.mesh(2), **options)
        call(parallel, inputs)
        with traffic() as counted:
            call(parallel, inputs).sum().backward()
        return counted.by_kind(), sum(p.numel() for p in parallel.parameters_of(parallel.placement.stem))

    (first, stem), (last, _) = ranks.run(2, work)
    assert first == {
        ("send", "latent"): B * R * 8,
        ("broadcast", "output"): 0,
        ("receive", "adjoint"): 0,
        ("all_reduce", "stem gradient"): stem * 8,
    }
    assert last == {
        ("receive", "latent"): 0,
        ("broadcast", "output"): B * classes * 8,
        ("send", "adjoint"): B * R * 8,
        ("all_reduce", "stem gradient"): stem * 8,
    }


class Dropped(nn.Module):
    """Random numbers in the stem, the regions and the head."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = model("mlp", dropout=0.3)[0]

    def forward(self, x: Tensor) -> Tensor:
        h = F.dropout(self.inner.stem(x), 0.3, self.training)
        for block in self.inner.blocks:
            h = block(h)
        return self.inner.head(F.dropout(h, 0.3, self.training))


def test_dropout_draws_the_same_on_any_number_of_ranks():
    _, inputs = model("mlp", dropout=0.3)
    bounded = transform(copy.deepcopy(Dropped()), inputs, regions=5, r=4, interface="pooled", readout="last")

    def work(rank: int, world: int) -> tuple[dict[str, Tensor], Tensor]:
        parallel = parallelize(bounded, ranks.mesh(world), head="last")
        return gradients(parallel, inputs), torch.get_rng_state()

    ((expected, state),) = ranks.run(1, work, 1)
    for world in (2, 3):
        found = ranks.run(world, work, world)
        assert all(torch.equal(other, state) for _, other in found)
        assert differences(expected, [one for one, _ in found]) < 1e-12


@pytest.mark.slow
def test_copies_under_ddp_and_clipping():
    bounded, inputs, options = form("pooled-last-scan-head")
    alone = copy.deepcopy(bounded)
    gradients(alone, inputs, lambda module, x: call(module, x).square().mean())
    norm = nn.utils.clip_grad_norm_(alone.parameters(), 0.1)
    expected = {name: p.grad for name, p in alone.named_parameters()}

    def work(rank: int) -> tuple[Tensor, dict[str, Tensor]]:
        mesh = ranks.mesh(2, dp=2)
        wrapped = DistributedDataParallel(parallelize(bounded, mesh, **options), process_group=mesh.get_group("dp"))
        part = inputs.chunk(2)[mesh.get_local_rank("dp")]
        gradients(wrapped, part, lambda module, x: call(module, x).square().mean())
        norm = clip_grad_norm_(wrapped, 0.1)
        return norm, {name.removeprefix("module."): p.grad for name, p in wrapped.named_parameters()}

    found = ranks.run(4, work)
    assert all(abs(float(one - norm)) < 1e-12 for one, _ in found)
    assert differences(expected, [grads for _, grads in found]) < 1e-12


@pytest.mark.slow
def test_a_last_region_in_another_shape_needs_no_broadcast():
    layers = [nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(3)]
    made = nn.Sequential(nn.Linear(6, 6), *layers, nn.Sequential(nn.Linear(6, 3), nn.Tanh())).double()
    x = torch.randn(4, 6).double()
    bounded = transform(made, x, regions=["2", "4"], r=4, interface="pooled", readout="last")
    assert tuple(bounded.plan.regions[-1].end.shape) != tuple(bounded.plan.canvas.shape)
    expected = gradients(bounded, x)
    assert differences(expected, spread_gradients(bounded, x, 2, {"head": "last"})) < 1e-12


def test_what_does_not_fit_is_refused():
    summed, _, _ = form("pooled-sum-scan")
    last, inputs, _ = form("pooled-last-scan-head")
    made, _ = model("mlp")
    taught = transform(made, inputs, regions=5, r=6, credit="sid")

    def work(rank: int) -> None:
        mesh = ranks.mesh(2)
        for refused in (summed, taught):
            with pytest.raises(OptionError, match='head="last" with'):
                parallelize(refused, mesh, head="last")
        with pytest.raises(OptionError, match="head='first'"):
            parallelize(last, mesh, head="first")
        with pytest.raises(DistributedError, match="loss on a model with credit='sid'"):
            parallelize(taught, mesh).loss(inputs, criterion=squared)
        everywhere: BoundedModule = last
        with pytest.raises(OptionError, match=r"a criterion that gives \[4, 3\]"):
            parallelize(everywhere, mesh).loss(inputs, criterion=lambda out, _: out)

    ranks.run(2, work)
