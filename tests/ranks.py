"""Runs a function on several ranks: processes forked from the test, with Gloo, one thread each."""

from __future__ import annotations

import os
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh


def run(world: int, work: Callable[..., Any], *args: Any, timeout: float = 60.0) -> list[Any]:
    """What ``work(rank, *args)`` returns on every rank.

    Ranks are forked: what the test has built they have too, without building it again.
    """
    with tempfile.TemporaryDirectory() as folder:
        codes = _start(world, Path(folder), work, args, timeout, ())
        failures = [path.read_text() for path in sorted(Path(folder).glob("*.failed"))]
        assert not failures, "\n".join(failures)
        assert codes == [0] * world
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(world)]


def start(world: int, work: Callable[..., Any], *args: Any, timeout: float, stop: Sequence[int] = ()) -> list[int]:
    """Run ``work(rank, *args)`` where ranks may fail, and give their exit codes.

    Args:
        world: How many ranks.
        work: What they do.
        args: For ``work``.
        timeout: Of the process group, in seconds.
        stop: Ranks that are killed once all others have ended.
    """
    with tempfile.TemporaryDirectory() as folder:
        return _start(world, Path(folder), work, args, timeout, stop)


def _start(
    world: int, folder: Path, work: Callable[..., Any], args: tuple[Any, ...], timeout: float, stop: Sequence[int]
) -> list[int]:
    context = processes.get_context("fork")
    started = [context.Process(target=_rank, args=(rank, world, folder, timeout, work, args)) for rank in range(world)]
    for process in started:
        process.start()
    try:
        ends = time.monotonic() + 4 * timeout + 60
        for rank, process in enumerate(started):
            if rank not in stop:
                process.join(max(0.0, ends - time.monotonic()))
                assert not process.is_alive(), f"rank {rank} did not end"
    finally:
        for process in started:
            if process.is_alive():
                process.kill()
            process.join()
    return [process.exitcode for process in started]


def _rank(rank: int, world: int, folder: Path, timeout: float, work: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    try:
        store = dist.FileStore(str(folder / "store"), world)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=timeout))
        torch.save(work(rank, *args), folder / f"{rank}.pt")
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        (folder / f"{rank}.failed").write_text(f"rank {rank}:\n{traceback.format_exc()}")
        os._exit(1)
    os._exit(0)


def mesh(region: int, dp: int | None = None) -> DeviceMesh:
    """A mesh of CPUs with a region dimension and, where asked for, one of copies before it."""
    if dp is None:
        return init_device_mesh("cpu", (region,), mesh_dim_names=("region",))
    return init_device_mesh("cpu", (dp, region), mesh_dim_names=("dp", "region"))
