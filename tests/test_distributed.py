"""A bounded model spread over ranks computes what it computes in one process."""

from __future__ import annotations

import copy
import gc
import weakref
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from lbi_compile import (
    HBLL,
    SID,
    BoundedModule,
    DistributedError,
    DoubleBackwardError,
    MeshError,
    NotBuiltError,
    OptionError,
    PlanError,
    ShapeNotCapturedError,
    transform,
)
from lbi_compile.distributed import clip_grad_norm_, parallelize, traffic
from lbi_compile.distributed.placement import balanced
from tests import ranks
from tests.cases import call, project
from tests.distributed_models import (
    FORMS,
    bound,
    differences,
    form,
    gradients,
    held,
    model,
    spread_gradients,
)
from tests.models import ResidualMLP

QUICK = ("token-gru", "pooled-sum-scan", "pooled-last-scan", "zero")
WORLDS = (2, 3, 4)


def test_neighbouring_regions_are_shared_out_evenly():
    assert balanced([1] * 8, 4) == (2, 2, 2, 2)
    assert balanced([5, 1, 1, 1], 2) == (1, 3)
    assert sum(balanced([3, 1, 4, 1, 5, 9, 2], 3)) == 7
    assert balanced([0, 0, 0], 3) == (1, 1, 1)


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in FORMS])
def test_gradients_are_those_of_one_process(name: str):
    bounded, inputs, options = form(name)
    expected = gradients(bounded, inputs)
    for world in (3,) if name in QUICK[:3] else WORLDS:
        assert differences(expected, spread_gradients(bounded, inputs, world, options)) < 1e-12


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMS)
def test_gradients_on_every_number_of_ranks(name: str):
    bounded, inputs, options = form(name)
    expected = gradients(bounded, inputs)
    for world in (1, *WORLDS, 5):
        assert differences(expected, spread_gradients(bounded, inputs, world, options)) < 1e-12


def test_each_rank_holds_what_it_needs():
    bounded, _, _ = form("token-gru")

    def work(rank: int) -> tuple[set[str], tuple[int, ...]]:
        parallel = parallelize(bounded, ranks.mesh(2))
        return held(parallel), parallel.placement.counts

    (first, counts), (second, _) = ranks.run(2, work)
    everything = {name for name, _ in bounded.named_parameters(remove_duplicate=False)}
    assert counts == (2, 3)
    assert first | second == everything
    both = first & second
    elsewhere = ("blocks", "lbi.encoders", "lbi.decoders")
    assert [name for name in both if name.startswith(elsewhere)] == []
    assert {name.split(".")[1] for name in first - both if name.startswith("blocks")} == {"0", "1"}
    assert {name.split(".")[2] for name in first - both if name.startswith("lbi.decoders")} == {"1"}


def test_dropping_the_bounded_model_frees_what_others_hold():
    def work(rank: int) -> list[str]:
        model = nn.Sequential(nn.Linear(6, 6), *(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(4)))
        bounded = transform(model, torch.randn(3, 6), regions=4, r=4, interface="pooled")
        known = {name: weakref.ref(p) for name, p in bounded.named_parameters()}
        parallel = parallelize(bounded, ranks.mesh(2))
        del model, bounded
        gc.collect()
        parallel(torch.randn(3, 6)).sum().backward()
        kept = {name for name, reference in known.items() if reference() is not None}
        return sorted(kept ^ held(parallel))

    assert ranks.run(2, work) == [[], []]


def test_the_callers_model_is_left_alone():
    bounded, inputs, _ = form("token-gru")
    before = {name: (id(p), p.detach().clone()) for name, p in bounded.named_parameters()}

    def work(rank: int) -> bool:
        parallel = parallelize(bounded, ranks.mesh(2))
        call(parallel, inputs).sum().backward()
        now = dict(bounded.named_parameters())
        return now.keys() == before.keys() and all(
            id(now[name]) == known and torch.equal(now[name], value) for name, (known, value) in before.items()
        )

    assert ranks.run(2, work) == [True, True]


