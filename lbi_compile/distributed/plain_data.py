"""Checkpoints hold data and no code: what is read of them is looked through before torch unpickles it.

torch.distributed.checkpoint reads its list of tensors, and values that are no tensors, with the whole of pickle.
"""

from __future__ import annotations

import io
import json
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.planner import ReadItem

from ..errors import CheckpointError

# torch.distributed.checkpoint writes its list of tensors under this name
METADATA = ".metadata"
_CHECKPOINT = "torch.distributed.checkpoint."
_KNOWN = {
    *((f"{_CHECKPOINT}metadata", name) for name in (
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta",
        "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    )),
    (f"{_CHECKPOINT}filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
    *((module, name) for module in ("pathlib", "pathlib._local") for name in ("PosixPath", "WindowsPath", "Path")),
}  # fmt: skip
_FORM: dict[str, type | tuple[type, ...]] = {
    "step": int, "plan": (str, type(None)), "extra": dict, "random": dict, "files": dict,
}  # fmt: skip


class _Plain(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _KNOWN or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name}, which is no part of a list of tensors")


class PlainPlanner(DefaultLoadPlanner):
    """Loads values that are no tensors (numbers of an optimizer) only where they are plain data."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        try:
            torch.load(value, weights_only=True)
        except pickle.UnpicklingError as error:
            raise _code(f"the value {read_item.dest_index.fqn}", error) from error
        value.seek(0)
        super().load_bytes(read_item, value)


def refuse_code(path: Path) -> None:
    """Look through a checkpoint's list of tensors, and run nothing of it.

    Args:
        path: The checkpoint's folder.

    Raises:
        CheckpointError: It names something else than tensors, their sizes and files.
    """
    try:
        with open(path / METADATA, "rb") as file:
            _Plain(file).load()
    except Exception as error:  # a broken pickle raises whatever its bytes happen to call for
        raise _code(f"{path / METADATA}", error) from error


def read_record(file: Path) -> dict[str, Any]:
    """The record beside the tensors.

    Raises:
        ValueError: It is no JSON, or of another form.
        OSError: There is none.
    """
    record = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(record, dict):
        raise ValueError(f"a {type(record).__name__} and no record")
    for name, kind in _FORM.items():
        if name not in record or not isinstance(record[name], kind):
            raise ValueError(f"{name} missing or of another type")
    if "0" not in record["random"] or not all(isinstance(size, int) for size in record["files"].values()):
        raise ValueError("no state of the random generators, or sizes that are no numbers")
    return record


def _code(what: str, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{what}, which is not plain data ({type(error).__name__}: {str(error).strip().splitlines()[0][:200]})",
        expected="numbers, text and tensors, as lbi_compile.distributed.save writes them",
        do="do not load this checkpoint: unpickled whole it could run any code",
    )
