"""What every test runs under: one thread, fixed seeds, NaN in uninitialised memory, and a clean Dynamo."""

from __future__ import annotations

import gc
import os
import shutil
import sys
from collections.abc import Iterator

# cuBLAS refuses to run in deterministic mode (see `poison`) without it, and reads it once, when CUDA starts.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest
import torch
import torch.utils.deterministic

from tests.browser import Browser

torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """Collect garbage more rarely, and never walk through what imports have made: a seventh of all time went there."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


@pytest.fixture(autouse=True)
def poison():
    """Fill what ``torch.empty`` and its kin return with NaN (the largest integer for integers).

    Deterministic mode is the one switch that reaches ``empty`` inside ATen as well, not just calls from Python.
    """
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def fresh():
    """Seed the generator, and drop compiled code and its recompile counts where a test before used Dynamo."""
    torch.manual_seed(0)
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[Browser]:
    """Chromium, where there is one."""
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.skip("needs Chromium")
    started = Browser(program, tmp_path_factory.mktemp("profile"))
    try:
        started.start()
        yield started
    finally:
        started.close()
