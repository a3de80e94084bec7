"""Joining the processes that ``torchrun`` started."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore  # pyright: ignore[reportPrivateImportUsage]  documented so

from ..errors import MeshError


def start(backend: str | None = None, *, timeout: float = 600.0) -> None:
    """Make the default process group of the processes that ``torchrun`` started.

    As ``torch.distributed.init_process_group`` does it, but each attempt of ``torchrun --max-restarts`` has names of
    its own in the store: torch 2.13 keeps one store over all attempts, and Gloo then finds addresses of processes that
    are gone.

    Args:
        backend: By default NCCL where there are GPUs, else Gloo.
        timeout: Seconds an exchange may take; a rank that hangs is noticed after that time.

    Raises:
        MeshError: The process was not started by ``torchrun``.

    Example:
        >>> lbi_compile.distributed.start(timeout=60)
    """
    missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise MeshError(
            f"a process without {', '.join(missing)} in its environment",
            expected="a process that torchrun started",
            do="run it as torchrun --nproc-per-node 2 script.py, or call init_process_group yourself",
        )
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    limit = timedelta(seconds=timeout)
    by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        world,
        is_master=rank == 0 and not by_agent,
        timeout=limit,
        multi_tenant=True,
    )
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    chosen = backend or ("nccl" if torch.cuda.is_available() else "gloo")
    named = PrefixStore(f"attempt {attempt}", store)
    dist.init_process_group(chosen, store=named, rank=rank, world_size=world, timeout=limit)
