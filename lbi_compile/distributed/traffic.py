"""Counting what is handed to process groups."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

_calls = itertools.count()
# not a context variable: the backward of CUDA tensors runs in threads of autograd's own
_open: list[Traffic] = []


@dataclass(frozen=True, slots=True)
class Message:
    """One part of what this rank gave to one call of a process group.

    Attributes:
        call: Number of the call; parts of one call have the same.
        operation: ``"all_gather"``, ``"all_reduce"``, ``"broadcast"``, ``"send"`` or ``"receive"``.
        what: What it was, for example ``"J"``, ``"b"``, ``"canvas cotangent"`` or ``"padding"``.
        bytes: Its size here; 0 for what this rank only receives.
        ranks: Global ranks of the group.
    """

    call: int
    operation: str
    what: str
    bytes: int
    ranks: tuple[int, ...]


class Traffic:
    """What this rank gave to process groups while it was open; see ``traffic``.

    ``bytes`` counts each number once, on the rank that gives it: an all_gather is worth what this rank contributes, an
    all_reduce its tensor. What runs over a wire for it is the algorithm's business: ``on_the_wire`` has it for rings.
    """

    def __init__(self) -> None:
        self.messages: list[Message] = []

    def bytes(self, what: str | None = None, *, operation: str | None = None) -> int:
        """Bytes given, of one kind or of all.

        Example:
            >>> with traffic() as counted:
            ...     criterion(parallel(x), y).backward()
            >>> counted.bytes("J")
            8192
        """
        return sum(m.bytes for m in self.messages if what in (None, m.what) and operation in (None, m.operation))

    def on_the_wire(self) -> float:
        """Bytes this rank sends where collectives run over rings: ``n - 1`` times a gathered part, ``2 (n - 1) / n``
        times a reduced tensor, once what it sends or broadcasts."""
        factor = {"all_gather": lambda n: n - 1, "all_reduce": lambda n: 2 * (n - 1) / n}
        return sum(m.bytes * factor.get(m.operation, lambda n: 1)(len(m.ranks)) for m in self.messages)

    @property
    def calls(self) -> int:
        """How many calls there were."""
        return len({message.call for message in self.messages})

    def by_kind(self) -> dict[tuple[str, str], int]:
        """Bytes by operation and kind, in the order in which they first came."""
        found: dict[tuple[str, str], int] = {}
        for m in self.messages:
            found[m.operation, m.what] = found.get((m.operation, m.what), 0) + m.bytes
        return found

    def __str__(self) -> str:
        rows = [f"{operation:<12}{what:<24}{size:>14,}" for (operation, what), size in self.by_kind().items()]
        return "\n".join([f"{'operation':<12}{'what':<24}{'bytes':>14}", *rows])


@contextlib.contextmanager
def traffic() -> Iterator[Traffic]:
    """Count what this rank gives to process groups inside the block, forward and backward.

    Counted are the calls of region-parallel models, not those of DDP or FSDP around them.

    Example:
        >>> with lbi_compile.distributed.traffic() as counted:
        ...     criterion(parallel(x), y).backward()
        >>> print(counted)
    """
    counted = Traffic()
    _open.append(counted)
    try:
        yield counted
    finally:
        _open.remove(counted)


def count(operation: str, parts: dict[str, int], ranks: tuple[int, ...]) -> None:
    """Tell every open count of a call: its parts and their sizes in bytes."""
    if _open:
        call = next(_calls)
        for what, size in parts.items():
            for counted in _open:
                counted.messages.append(Message(call, operation, what, size, ranks))
