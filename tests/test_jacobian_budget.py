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
from lbi_compile.passes.jacobian_budget import JACOBIAN_BYTES, Work, parts
from lbi_compile.passes.scan_backward import ScanRecord
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


def test_parts_of_the_indices_are_exact_at_sizes_that_change():
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
    # larger inputs than two parts can hold: a graph of more parts
    x = torch.randn(6, 20, 6, dtype=torch.double)
    assert step(compiled, module, x).error(step(module, module, x)) <= EXACT
    assert record.parts[0] > 2


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
