"""Jacobians within a budget: how they are cut up, and that gradients stay those of plain autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lbi_compile
from lbi_compile.backend import eager_backend
from lbi_compile.errors import EngineError, OptionError
from lbi_compile.passes.jacobian_budget import (
    JACOBIAN_BYTES,
    MOST_PARTS,
    Parts,
    Work,
    check_budget,
    parts,
    working_bytes,
)
from lbi_compile.passes.scan_backward import ScanRecord
from tests.joint_graphs import Graph
from tests.marked import Scans, Token, pooled_attention, pooled_mlp, step

EXACT = 1e-10
MIB = 2**20


def scanned(module: nn.Module, budget: int) -> tuple[Callable[..., Any], ScanRecord]:
    record = ScanRecord()
    backend = eager_backend(record, jacobian_bytes=budget)
    return torch.compile(module, backend=backend, dynamic=True, fullgraph=True), record


def test_what_fits_is_left_as_it_is():
    how = parts([Work(10, 30, True)] * 2, r=4, indices=5, budget=60)
    assert (how.together, how.indices, how.rows, how.over) == (True, 1, (4, 4), "")


def test_regions_one_after_another_before_indices_are_cut():
    how = parts([Work(10, 30, True)] * 2, r=4, indices=100, budget=100)
    assert (how.together, how.indices) == (True, 1)
    how = parts([Work(1000, 3000, True)] * 2, r=4, indices=100, budget=4000)
    assert (how.together, how.indices) == (False, 1)
    how = parts([Work(1000, 3000, True)] * 2, r=4, indices=100, budget=2000)
    assert (how.together, how.indices) == (False, 4)  # 20 bytes of 40 an index: two parts and a remainder


def test_rows_where_indices_stay_together():
    how = parts([Work(10, 800, False), Work(10, 100, False)], r=8, indices=5, budget=300)
    assert (how.together, how.indices, how.rows, how.over) == (False, 1, (2, 8), "")
    how = parts([Work(10, 800, False)], r=8, indices=5, budget=50)
    assert how.rows == (1,)
    assert how.over == "one row of a Jacobian takes 100 bytes to compute"
    how = parts([Work(1000, 800, False)], r=8, indices=5, budget=900)
    assert how.over == "the Jacobians alone take 2000 bytes"


def test_a_budget_of_too_many_parts_is_refused():
    with pytest.raises(EngineError, match="no more than 64 parts"):
        parts([Work(MIB, MIB, True)], r=4, indices=1000, budget=2000)


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "256 MiB"])
def test_a_budget_is_a_number_of_bytes(value: Any):
    with pytest.raises(OptionError, match="jacobian_bytes="):
        lbi_compile.transform(nn.Linear(4, 4), jacobian_bytes=value)


def test_no_regions_need_nothing():
    assert parts([], r=4, indices=5, budget=1) == Parts(True, 1, (), ())


def test_regions_run_together_up_to_the_very_budget():
    works = [Work(10, 30, True)] * 2  # 40 bytes of Jacobians, counted twice, and 60 on the way to them
    assert parts(works, r=4, indices=5, budget=60).bounds == ((40, 60), (60, 60))
    assert not parts(works, r=4, indices=5, budget=59).together
    works = [Work(40, 40, True)] * 2  # 160 bytes of Jacobians, and 80 on the way
    assert parts(works, r=4, indices=5, budget=160).together
    assert not parts(works, r=4, indices=5, budget=159).together


def test_parts_are_as_few_as_hold_all_indices():
    works = [Work(1000, 3000, True)] * 2  # 40 bytes an index
    assert parts(works, r=4, indices=100, budget=4000).bounds == ((100, 100),)
    how = parts(works, r=4, indices=100, budget=3999)  # 99 indices a part
    assert (how.indices, how.bounds) == (2, ((100, 2 * 99 - 1),))
    assert parts(works, r=4, indices=100, budget=2000).bounds == ((100, 4 * 50 - 9),)
    # what lives beside the first of three Jacobians are the other two
    how = parts([Work(100, 4000, True), *[Work(500, 600, True)] * 2], r=4, indices=100, budget=4999)
    assert (how.together, how.indices) == (False, 2)
    how = parts([Work(100, 4000, True), *[Work(500, 600, True)] * 2], r=4, indices=100, budget=5000)
    assert (how.together, how.indices) == (False, 1)


def test_a_byte_more_than_a_whole_number_for_each_index_counts_for_every_index():
    works = [Work(1025, 3000, True), Work(1024, 3000, True)]  # 4098 bytes at 100 indices: 41 for each
    assert parts(works, r=4, indices=100, budget=4099).indices == 2
    assert parts(works, r=4, indices=100, budget=4100).indices == 1


def test_as_many_parts_as_are_allowed():
    most = MOST_PARTS * 1000 - (MOST_PARTS - 1) ** 2
    for indices, fits in ((most, True), (most + 1, False)):
        works = [Work(10 * indices, 10 * indices, True)]  # 20 bytes an index, 1000 indices a part
        if fits:
            assert parts(works, r=4, indices=indices, budget=20_000).indices == MOST_PARTS
        else:
            with pytest.raises(EngineError, match="no more than 64 parts"):
                parts(works, r=4, indices=indices, budget=20_000)


def test_one_region_that_cannot_be_cut_keeps_all_whole():
    how = parts([Work(10, 800, True), Work(10, 100, False)], r=8, indices=5, budget=300)
    assert (how.indices, how.rows) == (1, (2, 8))


def test_rows_are_halved_until_they_fit():
    def rows(budget: int) -> tuple[int, ...]:
        return parts([Work(1, 500, False)], r=5, indices=5, budget=budget).rows

    assert [rows(budget) for budget in (500, 499, 300, 299, 200, 199)] == [(5,), (3,), (3,), (2,), (2,), (1,)]
    how = parts([Work(1, 500, False), Work(1, 100, False)], r=5, indices=5, budget=300)
    assert how.bounds == ((500, 500), (100, 300))
    how = parts([Work(1, 500, False), Work(1, 100, False)], r=5, indices=5, budget=100)
    assert (how.rows, how.bounds, how.over) == ((1, 5), ((100, 100),), "")


def test_jacobians_alone_over_the_budget_are_told_first():
    assert parts([Work(50, 800, False)], r=8, indices=5, budget=100).over == ""
    assert parts([Work(50, 800, False)], r=8, indices=5, budget=99).over == "the Jacobians alone take 100 bytes"


def test_a_byte_is_a_budget():
    assert check_budget(1) == 1


def test_what_lives_at_one_time_on_the_way_to_a_jacobian():
    g = Graph()
    lam, saved = g.input("lam", 3, 4), g.input("saved", 3, 4)
    constant = g.call(torch.ops.aten.exp.default, saved)  # not per cotangent
    a = g.call(torch.ops.aten.mul.Tensor, lam, constant)
    b = g.call(torch.ops.aten.view.default, a, [12])  # of a
    c = g.call(torch.ops.aten.neg.default, b)
    d = g.call(torch.ops.aten.neg.default, c)  # a is dead
    wide = g.call(torch.ops.aten.cat.default, [d, d, d])  # c is dead
    value = 12 * 8
    r = 5
    assert working_bytes(g.done(wide), r) == (1 + 3) * value * r


@pytest.mark.parametrize("larger", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_parts_of_the_indices_are_exact_at_sizes_that_change(larger: bool):
    module, scans = Token("gru").double(), Scans()
    compiled, record = scanned(module, 30_000)
    torch._dynamo.utils.counters.clear()
    for b, t in ((3, 14), (5, 8), (2, 19)):
        x = torch.randn(b, t, 6, dtype=torch.double)
        expected = step(module, module, x)
        scans.jacobians.clear()
        found = step(compiled, module, x, watch=scans)
        assert found.error(expected) <= EXACT
        assert record.parts == (2,)
        assert [J.shape[1] for J in scans.jacobians] == [b * t // 2, b * t - b * t // 2]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    if larger:  # than two parts can hold: a graph of more parts
        x = torch.randn(6, 20, 6, dtype=torch.double)
        assert step(compiled, module, x).error(step(module, module, x)) <= EXACT
        assert record.parts[0] > 2


@pytest.mark.slow
def test_jacobians_of_linear_cells_need_no_parts():
    module = Token("linear").double()
    compiled, record = scanned(module, 1000)
    x = torch.randn(3, 14, 6, dtype=torch.double)
    assert step(compiled, module, x).error(step(module, module, x)) <= EXACT
    assert (record.parts, record.rows, record.over) == ((1,), (4,), ())


@pytest.mark.slow
def test_samples_are_taken_apart_too():
    module = pooled_mlp(3).double()
    compiled, record = scanned(module, 30_000)
    x = torch.randn(31, 6, dtype=torch.double)
    assert step(compiled, module, x).error(step(module, module, x)) <= EXACT
    assert record.parts[0] > 1


def test_rows_of_a_path_that_mixes_positions_are_exact_and_told():
    module = pooled_attention(2).double()
    compiled, record = scanned(module, 20_000)
    x = torch.randn(3, 7, 6, dtype=torch.double)
    assert step(compiled, module, x).error(step(module, module, x)) <= EXACT
    assert record.parts == (1,)
    assert record.rows[0] < 4


class Live(TorchDispatchMode):
    """Bytes that results of operators hold, after every operator; ``scans`` are the places of ``lbi::suffix_scan``."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.bytes: list[int] = []
        self.scans: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                storage = value.untyped_storage()
                self.live[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.live = {key: pair for key, pair in self.live.items() if not pair[0].expired()}
        if func is torch.ops.lbi.suffix_scan.default:
            self.scans.append(len(self.bytes))
        self.bytes.append(sum(size for _, size in self.live.values()))
        return result


@pytest.mark.slow
@pytest.mark.parametrize(("b", "t", "budget"), [(4, 64, MIB), (16, 4096, JACOBIAN_BYTES)])
def test_jacobians_of_all_parts_never_live_together(b: int, t: int, budget: int):
    module, K, r = Token("gru", K=8, r=16).double(), 8, 16
    compiled, record = scanned(module, budget)
    x = torch.randn(b, t, 6, dtype=torch.double)
    live = Live()
    found = step(compiled, module, x, watch=live)
    assert found.error(step(module, module, x)) <= EXACT
    assert len(live.scans) == record.parts[0] > 3
    # from the first part to the last; what grows besides are the adjoints, of which all are kept
    window = live.bytes[live.scans[0] : live.scans[-1]]
    adjoints, jacobians = 8 * (K - 1) * b * t * r, 8 * (K - 2) * b * t * r * r
    most = max(window) - min(window)
    print(f"{b * t} indices in {record.parts[0]} parts: {most / MIB:.1f} MiB of {jacobians / MIB:.1f} MiB Jacobians")
    assert most <= budget + adjoints
    assert jacobians > 2 * most
