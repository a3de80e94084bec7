"""What ranks of one machine do to each other, measured in turn with the schedules that it slows down.

The closed forms know a rank's own computing, and links. Ranks that share a machine also take longer while the others
compute, do not reach an exchange at the same time, and have to be woken up when it is over. All of that is measured by
controls that exchange nothing a schedule needs: the same four pieces of the dense model, forward and backward, by the
first rank alone, by all ranks at once, and by all ranks with an exchange of four bytes after each piece. No step of a
schedule goes into it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from lbi_compile.distributed.ranks import Ranks
from lbi_compile.simulate import Link

from .contestants import Arena

# Exchanges of a control: as many as a step of the token interface has.
PIECES = 4
# Bytes of the messages a link is measured by.
SMALL, LARGE = 4, 2**20
_TIMES = 15


class Control(NamedTuple):
    """One thing ranks do, to be timed like a contestant.

    Attributes:
        name: What.
        alone: Only the first rank does it.
        step: Do it.
    """

    name: str
    alone: bool
    step: Any


ALONE, TOGETHER, MEETING = "pieces, one rank", "pieces, all ranks", "pieces, all ranks, exchanges"


def controls(arena: Arena) -> list[Control]:
    """The three controls of a batch."""
    ranks = Ranks(arena.mesh.get_group("region"))
    blocks = arena.dense.blocks
    # a rank's share of all layers, in so many pieces
    count = max(1, len(blocks) // (PIECES * ranks.size))
    h = torch.randn(arena.samples, arena.sizes.length, arena.sizes.width)

    def piece(number: int) -> None:
        x = y = h.clone().requires_grad_()
        for i in range(count):
            y = blocks[(number * count + i) % len(blocks)](y)
        torch.autograd.grad(y, [x, *_trained(blocks, number, count)], torch.ones_like(y))

    def pieces(meet: bool) -> None:
        for number in range(PIECES):
            piece(number)
            if meet:
                ranks.all_reduce(torch.zeros(SMALL // 4), "control")

    return [
        Control(ALONE, True, partial(pieces, False)),
        Control(TOGETHER, False, partial(pieces, False)),
        Control(MEETING, False, partial(pieces, True)),
    ]


def _trained(blocks: Any, number: int, count: int) -> list[Tensor]:
    return [p for i in range(count) for p in blocks[(number * count + i) % len(blocks)].parameters()]


def crowding(seconds: Mapping[str, Sequence[float]]) -> float:
    """How many times as long a computation takes while all ranks compute, as the first rank alone needs.

    Ranks of one machine share its memory, its caches and, where there are fewer than ranks, its cores. Compared within
    each round; the median over rounds, and at least 1.

    Example:
        >>> crowding({ALONE: [1.0, 2.0, 1.0], TOGETHER: [1.5, 3.0, 1.0]})
        1.5
    """
    return max(1.0, statistics.median(b / a for a, b in zip(seconds[ALONE], seconds[TOGETHER], strict=True)))


def link(idle: Link, seconds: Mapping[str, Sequence[float]], n: int) -> Link:
    """The link as ranks meet it that compute in between: with the latency of an exchange after a piece of work.

    Args:
        idle: The link of ranks that do nothing else; its latency is the least there can be.
        seconds: Of the controls, by round.
        n: Ranks.

    Example:
        >>> link(Link(1e9, 1e-4), {TOGETHER: [1.0, 1.0], MEETING: [1.0, 1.016]}, 2).latency
        0.001
    """
    found = statistics.median(b - a for a, b in zip(seconds[TOGETHER], seconds[MEETING], strict=True))
    return idle._replace(latency=max(idle.latency, found / PIECES / _rounds(n)))


def idle_link(ranks: Ranks, everywhere: Any) -> Link:
    """The link of ranks that do nothing else.

    Latency and bandwidth are those by which an all-reduce takes what its closed form says, and messages that cross are
    those of pairs of neighbours.

    Args:
        ranks: The ranks.
        everywhere: Gives a number of every rank to all.
    """

    def took(exchange: Callable[[Tensor], Any], size: int) -> list[float]:
        value, times = torch.zeros(size // 4), []
        for _ in range(_TIMES + 1):
            ranks.barrier()
            start = time.perf_counter()
            exchange(value)
            times.append(time.perf_counter() - start)
        return times[1:]

    def reduce(value: Tensor) -> None:
        ranks.all_reduce(value, "control")

    # the least: whatever else the machine does only adds to it
    small, large = (max(everywhere(min(took(reduce, size)))) for size in (SMALL, LARGE))
    bandwidth = 2 * (ranks.size - 1) / ranks.size * (LARGE - SMALL) / max(large - small, 1e-9)
    alone = LARGE / bandwidth
    apart = alone / 10
    crossing = (max(everywhere(statistics.median(took(partial(_cross, ranks, apart), LARGE)))) - apart) / alone
    return Link(bandwidth, small / _rounds(ranks.size), min(max(crossing, 1.0), 2.0))


def _cross(ranks: Ranks, apart: float, value: Tensor) -> None:
    """Send to a neighbour what it sends too, as pipelines do; of an odd number of ranks the last has none.

    One of the two begins ``apart`` seconds after the other, as happens in any schedule: Gloo's messages get past each
    other where both begin at the same moment, and only there.
    """
    other = ranks.rank ^ 1
    if other < ranks.size:
        if ranks.rank > other:
            time.sleep(apart)
        back = torch.empty_like(value)
        sent = dist.P2POp(dist.isend, value, group=ranks.group, group_peer=other)
        received = dist.P2POp(dist.irecv, back, group=ranks.group, group_peer=other)
        for work in dist.batch_isend_irecv([sent, received]):
            work.wait()


def _rounds(n: int) -> int:
    """Messages one after another in an all-reduce."""
    return 2 * (n - 1).bit_length()