@pytest.mark.parametrize("name", ["token-gru", pytest.param("chunked-sum-scan", marks=pytest.mark.slow)])
def test_dropout_draws_the_same_on_any_number_of_ranks(name: str):
    kind, options, spread = FORMS[name]
    bounded, inputs = bound(kind, tuple(sorted({**options, "r": 8 if "chunked" in name else 4}.items())), 0.3)

    def work(rank: int, world: int) -> tuple[dict[str, Tensor], Tensor]:
        found = gradients(parallelize(bounded, ranks.mesh(world), **spread), inputs)
        return found, torch.get_rng_state()

    ((expected, state),) = ranks.run(1, work, 1)
    for world in (2, 3):
        found = ranks.run(world, work, world)
        assert all(torch.equal(other, state) for _, other in found)
        assert differences(expected, [one for one, _ in found]) < 1e-12
    other = ranks.run(1, lambda rank: gradients(parallelize(bounded, ranks.mesh(1), **spread), inputs, seed=8))
    assert not torch.equal(other[0]["loss"], expected["loss"])


@pytest.mark.slow
def test_evaluation_has_no_dropout_and_no_graph():
    kind, options, _ = FORMS["token-gru"]
    made, inputs = bound(kind, tuple(sorted({**options, "r": 4}.items())), 0.3)
    bounded = copy.deepcopy(made)

    def work(rank: int) -> Tensor:
        parallel = parallelize(bounded, ranks.mesh(2), example_inputs=inputs)
        assert parallel.training
        parallel.eval()
        with torch.no_grad():
            return parallel(inputs)

    found = ranks.run(2, work)
    bounded.eval()
    assert torch.equal(found[0], found[1])
    torch.testing.assert_close(found[0], bounded(inputs).detach(), rtol=0, atol=1e-14)


def test_two_copies_of_two_ranks_average_under_ddp():
    bounded, inputs, _ = form("token-gru")
    expected = gradients(copy.deepcopy(bounded), inputs)

    def work(rank: int) -> dict[str, Tensor]:
        mesh = ranks.mesh(2, dp=2)
        wrapped = DistributedDataParallel(parallelize(bounded, mesh), process_group=mesh.get_group("dp"))
        part = inputs.chunk(2)[mesh.get_local_rank("dp")]
        found = gradients(wrapped, part, lambda module, x: 2 * _part(module, x, mesh.get_local_rank("dp"), 2, inputs))
        return {name.removeprefix("module."): value for name, value in found.items() if name != "loss"}

    assert differences({n: v for n, v in expected.items() if n != "loss"}, ranks.run(4, work)) < 1e-12


