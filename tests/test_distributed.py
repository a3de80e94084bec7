"""A bounded model spread over ranks computes what it computes in one process."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lbi_compile import BoundedModule, transform
from lbi_compile.distributed import parallelize
from lbi_compile.distributed.placement import balanced
from tests import ranks
from tests.cases import call
from tests.distributed_models import (
    FORMS,
    bound,
    differences,
    form,
    gradients,
    held,
    spread_gradients,
    steps,
)

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


def language_loss(module: nn.Module, batch: Tensor) -> Tensor:
    """Next-token cross entropy."""
    return F.cross_entropy(call(module, batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())


def classes_loss(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Cross entropy of classes."""
    return F.cross_entropy(call(module, batch[0]), batch[1])


def _in_float32(name: str) -> tuple[BoundedModule, Any, Any, dict[str, Any]]:
    kind, options, spread = FORMS[name]
    made, inputs = bound(kind, tuple(sorted({**options, "r": 8 if "chunked" in name else 4}.items())))
    model = copy.deepcopy(made.source).float()
    example = inputs.float() if isinstance(inputs, Tensor) and inputs.is_floating_point() else inputs
    bounded = transform(model, example, regions=5, **{**options, "r": 8 if "chunked" in name else 4})
    draw = torch.Generator().manual_seed(5)
    if kind == "mlp":
        batches = [(torch.randn(8, 6, generator=draw), torch.randint(0, 3, (8,), generator=draw)) for _ in range(50)]
        return bounded, batches, classes_loss, spread
    tokens = [torch.randint(0, 11, (4, 10), generator=draw) for _ in range(50)]
    if kind == "gpt2":
        return bounded, [{"input_ids": batch} for batch in tokens], _gpt2_loss, spread
    return bounded, tokens, language_loss, spread


def _gpt2_loss(module: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    ids = batch["input_ids"]
    return F.cross_entropy(call(module, {"input_ids": ids[:, :-1]}).flatten(0, 1), ids[:, 1:].flatten())


@pytest.mark.parametrize("name", [n if n in QUICK[:2] else pytest.param(n, marks=pytest.mark.slow) for n in FORMS])
def test_fifty_steps_in_float32_end_where_one_process_ends(name: str):
    bounded, batches, loss, options = _in_float32(name)
    (expected,) = ranks.run(1, lambda rank: steps(bounded, batches, loss))
    worlds = (2,) if name in QUICK else WORLDS
    for world in worlds:
        found = ranks.run(
            world, lambda rank, world=world: steps(parallelize(bounded, ranks.mesh(world), **options), batches, loss)
        )
        assert set(expected) == set().union(*found)
        for one in found:
            for name_, value in one.items():
                assert float((value - expected[name_]).abs().max()) < 1e-6, name_
