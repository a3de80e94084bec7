"""Where and with what a measurement was made."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import shlex
import tempfile
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import lbi_compile


def command(arguments: Sequence[str]) -> str:
    """What was typed; absolute paths by their last part, as folders of one machine tell nobody else anything.

    Example:
        >>> command(["bench", "scan", "--json", "/home/me/out.json", "--plot=/home/me/out.png"])
        'lbi-compile bench scan --json out.json --plot=out.png'
    """
    return shlex.join(["lbi-compile", *(_FOLDER.sub("", argument) for argument in arguments)])


# From the beginning, or from behind an option's sign of equality, to the last slash of an absolute path.
_FOLDER = re.compile(r"(?:^|(?<==))/(?:.*/)?")


def machine(device: torch.device) -> dict[str, Any]:
    """Processor, cores this process may use, memory in bytes, and GPU where the run is on one."""
    found: dict[str, Any] = {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None,
        "system": platform.platform(),
        "gpu": None,
    }
    if device.type == "cuda":
        about = torch.cuda.get_device_properties(device)
        found["gpu"] = {
            "name": about.name,
            "memory": about.total_memory,
            "multiprocessors": about.multi_processor_count,
            "l2": about.L2_cache_size,
        }
    return found


def versions() -> dict[str, str | None]:
    """Versions of what the speed depends on; ``None`` for what is not installed."""
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = None
    return {
        "lbi_compile": lbi_compile.__version__,
        "torch": torch.__version__,
        "triton": triton,
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
    }


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


@contextlib.contextmanager
def threads(number: int) -> Iterator[None]:
    """Torch's threads within one operator, inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def empty_compile_cache() -> Iterator[None]:
    """Inductor finds nothing compiled before: its caches are in a folder that goes away with the block."""
    names = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
    before = {name: os.environ.get(name) for name in names}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        for name in names:
            os.environ[name] = str(Path(folder) / name.partition("_")[0].lower())
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value
