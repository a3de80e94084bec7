"""Which form of a scan runs and with which tiles, at the sizes where the answer changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lbi_compile.kernels.forms import Form, choose

F32, F64 = torch.float32, torch.float64


def on_gpu(K: int, N: int, R: int, dtype: torch.dtype = F32, **options: Any) -> tuple[str, int]:
    return tuple(choose(K, N, R, dtype=dtype, device="cuda", **options))  # type: ignore[return-value]


def test_numpy_walks_small_steps_on_a_cpu():
    def on_cpu(N: int, R: int, vectors: int = 1) -> str:
        return choose(7, N, R, dtype=F32, device="cpu", vectors=vectors).name

    assert [on_cpu(64, 16), on_cpu(65, 16), on_cpu(1, 128), on_cpu(1, 129)] == ["numpy", "torch", "numpy", "torch"]
    assert [on_cpu(32, 16, 2), on_cpu(32, 16, 3)] == ["numpy", "torch"]
    assert on_cpu(0, 16) == "numpy"


@pytest.mark.parametrize("device", ["mps", "xpu", "meta"])
def test_other_devices_run_the_oracle(device: str):
    assert choose(4096, 1, 16, dtype=F32, device=device) == Form("torch", 0)


# By R, N and dtype the K from which on a form is chosen.
FROM: list[tuple[int, int, torch.dtype, list[tuple[int, str, int]]]] = [
    (1, 1, F32, [(140, "vector", 0), (141, "chunked", 16), (528, "chunked", 16), (529, "chunked", 32)]),
    (7, 1, F32, [(2080, "chunked", 32), (2081, "chunked", 64), (8256, "chunked", 64), (8257, "chunked", 128)]),
    (16, 1, F32, [(164, "vector", 0), (165, "chunked", 16), (656, "chunked", 16), (657, "chunked", 32)]),
    (16, 1, F64, [(228, "vector", 0), (229, "chunked", 16), (1040, "chunked", 16), (1041, "chunked", 32)]),
    (16, 500, F32, [(4096, "vector", 0), (19999, "vector", 0)]),
    (32, 1, F32, [(228, "vector", 0), (229, "chunked", 16), (3745, "chunked", 64), (10177, "chunked", 128)]),
    (33, 1, F32, [(312, "vector", 0), (313, "chunked", 16), (16512, "chunked", 128), (16513, "chunked", 256)]),
    (64, 1, F32, [(312, "vector", 0), (313, "chunked", 16), (752, "chunked", 16), (753, "chunked", 32)]),
    (64, 1, F64, [(852, "vector", 0), (853, "chunked", 32), (1792, "chunked", 32), (1793, "chunked", 64)]),
    (2, 40, F32, [(140, "vector", 0), (141, "chunked", 16), (5569, "chunked", 128), (16513, "chunked", 256)]),
]


@pytest.mark.parametrize(("R", "N", "dtype", "answers"), FROM)
def test_long_scans_of_few_indices_are_cut_into_chunks(
    R: int, N: int, dtype: torch.dtype, answers: list[tuple[int, str, int]]
):
    assert [(K, *on_gpu(K, N, R, dtype)) for K, _, _ in answers] == answers


def test_what_has_no_chunked_form():
    assert on_gpu(4096, 1, 64)[0] == "chunked"
    assert on_gpu(4096, 1, 65) == ("vector", 0)
    assert on_gpu(4096, 1, 16, vectors=2) == ("vector", 0)
    assert on_gpu(4096, 0, 16) == ("vector", 0)


def test_a_small_device_is_full_sooner():
    assert on_gpu(4096, 40, 16) == ("chunked", 64)
    assert on_gpu(4096, 40, 16, processors=8) == ("vector", 0)
    assert [on_gpu(K, 8, 1, processors=4) for K in (152, 153)] == [("vector", 0), ("chunked", 16)]
    assert [on_gpu(K, 8, 8, processors=4) for K in (284, 285)] == [("vector", 0), ("chunked", 32)]


# -- tiles


@pytest.mark.parametrize(
    ("N", "R", "dtype", "expected"),
    [
        (1, 1, F32, (1, 1, 1)),
        (5, 4, F32, (4, 8, 1)),
        (100, 4, F32, (4, 32, 1)),
        (100, 8, F32, (8, 32, 4)),
        (100, 8, F64, (8, 16, 4)),
        (8192, 16, F32, (16, 8, 4)),
        (8192, 16, F64, (16, 4, 4)),
        (8192, 32, F32, (32, 2, 4)),
        (8192, 33, F32, (64, 1, 8)),
        (8192, 64, F64, (64, 1, 16)),
        (8192, 128, F32, (128, 1, 16)),
    ],
)
def test_tiles_of_single_vectors(N: int, R: int, dtype: torch.dtype, expected: tuple[int, int, int]):
    form = pytest.importorskip("lbi_compile.kernels.vector_form", exc_type=ImportError)
    assert form.launch_shape(N, R, dtype) == expected


@pytest.mark.parametrize(
    ("S", "R", "dtype", "expected"),
    [
        (1, 4, F32, (4, 1, 1)),
        (3, 4, F32, (4, 4, 1)),
        (16, 16, F32, (16, 8, 4)),
        (16, 16, F64, (16, 8, 8)),
        (16, 32, F32, (32, 8, 16)),
        (16, 32, F64, (32, 4, 16)),
        (2, 64, F32, (64, 2, 16)),
        (16, 64, F64, (64, 4, 16)),
    ],
)
def test_tiles_of_rows(S: int, R: int, dtype: torch.dtype, expected: tuple[int, int, int]):
    form = pytest.importorskip("lbi_compile.kernels.rows_form", exc_type=ImportError)
    assert form.rows_shape(S, R, dtype) == expected


def test_warps_of_the_walk_over_chunks():
    form = pytest.importorskip("lbi_compile.kernels.chunked_form", exc_type=ImportError)
    found = [(form.ends_warps(R, F32), form.ends_warps(R, F64)) for R in (1, 16, 17, 32, 64)]
    assert found == [(1, 1), (1, 1), (2, 4), (2, 4), (8, 16)]


def test_powers_of_two_and_orders_of_entries():
    form = pytest.importorskip("lbi_compile.kernels.vector_form", exc_type=ImportError)
    assert [form.power_of_two(n) for n in (1, 2, 3, 4, 5, 8, 9)] == [1, 2, 4, 4, 8, 8, 16]
    J = torch.ones(2, 3, 4, 4)
    assert [form.order(one) for one in (J, J.mT, J[..., ::2, ::2], J[..., :2])] == ["row", "column", "any", "any"]
