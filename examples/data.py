"""Text to train language models on: where it comes from, how it becomes tokens, and how windows are drawn from it."""

from __future__ import annotations

import hashlib
import importlib
import sysconfig
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor

from lbi_compile.errors import CorpusError, LBIError, OptionError

BYTES = 256
FINEWEB, FINEWEB_CONFIG = "HuggingFaceFW/fineweb", "sample-10BT"
_FILES_PER_HELD_OUT, _PAGES_PER_HELD_OUT = 10, 100
_NOT_LIBRARY = {"site-packages", "dist-packages"}


class PackageError(LBIError):
    """A package that only some examples need is not installed."""


def package(name: str, *, needed_for: str) -> ModuleType:
    """Import a package that the library itself does not need.

    Args:
        name: Module to import.
        needed_for: What cannot be done without it.

    Raises:
        PackageError: It is not installed.

    Example:
        >>> package("math", needed_for="an example").pi
        3.141592653589793
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        top = name.partition(".")[0]
        raise PackageError(
            f"no package {error.name!r}", expected=f"{top} for {needed_for}", do=f"pip install {top}"
        ) from error


@dataclass(frozen=True, slots=True)
class Text:
    """Documents as bytes, those to train on apart from those to judge by.

    Attributes:
        train: Documents to train on.
        held_out: Documents of which no byte is trained on.
        source: Where they come from, in words.
    """

    train: tuple[bytes, ...]
    held_out: tuple[bytes, ...]
    source: str


def library(folder: Path | None = None, *, most: int | None = None) -> Text:
    """Python's own standard library as source text, its top-level modules first; every tenth file is held out.

    Args:
        folder: Where the ``*.py`` files are; by default the running Python's library.
        most: Read no further file after this many bytes.

    Raises:
        CorpusError: There are fewer than two files.

    Example:
        >>> library(most=100_000).source.endswith("of Python's standard library")
        True
    """
    folder = folder or Path(sysconfig.get_paths()["stdlib"])
    found = {path: path.relative_to(folder) for path in folder.rglob("*.py")}
    paths = [path for path, name in found.items() if not _NOT_LIBRARY & set(name.parts)]
    paths.sort(key=lambda path: (len(found[path].parts), found[path].as_posix()))
    documents = _read((path.read_bytes() for path in paths), most)
    if len(documents) < 2:
        raise CorpusError(
            f"{len(documents)} Python files in {folder}",
            expected="a standard library that lies there as source files",
            do="use a Python installation that is not packed into a zip file, or name text files",
        )
    return _split(documents, _FILES_PER_HELD_OUT, f"{len(documents)} files of Python's standard library")


def files(paths: Sequence[Path], *, most: int | None = None) -> Text:
    """The named files, in the order given; every tenth is held out, at least the last, of one file its last tenth.

    Args:
        paths: Files, or folders of which all ``*.txt`` files are read.
        most: Read no further file after this many bytes.

    Raises:
        CorpusError: There is no such file, or nothing in them.
    """
    named: list[Path] = []
    for path in paths:
        named += sorted(path.rglob("*.txt")) if path.is_dir() else [path]
    missing = [str(path) for path in named if not path.is_file()]
    if missing or not named:
        raise CorpusError(
            f"no file {', '.join(missing)}" if missing else f"no *.txt in {', '.join(map(str, paths))}",
            expected="text files, or folders with *.txt files",
            do="check the paths",
        )
    documents = _read((path.read_bytes() for path in named), most)
    if len(documents) == 1:
        cut = len(documents[0]) * (_FILES_PER_HELD_OUT - 1) // _FILES_PER_HELD_OUT
        return Text((documents[0][:cut],), (documents[0][cut:],), f"{named[0]}, its last tenth held out")
    return _split(documents, _FILES_PER_HELD_OUT, f"{len(documents)} text files")


def fineweb(parquet: Sequence[Path] = (), *, config: str = FINEWEB_CONFIG, most: int | None = None) -> Text:
    """Web pages of FineWeb, streamed and read in order until there are enough; every hundredth page is held out.

    Args:
        parquet: Files of the same schema (a ``text`` column) to read in place of those on the hub.
        config: Subset of the data set on the hub.
        most: Read no further page after this many bytes; without it all are read into memory.

    Raises:
        PackageError: ``datasets`` is not installed.
        CorpusError: The data cannot be reached or have no text.

    Penedo et al., "The FineWeb Datasets", 2024.
    """
    datasets = package("datasets", needed_for="FineWeb")
    try:
        if parquet:
            names = [str(path) for path in parquet]
            pages = datasets.load_dataset("parquet", data_files=names, split="train", streaming=True)
        else:
            pages = datasets.load_dataset(FINEWEB, name=config, split="train", streaming=True)
        documents = _read((page["text"].encode() for page in pages), most)
    except (OSError, KeyError) as error:
        raise CorpusError(
            f"{type(error).__name__}: {error}",
            expected=f"rows with a text, of {', '.join(map(str, parquet)) if parquet else f'{FINEWEB} on the hub'}",
            do="check the connection, or name parquet files of the same schema",
        ) from error
    if len(documents) < 2:
        raise CorpusError(f"{len(documents)} pages", expected="at least two", do="read more bytes, or name more files")
    return _split(documents, _PAGES_PER_HELD_OUT, f"{len(documents)} pages of FineWeb")


def _read(documents: Iterable[bytes], most: int | None) -> list[bytes]:
    kept, size = [], 0
    for document in documents:
        if document:
            kept.append(document)
            size += len(document)
        if most is not None and size >= most:
            break
    return kept


def _split(documents: Sequence[bytes], every: int, source: str) -> Text:
    held_out = set(range(every - 1, len(documents), every)) or {len(documents) - 1}
    parts = [[d for i, d in enumerate(documents) if (i in held_out) is kept] for kept in (False, True)]
    return Text(tuple(parts[0]), tuple(parts[1]), source)


class Tokenizer(Protocol):
    """Turns documents into tokens; ``lengths`` says how many bytes each token stands for, `[V]`."""

    lengths: Tensor

    def encode(self, documents: Sequence[bytes]) -> Tensor:
        """Tokens of all documents, one after the other, each ended by a line feed."""
        ...


class ByteTokens:
    """Every byte is a token.

    Example:
        >>> ByteTokens().encode([b"ab"]).tolist()
        [97, 98, 10]
    """

    def __init__(self) -> None:
        self.lengths = torch.ones(BYTES, dtype=torch.int32)

    def encode(self, documents: Sequence[bytes]) -> Tensor:
        return torch.frombuffer(bytearray(b"".join(document + b"\n" for document in documents)), dtype=torch.uint8)


class PairTokens:
    """Byte-pair tokens over bytes; what is no UTF-8 is replaced before.

    Args:
        tokenizer: A tokenizer of the ``tokenizers`` package whose tokens are written in the byte-level alphabet.

    Sennrich et al., "Neural Machine Translation of Rare Words with Subword Units", 2016.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        size = tokenizer.get_vocab_size()
        # one character of the byte-level alphabet is one byte
        self.lengths = torch.tensor([len(tokenizer.id_to_token(i)) for i in range(size)], dtype=torch.int32)

    @classmethod
    def train(cls, documents: Sequence[bytes], vocabulary: int) -> PairTokens:
        """Learn the most frequent pairs of ``documents``.

        Args:
            documents: What to learn from.
            vocabulary: Most tokens there shall be, at least 256.

        Raises:
            PackageError: ``tokenizers`` is not installed.
            OptionError: ``vocabulary`` cannot hold the bytes.
        """
        if vocabulary < BYTES:
            raise OptionError(f"{vocabulary} tokens", expected=f"at least {BYTES}, one per byte", do="ask for more")
        package("tokenizers", needed_for="byte-pair tokens")
        from tokenizers import Tokenizer, decoders, models, trainers
        from tokenizers import pre_tokenizers as alphabet

        tokenizer: Any = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = alphabet.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        start = sorted(alphabet.ByteLevel.alphabet())
        trainer = trainers.BpeTrainer(vocab_size=vocabulary, initial_alphabet=start, show_progress=False)
        tokenizer.train_from_iterator((_text(document) for document in documents), trainer)
        return cls(tokenizer)

    @classmethod
    def load(cls, path: Path) -> PairTokens:
        """Read what ``save`` wrote."""
        return cls(package("tokenizers", needed_for="byte-pair tokens").Tokenizer.from_file(str(path)))

    def save(self, path: Path) -> None:
        """Write a file that ``load`` reads."""
        self.tokenizer.save(str(path))

    def encode(self, documents: Sequence[bytes]) -> Tensor:
        coded = self.tokenizer.encode_batch([_text(document) + "\n" for document in documents])
        return torch.tensor([token for part in coded for token in part.ids], dtype=torch.int32)


