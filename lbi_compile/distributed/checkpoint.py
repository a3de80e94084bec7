"""Checkpoints of region-parallel models under the names of the bounded model, to be loaded on any number of ranks.

A checkpoint is a folder ``step-00000012`` that torch.distributed.checkpoint wrote, and a record ``complete.json`` with
the step, the plan's hash, the state of the random generators, what the caller keeps beside it, and the sizes of all
files. It is written under another name and renamed as its last step: what was cut off half way has the other name.
"""

from __future__ import annotations

import base64
import json
import os
import random
import re
import shutil
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.optim import Optimizer

from ..bounded import BoundedModule
from ..errors import CheckpointError
from .module import RegionParallel
from .plain_data import PlainPlanner, read_record, refuse_code
from .ranks import Ranks

RECORD = "complete.json"
PARTIAL = ".partial"
_NAME = re.compile(r"step-(\d{8,})")
_OPTIONS = StateDictOptions(flatten_optimizer_state_dict=True)


@dataclass(frozen=True, slots=True)
class Restored:
    """What a checkpoint said beside parameters and optimizer.

    Attributes:
        step: How many steps had been taken.
        extra: What ``save`` was given, for example the position in the data.
        path: The checkpoint.
    """

    step: int
    extra: dict[str, Any]
    path: Path


def save(
    folder: str | os.PathLike[str],
    module: nn.Module,
    optimizer: Optimizer | None = None,
    *,
    step: int,
    extra: dict[str, Any] | None = None,
    keep: int | None = None,
) -> Path:
    """Write a checkpoint; every rank calls it.

    Args:
        folder: Where checkpoints are, on a disk that all ranks see.
        module: What ``parallelize`` returned, a wrapper around it, or the bounded model itself in one process.
        optimizer: Its optimizer.
        step: How many steps have been taken.
        extra: Whatever else a resumed run has to know, as JSON has it: the position in the data, a scheduler's state.
        keep: Delete all but so many of the newest checkpoints.

    Returns:
        The checkpoint's folder.

    Raises:
        CheckpointError: There is one of this step already.

    Example:
        >>> lbi_compile.distributed.save("run", parallel, optimizer, step=step, extra={"position": position})
    """
    folder = Path(folder)
    path = folder / f"step-{step:08d}"
    partial = path.with_name(path.name + PARTIAL)
    _together(lambda: _make_room(path, partial))
    model_state, optimizer_state = _state(module, optimizer)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process is as good
        state_dict_saver.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=partial)
    draws = _gathered((_copy_of(module), _random_state()))
    record = {
        "step": step,
        "plan": _plan_hash(module),
        "extra": extra or {},
        "random": {str(copy): state for copy, state in reversed(draws)},
    }
    _together(lambda: _finish(path, partial, record, keep))
    return path


def load(
    folder: str | os.PathLike[str], module: nn.Module, optimizer: Optimizer | None = None, *, step: int | None = None
) -> Restored | None:
    """Go on from a checkpoint; every rank calls it, and there may be other ranks than when it was written.

    Parameters, buffers, the optimizer's state and the random generators are as they were. Only what this rank holds is
    read, and only plain data: a checkpoint with code in it is refused and none of the code is run.

    Args:
        folder: Where checkpoints are.
        module: As for ``save``. Parameters on the meta device get memory first; make the optimizer after that, and load
            once more with it.
        optimizer: Its optimizer.
        step: Which checkpoint; by default the newest whole one.

    Returns:
        What it said, or ``None`` where there is no whole checkpoint and no step was asked for.

    Raises:
        CheckpointError: The checkpoint that was asked for is missing or not whole, is of another plan, or holds more
            than data.

    Example:
        >>> restored = lbi_compile.distributed.load("run", parallel, optimizer)
        >>> start = restored.step if restored else 0
    """
    path = _together(lambda: _find(Path(folder), step))
    if path is None:
        return None
    record = read_record(path / RECORD)
    own = _plan_hash(module)
    if own is not None and record["plan"] not in (None, own):
        raise CheckpointError(
            f"{path}, written for the plan {record['plan']}",
            expected=f"a checkpoint of the plan {own}",
            do="transform with the plan the checkpoint was written for (regions=Plan.from_json(...))",
        )
    inner = _inner(module)
    if isinstance(inner, RegionParallel) and any(p.is_meta for p in inner.parameters()):
        inner.materialize()
    model_state, optimizer_state = _state(module, optimizer)
    state = {"model": model_state, "optimizer": optimizer_state} if optimizer is not None else {"model": model_state}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process is as good
        try:
            state_dict_loader.load(state, checkpoint_id=path, planner=PlainPlanner())
        except CheckpointException as error:
            refused = [one for one, _ in error.failures.values() if isinstance(one, CheckpointError)]
            raise (refused or [error])[0] from error
    optimizers = [] if optimizer is None else [optimizer]
    set_state_dict(module, optimizers, model_state_dict=model_state, optim_state_dict=optimizer_state, options=_OPTIONS)
    draws = record["random"]
    _set_random_state(draws.get(str(_copy_of(module)), draws["0"]))
    return Restored(record["step"], record["extra"], path)


