"""Discrete-event simulation of tasks on devices and of messages on links.

A :class:`Graph` holds tasks and what each waits for. A computation takes a device for its seconds; a message takes the
outgoing side of its sender's link for `bytes / bandwidth` seconds, one message at a time, and is there `latency`
seconds later. Collectives are made of messages. Nothing else is modelled: a device computes while its link is busy.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from .errors import OptionError

# Tasks that take no device, such as joins.
NOWHERE = -1


class Link(NamedTuple):
    """What joins a device to the others, in each direction by itself.

    Attributes:
        bandwidth: Bytes per second.
        latency: Seconds from the end of sending to arrival.
        crossing: Seconds of two messages between the same two devices, one each way at once, over those of one of them.
            1 where both directions are free; 2 where a transport sends one after the other, as Gloo was measured to do.
    """

    bandwidth: float
    latency: float
    crossing: float = 1.0


@dataclass(frozen=True, slots=True)
class Run:
    """What came of a simulation.

    Attributes:
        seconds: When the last task ended.
        busy: Seconds in which each device computed.
        sent: Bytes that each device sent.
        ends: When each task's result was there, in the order in which tasks were added.
    """

    seconds: float
    busy: tuple[float, ...]
    sent: tuple[float, ...]
    ends: tuple[float, ...]

    @property
    def waiting(self) -> float:
        """Share of the devices' time in which they did not compute."""
        return 1 - sum(self.busy) / (len(self.busy) * self.seconds) if self.seconds else 0.0


class Graph:
    """Tasks; what is waited for is added before what waits.

    Args:
        devices: Their number n.
        link: What joins each of them to the others.

    Raises:
        OptionError: There is no device, a link that moves nothing, or a task that waits for one not added yet.

    Example:
        >>> graph = Graph(2, Link(bandwidth=1e6, latency=0.5))
        >>> first = graph.compute(0, 1.0)
        >>> there = graph.send(0, 1, 2e6, after=[first])
        >>> _ = graph.compute(1, 1.0, after=[there])
        >>> simulate(graph).seconds
        4.5
    """

    def __init__(self, devices: int, link: Link) -> None:
        if devices < 1 or not link.bandwidth > 0 or not link.latency >= 0:
            raise OptionError(
                f"{devices} devices, bandwidth {link.bandwidth}, latency {link.latency}",
                expected="at least one device, a bandwidth above 0 and a latency from 0 on",
                do="give such numbers",
            )
        self.devices, self.link = devices, link
        self.place: list[int] = []
        self.seconds: list[float] = []
        self.lag: list[float] = []
        self.priority: list[int] = []
        self.after: list[tuple[int, ...]] = []
        self.sent = [0.0] * devices

    def __len__(self) -> int:
        return len(self.place)

    def _add(self, place: int, seconds: float, lag: float, priority: int, after: Iterable[int]) -> int:
        task, waits = len(self.place), tuple(after)
        if any(not 0 <= other < task for other in waits):
            raise OptionError(
                f"task {task} that waits for {waits}",
                expected="tasks of this graph added before it",
                do="add them first",
            )
        self.place.append(place)
        self.seconds.append(seconds)
        self.lag.append(lag)
        self.priority.append(priority)
        self.after.append(waits)
        return task

    def compute(self, device: int, seconds: float, *, after: Iterable[int] = (), priority: int = 0) -> int:
        """Work on a device.

        Args:
            device: From 0 to n - 1.
            seconds: How long it takes.
            after: Tasks it waits for.
            priority: Of the tasks that are ready, a device takes one of the lowest number, and of those the oldest.

        Returns:
            The task's number.
        """
        return self._add(device, seconds, 0.0, priority, after)

    def send(self, source: int, target: int, size: float, *, after: Iterable[int] = (), crosses: bool = False) -> int:
        """Send ``size`` bytes; between a device and itself that takes no time.

        Args:
            source: The sender.
            target: The receiver.
            size: Bytes.
            after: Tasks the message waits for.
            crosses: The receiver is sending as much to the sender meanwhile.

        Returns:
            The task's number.
        """
        if source == target:
            return self.join(after)
        self.sent[source] += size
        place = self.devices + source
        seconds = size / self.link.bandwidth * (self.link.crossing if crosses else 1.0)
        return self._add(place, seconds, self.link.latency, 0, after)

    def join(self, after: Iterable[int]) -> int:
        """A task that ends when the last of ``after`` has ended."""
        return self._add(NOWHERE, 0.0, 0.0, 0, after)

    def all_gather(self, size: float, after: Sequence[int]) -> list[int]:
        """Give every device what each of them has, ``size`` bytes together.

        In `ceil(log2 n)` rounds device p sends what it has gathered, up to what is missing, to p - 1, p - 2, p - 4, ...
        (Bruck et al., "Efficient algorithms for all-to-all communications in multiport message-passing systems", 1997).
        Two devices have but each other, and their messages cross.

        Args:
            size: Bytes of the whole.
            after: For each device the task that gives its part.

        Returns:
            For each device the task after which it has the whole.
        """
        return self._gather(size, after, crosses=self.devices == 2)

    def _gather(self, size: float, after: Sequence[int], *, crosses: bool) -> list[int]:
        n, have, held = self.devices, [[task] for task in after], 1
        while held < n:
            part = min(held, n - held) * size / n
            sent = [self.send(p, (p - held) % n, part, after=have[p], crosses=crosses) for p in range(n)]
            for p in range(n):
                have[p].append(sent[(p + held) % n])
            held += min(held, n - held)
        return [self.join(tasks) for tasks in have]

    def reduce_scatter(self, size: float, after: Sequence[int]) -> list[int]:
        """Sum ``size`` bytes over all devices and leave each an n-th of it: the rounds of ``all_gather`` backwards."""
        n, steps, held = self.devices, [], 1
        while held < n:
            steps.append((held, min(held, n - held)))
            held += steps[-1][1]
        have = [[task] for task in after]
        for distance, parts in reversed(steps):
            sent = [self.send(p, (p + distance) % n, parts * size / n, after=have[p]) for p in range(n)]
            for p in range(n):
                have[p].append(sent[(p - distance) % n])
        return [self.join(tasks) for tasks in have]

    def all_reduce(self, size: float, after: Sequence[int]) -> list[int]:
        """Sum ``size`` bytes over all devices: reduced and scattered, then gathered.

        In parts so small that none stands in the way of another: Gloo's reaches its link's speed in both directions.
        """
        return self._gather(size, self.reduce_scatter(size, after), crosses=False)

    def broadcast(self, size: float, after: Sequence[int], source: int) -> list[int]:
        """Give every device ``size`` bytes of ``source``: whoever has them sends on, over ever shorter distances."""
        n = self.devices
        have = {0: after[source]}  # by place counted from the source
        for step in reversed(range((n - 1).bit_length())):
            for place in sorted(have):
                other = place + (1 << step)
                if other < n:
                    here, there = (place + source) % n, (other + source) % n
                    have[other] = self.send(here, there, size, after=[have[place]])
        return [self.join([have[(p - source) % n], after[p]]) for p in range(n)]