def _text(document: bytes) -> str:
    return document.decode("utf-8", errors="replace")


@dataclass(frozen=True, slots=True)
class Corpus:
    """Tokens to train on and tokens to judge by.

    Attributes:
        train: Tokens, `[n]`.
        held_out: Tokens of other documents, `[m]`.
        lengths: Bytes each token of the vocabulary stands for, `[V]`.
        source: Where the text comes from, in words.
    """

    train: Tensor
    held_out: Tensor
    lengths: Tensor
    source: str

    @property
    def vocabulary(self) -> int:
        """Number of tokens V."""
        return len(self.lengths)

    @property
    def fingerprint(self) -> str:
        """A hash of all tokens: a run goes on only with the data it began with."""
        state = hashlib.sha256()
        for part in (self.train, self.held_out, self.lengths):
            state.update(part.numpy().tobytes())
        return state.hexdigest()[:16]


def corpus(text: Text, tokenizer: Tokenizer) -> Corpus:
    """Turn text into tokens.

    Args:
        text: Documents.
        tokenizer: What turns them into tokens.

    Example:
        >>> corpus(Text((b"ab",), (b"c",), "nowhere"), ByteTokens()).train.tolist()
        [97, 98, 10]
    """
    return Corpus(tokenizer.encode(text.train), tokenizer.encode(text.held_out), tokenizer.lengths, text.source)


