"""CIFAR-10 and CIFAR-100 from the files of their authors, as pickles or as plain binaries; no code in a file is run.

A folder is what one of the published archives unpacks to: ``cifar-10-batches-py``, ``cifar-10-batches-bin``,
``cifar-100-python`` or ``cifar-100-binary``. Nothing is downloaded.

Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009; formats as on its author's page.
"""

from __future__ import annotations

import io
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from digits import Split, check_wrong, wrong_classes
from torch import Tensor

from lbi_compile.errors import CorpusError

PIXELS = 3 * 32 * 32
_VALIDATION = 10  # every tenth picture to train on is one to choose by instead


@dataclass(frozen=True, slots=True)
class _Format:
    """How one archive is laid out.

    Attributes:
        train: Its files with pictures to train on.
        test: Those to judge by.
        classes: Classes C.
        labels: Key of the classes in a pickle; in a binary they are the last byte before a picture.
        before: Bytes before every picture of a binary; 0 for pickles.
    """

    train: tuple[str, ...]
    test: str
    classes: int
    labels: bytes
    before: int


_TEN = tuple(f"data_batch_{i}" for i in range(1, 6))
_FORMATS = (
    _Format(_TEN, "test_batch", 10, b"labels", 0),
    _Format(tuple(f"{name}.bin" for name in _TEN), "test_batch.bin", 10, b"labels", 1),
    _Format(("train",), "test", 100, b"fine_labels", 0),
    _Format(("train.bin",), "test.bin", 100, b"fine_labels", 2),
)


class _Number:
    """Stands for a ``numpy.dtype``; only that of bytes is one."""

    def __init__(self, code: Any, *_: Any) -> None:
        if code not in ("u1", b"u1"):
            raise pickle.UnpicklingError(f"an array of {code!r}")

    def __setstate__(self, state: Any) -> None:
        pass


class _Array:
    """Stands for a ``numpy.ndarray``: takes its bytes as they are."""

    raw, shape = b"", ()

    def __setstate__(self, state: Any) -> None:
        _, self.shape, _, columns_first, raw = state
        self.raw = raw.encode("latin1") if isinstance(raw, str) else raw
        if columns_first or not isinstance(self.raw, bytes):
            raise pickle.UnpicklingError("an array in another order than row by row")


def _codec(text: str, name: str) -> bytes:
    """Stands for ``codecs.encode``, by which newer writers keep bytes."""
    if name != "latin1":
        raise pickle.UnpicklingError(f"bytes in the code {name!r}")
    return text.encode(name)


class _Plain(pickle.Unpickler):
    """Reads arrays of bytes, and lists, dicts, numbers and strings; every other name in a pickle is refused."""

    def find_class(self, module: str, name: str) -> Any:
        known = {
            ("numpy", "ndarray"): _Array,
            ("numpy", "dtype"): _Number,
            ("numpy.core.multiarray", "_reconstruct"): lambda *_: _Array(),
            ("numpy._core.multiarray", "_reconstruct"): lambda *_: _Array(),
            ("_codecs", "encode"): _codec,
        }
        if (module, name) not in known:
            raise pickle.UnpicklingError(f"{module}.{name}, which is no part of pictures and classes")
        return known[module, name]


def read_pickle(path: Path, labels: bytes = b"labels") -> Split:
    """Read one file of the Python version.

    Args:
        path: The file.
        labels: Key of the classes.

    Returns:
        Pictures `[N, 3072]` as bytes, and classes `[N]`.

    Raises:
        CorpusError: It is no such file, or names anything but arrays of bytes and plain values.
    """
    try:
        found = _Plain(io.BytesIO(path.read_bytes()), encoding="bytes").load()
        plain = {key.encode() if isinstance(key, str) else key: value for key, value in found.items()}
        data, y = plain[b"data"], torch.tensor(plain[labels], dtype=torch.long)
        x = torch.frombuffer(bytearray(data.raw), dtype=torch.uint8).view(len(y), PIXELS)
    except Exception as error:  # a broken pickle raises whatever its bytes happen to call for
        raise _refused(path, f"{type(error).__name__}: {error}") from error
    return Split(x, y)


def read_binary(path: Path, before: int = 1) -> Split:
    """Read one file of the binary version.

    Args:
        path: The file.
        before: Bytes before every picture, of which the last one is its class.

    Returns:
        Pictures `[N, 3072]` as bytes, and classes `[N]`.

    Raises:
        CorpusError: Its size is not that of whole pictures.
    """
    raw = path.read_bytes()
    if not raw or len(raw) % (before + PIXELS):
        raise _refused(path, f"{len(raw)} bytes, no whole number of pictures of {before + PIXELS}")
    rows = torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(-1, before + PIXELS)
    return Split(rows[:, before:], rows[:, before - 1].long())


def _refused(path: Path, found: str) -> CorpusError:
    return CorpusError(f"{path}: {found}", expected="a file of CIFAR as published", do="unpack the archive again")


@dataclass(frozen=True, kw_only=True)
class CifarPictures:
    """CIFAR as a classification task, every number at mean 0 and deviation 1 over the training split.

    Attributes:
        folder: What an archive unpacks to.
        wrong: Share of the training pictures whose class is replaced by another one.
        seed: Of the wrong classes.

    Raises:
        CorpusError: The folder holds no CIFAR.
    """

    folder: Path
    wrong: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_wrong(self.wrong)
        self._format()

    def _format(self) -> _Format:
        for known in _FORMATS:
            if all((self.folder / name).is_file() for name in (*known.train, known.test)):
                return known
        names = "; ".join(", ".join((*known.train, known.test)) for known in _FORMATS)
        raise CorpusError(
            f"no CIFAR in {self.folder}", expected=f"all the files of one archive: {names}", do="unpack one there"
        )

    @property
    def features(self) -> int:
        """Numbers of a picture F."""
        return PIXELS

    @property
    def classes(self) -> int:
        """Classes C."""
        return self._format().classes

    @property
    def name(self) -> str:
        """What the task is called in rows."""
        return f"cifar-{self.classes}"

    def split(self, name: str) -> Split:
        """One split as `[N, F]`.

        Args:
            name: ``"train"``, ``"validation"`` (every tenth of the published training pictures) or ``"test"``.
        """
        train = self._read("train")
        mean, deviation = train.x.float().mean(0), train.x.float().std(0) + 1e-3
        made = train if name == "train" else self._read(name)
        y = made.y
        if name == "train":
            y = (y + wrong_classes(len(y), self.wrong, classes=self.classes, seed=self.seed)) % self.classes
        return Split((made.x.float() - mean) / deviation, y)

    def _read(self, name: str) -> Split:
        known = self._format()
        parts = [self._file(file, known) for file in ((known.test,) if name == "test" else known.train)]
        x, y = torch.cat([part.x for part in parts]), torch.cat([part.y for part in parts])
        if name == "test":
            return Split(x, y)
        chosen: Tensor = torch.arange(len(y)) % _VALIDATION == _VALIDATION - 1
        return Split(x[chosen], y[chosen]) if name == "validation" else Split(x[~chosen], y[~chosen])

    def _file(self, file: str, known: _Format) -> Split:
        path = self.folder / file
        made = read_binary(path, known.before) if known.before else read_pickle(path, known.labels)
        if bool((made.y < 0).any()) or bool((made.y >= known.classes).any()):
            raise _refused(path, f"a class that is not from 0 to {known.classes - 1}")
        return made