def simulate(graph: Graph) -> Run:
    """Run a graph of tasks.

    Args:
        graph: The tasks.

    Returns:
        When everything ended, and what devices did.

    Example:
        >>> simulate(Graph(1, Link(1.0, 0.0))).seconds
        0.0
    """
    count = len(graph)
    missing = [len(after) for after in graph.after]
    dependents: list[list[int]] = [[] for _ in range(count)]
    for task, after in enumerate(graph.after):
        for other in after:
            dependents[other].append(task)
    places = 2 * graph.devices
    queues: list[list[tuple[int, int]]] = [[] for _ in range(places)]
    free, busy, ends = [True] * places, [0.0] * places, [0.0] * count
    # (when, task) where a result arrives, (when, -1 - place) where a place gets free
    events: list[tuple[float, int]] = []
    ready = [task for task in range(count) if not missing[task]]
    now = 0.0
    while True:
        # all that happens now comes first: a place then chooses among everything that is ready
        touched: set[int] = set()
        while ready or (events and events[0][0] == now):
            if ready:
                task = ready.pop()
                place = graph.place[task]
                if place != NOWHERE:
                    heapq.heappush(queues[place], (graph.priority[task], task))
                    touched.add(place)
                    continue
            else:
                _, task = heapq.heappop(events)
                if task < 0:
                    free[-1 - task] = True
                    touched.add(-1 - task)
                    continue
            ends[task] = now
            for other in dependents[task]:
                missing[other] -= 1
                if not missing[other]:
                    ready.append(other)
        for place in touched:
            if free[place] and queues[place]:
                _, task = heapq.heappop(queues[place])
                free[place] = False
                busy[place] += graph.seconds[task]
                heapq.heappush(events, (now + graph.seconds[task], -1 - place))
                heapq.heappush(events, (now + graph.seconds[task] + graph.lag[task], task))
        if not events:
            break
        now = events[0][0]
    return Run(max(ends, default=0.0), tuple(busy[: graph.devices]), tuple(graph.sent), tuple(ends))