class Windows:
    """Windows of T tokens, each epoch all of them once in a new order: what a position holds depends on nothing else.

    Every epoch cuts the tokens at another offset, so that windows differ between epochs.

    Args:
        tokens: Tokens, `[n]`.
        length: Positions T of a window.
        seed: Decides orders and offsets.

    Raises:
        CorpusError: The tokens fill no window.

    Example:
        >>> windows = Windows(torch.arange(100), length=9)
        >>> inputs, targets = windows.batch(0, 4)
        >>> inputs.shape, bool((targets == inputs + 1).all())
        (torch.Size([4, 9]), True)
    """

    def __init__(self, tokens: Tensor, *, length: int, seed: int = 0) -> None:
        self.tokens, self.length, self.seed = tokens, length, seed
        self.epoch = len(tokens) // length - 1
        if self.epoch < 1:
            raise CorpusError(
                f"{len(tokens)} tokens", expected=f"at least {2 * length}", do="name more text, or use shorter windows"
            )
        self._starts = _last_two(self._draw)

    def batch(self, position: int, size: int) -> tuple[Tensor, Tensor]:
        """Inputs and next-token targets, both `[B, T]`.

        Args:
            position: Windows drawn before, since the start of training.
            size: Windows B.
        """
        at = [divmod(p, self.epoch) for p in range(position, position + size)]
        starts = torch.stack([self._starts(epoch)[index] for epoch, index in at])
        cut = self.tokens[starts[:, None] + torch.arange(self.length + 1)].long()
        return cut[:, :-1], cut[:, 1:]

    def _draw(self, epoch: int) -> Tensor:
        draw = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        offset = torch.randint(self.length, (), generator=draw)
        return torch.randperm(self.epoch, generator=draw) * self.length + offset


def _last_two(draw: Callable[[int], Tensor]) -> Callable[[int], Tensor]:
    """``draw``, remembering two epochs: a batch may lie in both."""
    kept: dict[int, Tensor] = {}

    def remembered(epoch: int) -> Tensor:
        if epoch not in kept:
            if len(kept) == 2:
                kept.pop(min(kept))
            kept[epoch] = draw(epoch)
        return kept[epoch]

    return remembered
