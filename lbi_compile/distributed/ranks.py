"""One dimension of a device mesh: collectives among its ranks, counted, with failures that name the culprit."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .._torch import functional_collectives, gather_flat
from .traffic import count

collectives = functional_collectives()


class Ranks:
    """The ranks of one dimension of a mesh; functional collectives, which ``torch.compile`` can trace.

    Args:
        group: Their process group.

    Attributes:
        rank: Place of this rank among them.
        size: How many they are.
        members: Their global ranks.
        exchanges: Collectives begun so far; on all ranks the same when they are equally far.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.members = tuple(dist.get_process_group_ranks(group))
        self.exchanges = 0

    @property
    def first(self) -> bool:
        return self.rank == 0

    @property
    def last(self) -> bool:
        return self.rank == self.size - 1

    def all_reduce(self, value: Tensor, what: str, *, parts: dict[str, int] | None = None) -> Tensor:
        """The sum over all ranks, the same bits on each."""
        return self.start_all_reduce(value, what, parts=parts)()

    def start_all_reduce(
        self, value: Tensor, what: str, *, parts: dict[str, int] | None = None
    ) -> Callable[[], Tensor]:
        """As ``all_reduce``, in the background; what it gives waits for the sum."""
        with self._call("all_reduce", value, what, parts):
            pending = collectives.all_reduce(value.contiguous(), "sum", self.group)
        return lambda: self._wait("all_reduce", what, pending)

    def start_broadcast(self, value: Tensor, source: int, what: str) -> Callable[[], Tensor]:
        """As ``broadcast``, in the background."""
        with self._call("broadcast", value, what, None if self.rank == source else {what: 0}):
            pending = collectives.broadcast(value.contiguous(), source, self.group)
        return lambda: self._wait("broadcast", what, pending)

    def _wait(self, operation: str, what: str, pending: Tensor) -> Tensor:
        with self._noted(operation, what):
            return collectives.wait_tensor(pending)

    def all_gather(self, value: Tensor, what: str, *, parts: dict[str, int] | None = None) -> Tensor:
        """``[N, *value.shape]``, the values of all N ranks."""
        with self._call("all_gather", value, what, parts):
            value = value.contiguous()
            found = collectives.wait_tensor(gather_flat(value.reshape(-1), self.group))
            return found.view(self.size, *value.shape)

    def broadcast(self, value: Tensor, source: int, what: str) -> Tensor:
        """The value of rank ``source``; the others give a tensor of its shape."""
        return self.start_broadcast(value, source, what)()

    def send(self, value: Tensor, to: int, what: str) -> None:
        """Send to one rank."""
        with self._call("send", value, what):
            dist.send(value.contiguous(), group=self.group, group_dst=to)

    def receive(self, shape: Sequence[int], like: Tensor, source: int, what: str) -> Tensor:
        """Receive from one rank a value of a known shape, of the dtype and device of ``like``."""
        value = like.new_empty(tuple(shape))
        with self._call("receive", value, what, {what: 0}):
            dist.recv(value, group=self.group, group_src=source)
        return value

    def objects(self, value: Any) -> list[Any]:
        """What every rank gives, as Python objects; for small things outside of training steps."""
        found: list[Any] = [None] * self.size
        with self._noted("all_gather", "objects"):
            dist.all_gather_object(found, value, group=self.group)
        return found

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.objects(None)

    @contextlib.contextmanager
    def _call(self, operation: str, value: Tensor, what: str, parts: dict[str, int] | None = None) -> Iterator[None]:
        if not torch.compiler.is_compiling():
            count(operation, {what: value.nbytes} if parts is None else parts, self.members)
            self.exchanges += operation not in ("send", "receive")
        with self._noted(operation, what):
            yield

    @contextlib.contextmanager
    def _noted(self, operation: str, what: str) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # what process groups raise
            error.add_note(f"{operation} of {what} among ranks {', '.join(map(str, self.members))}")
            raise
