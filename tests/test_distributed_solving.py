"""``forward="parallel"`` on ranks: the latents, and all that follows, are those of one process."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lbi_compile import BoundedModule, DistributedError, transform
from lbi_compile.distributed import parallelize, traffic
from tests import ranks
from tests.cases import call
from tests.distributed_models import REGIONS, differences, gradients, model

FORMS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "pooled-sum-scan": ("mlp", {"interface": "pooled", "readout": "sum"}, {"engine": "scan"}),
    "pooled-last-chain": ("mlp", {"interface": "pooled", "readout": "last"}, {"engine": "chain"}),
    "pooled-last-scan-head": ("mlp", {"interface": "pooled", "readout": "last"}, {"engine": "scan", "head": "last"}),
    "pooled-jacobi": ("mlp", {"interface": "pooled", "readout": "sum", "forward": "jacobi"}, {"engine": "scan"}),
    "pooled-quasi": ("mlp", {"interface": "pooled", "readout": "sum", "forward": "quasi-newton"}, {"engine": "chain"}),
    "chunked-sum-scan": ("transformer", {"interface": "chunked", "readout": "sum", "r": 8}, {"engine": "scan"}),
    "chunked-last-chain": ("transformer", {"interface": "chunked", "readout": "last", "r": 8}, {"engine": "chain"}),
}
QUICK = ("pooled-sum-scan",)


def bounded_form(name: str, *, dropout: float = 0.0, **others: Any) -> tuple[BoundedModule, Any, dict[str, Any]]:
    """A bounded model with a parallel forward, inputs, and how to spread it."""
    kind, options, spread = FORMS[name]
    made, inputs = model(kind, dropout=dropout)
    given = {"r": 4, "forward": "parallel", "backward": "chain", **options, **others}
    return transform(copy.deepcopy(made), inputs, regions=REGIONS, **given), inputs, spread


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in FORMS])
def test_latents_and_gradients_are_those_of_one_process(name: str):
    bounded, inputs, options = bounded_form(name)
    other = inputs + 1 if inputs.is_floating_point() else (inputs + 1) % 11
    alone, iterations = [], []
    for batch in (inputs, other, other):  # a constant guess, one from what was seen, and the very same inputs
        alone.append(gradients(bounded, batch))
        iterations.append(bounded.solve.iterations)
    assert bounded.solve.fallback is None
    with bounded.with_forward("sequential"):
        assert differences(gradients(bounded, other), alone[1:2]) < 1e-7  # what the tolerance leaves

    def work(rank: int, world: int) -> tuple[list[dict[str, Tensor]], list[int], list[Tensor]]:
        parallel = parallelize(fresh, ranks.mesh(world), **options)
        found, counts = [], []
        for batch in (inputs, other, other):
            found.append(gradients(parallel, batch))
            counts.append(parallel.latents.record.iterations)
        return found, counts, []

    fresh, _, _ = bounded_form(name)
    call(fresh, inputs)
    for world in (2, 3):
        found = ranks.run(world, work, world)
        for number, expected in enumerate(alone):
            assert [counts[number] for _, counts, _ in found] == [iterations[number]] * world
            assert differences(expected, [grads[number] for grads, _, _ in found]) < 1e-11


@pytest.mark.parametrize("world", [2, 3])
def test_bytes_of_an_iteration(world: int):
    bounded, inputs, options = bounded_form("pooled-sum-scan")
    call(bounded, inputs)

    def work(rank: int) -> tuple[dict[tuple[str, str], int], int]:
        parallel = parallelize(bounded, ranks.mesh(world), **options)
        with traffic() as counted, torch.no_grad():
            call(parallel, inputs)
        return counted.by_kind(), parallel.latents.record.iterations

    found = ranks.run(world, work)
    iterations, B, R, K, e = found[0][1], len(inputs), 4, REGIONS, 8
    # all but the last region say something: of five regions 2 + 2 on two ranks, 1 + 2 + 1 on three
    q = 2
    whole = {kind: sum(kinds.get(("all_gather", kind), 0) for kinds, _ in found) for kind in ("latent", "J", "padding")}
    assert iterations > 1
    assert whole["latent"] == iterations * (K - 1) * B * R * e
    assert whole["J"] == iterations * (K - 2) * B * R * R * e
    assert sum(whole.values()) == iterations * world * q * B * (R + R * R) * e
    assert found[0][0]["broadcast", "latent"] == B * R * e
    assert not any(operation in ("send", "receive") for kinds, _ in found for operation, _ in kinds)


@pytest.mark.slow
def test_dropout_is_that_of_the_sequential_forward_on_ranks():
    bounded, inputs, options = bounded_form("pooled-sum-scan", dropout=0.3)
    plain, _, _ = bounded_form("pooled-sum-scan", dropout=0.3, forward="sequential")
    call(bounded, inputs)
    call(plain, inputs)

    def work(rank: int, made: BoundedModule, world: int) -> tuple[dict[str, Tensor], Tensor]:
        return gradients(parallelize(made, ranks.mesh(world), **options), inputs), torch.get_rng_state()

    ((expected, state),) = ranks.run(1, work, plain, 1)
    for world in (1, 2, 3):
        found = ranks.run(world, work, bounded, world)
        assert all(torch.equal(other, state) for _, other in found)
        assert differences(expected, [one for one, _ in found]) < 1e-7


def test_no_solution_in_time_runs_one_after_another():
    bounded, inputs, options = bounded_form("pooled-sum-scan", max_iters=1, tol=1e-12)
    expected = gradients(bounded, inputs)

    def work(rank: int) -> tuple[dict[str, Tensor], str | None]:
        parallel = parallelize(bounded, ranks.mesh(2), **options)
        return gradients(parallel, inputs), parallel.latents.record.fallback

    found = ranks.run(2, work)
    assert all("after 1 iterations" in (fallback or "") for _, fallback in found)
    assert differences(expected, [one for one, _ in found]) < 1e-12


def test_other_interfaces_are_refused():
    bounded = transform(
        nn.Sequential(nn.Linear(6, 6), *(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(4))),
        torch.randn(3, 6), regions=4, interface="identity", forward="parallel",
    )  # fmt: skip
    bounded(torch.randn(3, 6))

    def work(rank: int) -> None:
        with pytest.raises(DistributedError, match="forward='parallel' with the identity interface"):
            parallelize(bounded, ranks.mesh(2))

    ranks.run(2, work)
