"""The conditions that conftest.py promises to every test."""

from __future__ import annotations

import pytest
import torch


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.empty(3, 2),
        lambda: torch.empty_like(torch.ones(5)),
        lambda: torch.ones(1).new_empty(4),
        lambda: torch.empty_strided((2, 3), (3, 1), dtype=torch.float64),
        lambda: torch.empty(7, dtype=torch.bfloat16),
    ],
)
def test_uninitialised_memory_is_nan(make):
    assert make().isnan().all()


def test_uninitialised_integers_are_out_of_any_range():
    assert (torch.empty(3, dtype=torch.int64) == torch.iinfo(torch.int64).max).all()


def test_poison_reaches_inside_compiled_code():
    got = torch.compile(lambda x: torch.empty_like(x) * 1.0, backend="aot_eager")(torch.ones(3))
    assert got.isnan().all()


def test_seed():
    assert torch.equal(torch.rand(4), torch.rand(4, generator=torch.Generator().manual_seed(0)))


def test_one_thread():
    assert torch.get_num_threads() == 1