def _part(module: nn.Module, x: Tensor, index: int, count: int, inputs: Tensor) -> Tensor:
    """The part of ``projected`` of the whole batch that belongs to a part of it."""
    out = call(module, x)
    whole = torch.zeros(inputs.shape[0], *out.shape[1:], dtype=out.dtype)
    rows = slice(index * inputs.shape[0] // count, (index + 1) * inputs.shape[0] // count)
    return project(torch.cat([whole[: rows.start], out, whole[rows.stop :]]))


@pytest.mark.slow
def test_two_copies_of_two_ranks_average_under_fsdp():
    bounded, inputs, _ = form("token-gru")
    expected = gradients(copy.deepcopy(bounded), inputs)

    def work(rank: int) -> dict[str, Tensor]:
        mesh = ranks.mesh(2, dp=2)
        parallel = parallelize(bounded, mesh)
        fully_shard(parallel, mesh=mesh["dp"])
        part = inputs.chunk(2)[mesh.get_local_rank("dp")]
        loss = 2 * _part(parallel, part, mesh.get_local_rank("dp"), 2, inputs)
        loss.backward()
        clip_grad_norm_(parallel, 1e9)
        return {name: p.grad.full_tensor() for name, p in parallel.named_parameters(remove_duplicate=False)}

    assert differences({n: v for n, v in expected.items() if n != "loss"}, ranks.run(4, work)) < 1e-12


def test_accumulation_and_hooks_see_whole_gradients():
    bounded, inputs, _ = form("token-gru")
    expected = gradients(copy.deepcopy(bounded), inputs)

    def work(rank: int) -> tuple[dict[str, Tensor], set[str]]:
        parallel = parallelize(bounded, ranks.mesh(2))
        parallel.zero_grad()
        seen = set()
        for name, p in parallel.named_parameters():
            p.register_hook(lambda grad, name=name: seen.add(name))
        for index in range(2):
            _part(parallel, inputs.chunk(2)[index], index, 2, inputs).backward()
        return {name: p.grad for name, p in parallel.named_parameters(remove_duplicate=False)}, seen

    found = ranks.run(2, work)
    assert differences({n: v for n, v in expected.items() if n != "loss"}, [one for one, _ in found]) < 1e-12
    assert all(len(seen) >= len({id(value) for value in one.values()}) for one, seen in found)


def test_clipping_has_the_norm_of_one_process():
    bounded, inputs, options = form("pooled-last-scan")
    alone = copy.deepcopy(bounded)
    gradients(alone, inputs)
    norm = nn.utils.clip_grad_norm_(alone.parameters(), 0.5)
    expected = {name: p.grad for name, p in alone.named_parameters()}

    def work(rank: int) -> tuple[Tensor, dict[str, Tensor]]:
        parallel = parallelize(bounded, ranks.mesh(3), **options)
        gradients(parallel, inputs)
        return clip_grad_norm_(parallel, 0.5), {name: p.grad for name, p in parallel.named_parameters()}

    found = ranks.run(3, work)
    assert norm > 0.5
    assert all(abs(float(one - norm)) < 1e-12 for one, _ in found)
    assert differences(expected, [grads for _, grads in found]) < 1e-12


@pytest.mark.parametrize("credit", ["sid", "hbll"])
def test_local_credit_over_ranks(credit: str):
    made, inputs = model("mlp")
    rules = {"sid": (SID(), SID(readout="shared", refresh=1)), "hbll": (HBLL(sweeps=2), HBLL(tied=True, sweeps=1))}
    target = torch.tensor([0, 2, 1, 1])

    def loss(module: Any, x: Tensor) -> Tensor:
        return module.local_loss(x, target=target)

    for rule in rules[credit]:
        bounded = transform(made, inputs, regions=5, r=6, credit=rule)
        expected = gradients(copy.deepcopy(bounded), inputs, loss)
        logits = bounded(inputs).detach()

        def work(rank: int, bounded: BoundedModule = bounded) -> tuple[dict[str, Tensor], Tensor]:
            parallel = parallelize(bounded, ranks.mesh(3))
            return gradients(parallel, inputs, loss), parallel(inputs)

        found = ranks.run(3, work)
        assert differences(expected, [one for one, _ in found]) < 1e-12
        assert all(float((out - logits).abs().max()) < 1e-13 for _, out in found)


def test_plans_that_differ_are_refused_on_every_rank():
    one, _, _ = form("token-gru")
    other, _, _ = form("token-linear-stem")

    def work(rank: int) -> str:
        with pytest.raises(PlanError) as caught:
            parallelize(other if rank == 1 else one, ranks.mesh(3))
        return caught.value.found

    (found,) = set(ranks.run(3, work))
    assert f"{one.plan.hash} on rank 0" in found
    assert f"{other.plan.hash} on rank 1" in found


class Recorded(nn.Module):
    """A residual MLP that also returns what a block in the middle gives."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = ResidualMLP(6, width=8, depth=4, classes=3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.inner.stem(x)
        for k, block in enumerate(self.inner.blocks):
            h = block(h)
            if k == 1:
                side = h.square().mean()
        return self.inner.head(h), side


def test_what_cannot_be_spread_is_refused():
    bounded, inputs, _ = form("pooled-sum-scan")
    features = torch.randn(3, 6)
    side = transform(Recorded(), features, regions=4, r=4, interface="pooled")
    checked = transform(ResidualMLP(6, width=8, depth=4, classes=3), features, regions=4, credit=SID(check=True))

    def work(rank: int) -> None:
        mesh = ranks.mesh(2)
        with pytest.raises(NotBuiltError):
            parallelize(copy.deepcopy(bounded), mesh)
        with pytest.raises(MeshError, match="with the dimensions model"):
            parallelize(bounded, init_device_mesh("cpu", (2,), mesh_dim_names=("model",)))
        for refused in (side, checked):
            with pytest.raises(DistributedError):
                parallelize(refused, mesh)
        with pytest.raises(OptionError):
            parallelize(bounded, mesh, engine="fast")
        parallel = parallelize(bounded, mesh)
        with pytest.raises(DistributedError):
            parallel.forward_regions(inputs)
        with pytest.raises(DistributedError):
            parallel.local_loss(inputs, target=inputs)
        with pytest.raises(ShapeNotCapturedError):
            parallel.eval()(inputs)
        parallel.train()
        with pytest.raises(DoubleBackwardError):
            torch.autograd.grad(call(parallel, inputs).sum(), list(parallel.parameters()), create_graph=True)

    ranks.run(2, work)


def test_more_ranks_than_regions_are_refused():
    bounded = transform(ResidualMLP(6, width=8, depth=2, classes=3), torch.randn(3, 6), regions=2, r=4)

    def work(rank: int) -> None:
        with pytest.raises(MeshError, match="3 ranks for 2 regions"):
            parallelize(bounded, ranks.mesh(3))

    ranks.run(3, work)


def test_bytes_are_those_of_the_closed_forms():
    K, B, D, r = 8, 8, 32, 16
    made = ResidualMLP(6, width=D, depth=K, classes=3)
    x = torch.randn(B, 6)
    bounded = transform(made, x, regions=K, r=r, interface="pooled", readout="sum")

    def work(rank: int) -> tuple[dict[tuple[str, str], int], dict[str, int]]:
        parallel = parallelize(bounded, ranks.mesh(K), engine="scan", reduce="canvas")
        with traffic() as counted, Calls() as seen:
            parallel(x).square().sum().backward()
        return counted.by_kind(), seen.bytes

    found = ranks.run(K, work)
    total: Counter[tuple[str, str]] = Counter()
    for kinds, _ in found:
        total.update(kinds)
    assert total["all_gather", "J"] == (K - 1) * r * r * 4 * B == 57_344
    assert total["all_gather", "seed"] == r * 4 * B
    assert total["all_gather", "b"] == (K - 2) * r * 4 * B
    assert total["all_gather", "padding"] == r * r * 4 * B + r * 4 * B  # no J on the last rank, no b on the first
    assert total["send", "latent"] == (K - 1) * r * 4 * B
    assert all(
        kinds["all_reduce", "readout"] == kinds["all_reduce", "canvas cotangent"] == B * D * 4 for kinds, _ in found
    )
    # a second count, of the operators that process groups run, knows nothing of labels
    for kinds, seen in found:
        for operation in ("all_gather", "all_reduce", "send"):
            assert seen.get(operation, 0) == sum(size for (of, _), size in kinds.items() if of == operation)


class Calls(TorchDispatchMode):
    """Counts the bytes that go into operators of process groups."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        for kind, mark in (("all_gather", "all_gather"), ("all_reduce", "all_reduce"), ("send", "c10d.send")):
            if mark in name:
                tensors = args[0] if isinstance(args[0], (list, tuple)) else [args[0]]
                self.bytes[kind] = self.bytes.get(kind, 0) + sum(t.nbytes for t in tensors)
        return func(*args, **(kwargs or {}))