def _state(module: nn.Module, optimizer: Optimizer | None) -> tuple[dict[str, Any], Any]:
    return get_state_dict(module, [] if optimizer is None else [optimizer], options=_OPTIONS)


def _inner(module: nn.Module) -> RegionParallel | BoundedModule | None:
    kinds = (RegionParallel, BoundedModule)
    return next((inner for inner in module.modules() if isinstance(inner, kinds)), None)


def _plan_hash(module: nn.Module) -> str | None:
    inner = _inner(module)
    return None if inner is None else inner.plan.hash


def _copy_of(module: nn.Module) -> int:
    """Which of the copies of the ``dp`` dimension this rank belongs to."""
    inner = _inner(module)
    if not isinstance(inner, RegionParallel) or "dp" not in (inner.mesh.mesh_dim_names or ()):
        return 0
    return inner.mesh.get_local_rank("dp")


# -- all ranks together


def _group() -> Ranks | None:
    return Ranks(dist.group.WORLD) if dist.is_available() and dist.is_initialized() else None  # pyright: ignore


def _gathered(value: Any) -> list[Any]:
    group = _group()
    return [value] if group is None else group.objects(value)


def _together(act: Any) -> Any:
    """What the first rank's ``act`` gives, or raises, on every rank."""
    group, answer = _group(), (None, None)
    if group is None or group.first:
        try:
            answer = (act(), None)
        except CheckpointError as error:
            answer = (None, error)
    result, error = _gathered(answer)[0]
    if error is not None:
        raise error
    return result


# -- files


def _make_room(path: Path, partial: Path) -> None:
    if path.exists():
        raise CheckpointError(
            f"{path}, which is there already", expected="one checkpoint for a step", do="save into another folder"
        )
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)


def _finish(path: Path, partial: Path, record: dict[str, Any], keep: int | None) -> None:
    record["files"] = {file.name: file.stat().st_size for file in sorted(partial.iterdir())}
    with open(partial / RECORD, "w") as file:
        json.dump(record, file)
        file.flush()
        os.fsync(file.fileno())
    _sync(partial)
    partial.rename(path)
    _sync(path.parent)
    for old in _whole(path.parent)[keep:] if keep is not None else ():
        shutil.rmtree(old)


def _sync(folder: Path) -> None:
    """Have the names in a folder on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _whole(folder: Path) -> list[Path]:
    """Whole checkpoints, the newest first."""
    found = [path for path in folder.glob("step-*") if _NAME.fullmatch(path.name) and _fault(path) is None]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")), reverse=True)


def _fault(path: Path) -> str | None:
    """What a checkpoint lacks."""
    try:
        files = read_record(path / RECORD)["files"]
    except OSError:
        return f"no {RECORD}"
    except ValueError as error:
        return f"a {RECORD} with {error}"
    for name, size in files.items():
        if not (path / name).is_file() or (path / name).stat().st_size != size:
            return f"{name} of other than {size} bytes"
    return None


def _find(folder: Path, step: int | None) -> Path | None:
    if step is None:
        path = next(iter(_whole(folder)), None)
        if path is not None:
            refuse_code(path)
        return path
    path = folder / f"step-{step:08d}"
    fault = _fault(path)
    if fault is not None:
        raise CheckpointError(
            f"{path} with {fault}",
            expected="a whole checkpoint",
            do="leave step out to take the newest whole one" if _whole(folder) else "begin anew",
        )
    refuse_code(path)
    return path


# -- random generators


def _random_state() -> dict[str, Any]:
    state: dict[str, Any] = {"torch": _text(torch.get_rng_state()), "python": random.getstate()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = _text(torch.cuda.get_rng_state())
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        kind, keys, *rest = numpy.random.get_state()
        state["numpy"] = [kind, keys.tolist(), *rest]
    return state


def _set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(_bytes(state["torch"]))
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(_bytes(state["cuda"]))
    numpy = sys.modules.get("numpy")
    if numpy is not None and "numpy" in state:
        kind, keys, *rest = state["numpy"]
        numpy.random.set_state((kind, numpy.array(keys, dtype=numpy.uint32), *rest))


def _text(state: torch.Tensor) -> str:
    return base64.b64encode(bytes(state.tolist())).decode()


def _bytes(text: str) -> torch.Tensor:
    return torch.tensor(list(base64.b64decode(text)), dtype=torch.uint8)
