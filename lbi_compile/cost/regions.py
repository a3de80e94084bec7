"""Schedules of bounded models and of local credit as graphs of tasks, built from what waits for what."""

from __future__ import annotations

from collections.abc import Sequence

from lbi_compile.errors import OptionError
from lbi_compile.simulate import Graph, Link

from .symbols import Workload, bits, pooled_flops, token_flops


class Regions:
    """The regions of a model on devices, in runs of `ceil(K / n)`, and the stages of a step that schedules share.

    Args:
        work: Numbers of the step.
        link: Between devices.
        shares: Share of all layers in each region; equal ones by default.
        interface: FLOPs of a region's interface for a sample.
        readout: Also run a head of the model's size in each region.
    """

    def __init__(
        self,
        work: Workload,
        link: Link,
        shares: Sequence[float] | None,
        *,
        interface: float,
        readout: bool = False,
    ) -> None:
        self.work, self.graph, self.n = work, Graph(work.n, link), work.n
        self.shares = tuple(shares or [1 / work.K] * work.K)
        if len(self.shares) != work.K or abs(sum(self.shares) - 1) > 1e-6:
            raise OptionError(f"shares {self.shares}", expected=f"{work.K} that sum to 1", do="give such shares")
        each = -(-work.K // work.n)
        # the last device may have fewer, or none
        self.on = [range(min(p * each, work.K), min((p + 1) * each, work.K)) for p in range(work.n)]
        self._interface, self._readout = interface, readout

    @property
    def slots(self) -> int:
        """Parts of an all-gather of one thing for each region: as many for each device as the fullest one has."""
        return self.n * max(map(len, self.on))

    def region(self, k: int, samples: float) -> float:
        """Seconds of a region's forward with its interface."""
        work = self.work
        seconds = self.shares[k] * work.L * work.layer(samples) + work.o_i + self._interface * samples / work.s
        return seconds + (work.head(samples) if self._readout else 0.0)

    def device(self, p: int, samples: float) -> float:
        """Seconds of the forwards of a device's regions."""
        return sum(self.region(k, samples) for k in self.on[p])

    def everywhere(self, seconds: float, after: Sequence[int] | None = None) -> list[int]:
        """The same work on every device."""
        waits = [()] * self.n if after is None else [(task,) for task in after]
        return [self.graph.compute(p, seconds, after=waits[p]) for p in range(self.n)]

    def regional(self, scale: float, after: Sequence[int]) -> list[int]:
        """Work on each device that takes ``scale`` times the forward of its regions."""
        each = [scale * self.device(p, self.work.B) for p in range(self.n)]
        return [self.graph.compute(p, seconds, after=[after[p]]) for p, seconds in enumerate(each)]

    def cascade(self, after: Sequence[int], size: float, *, back: bool = False) -> list[list[int]]:
        """Hand latents from device to device, micro-batch by micro-batch. Gives the forwards of each device."""
        work, graph, n, M = self.work, self.graph, self.n, self.work.M
        made: list[list[int]] = [[] for _ in range(n)]
        order = list(reversed(range(n))) if back else list(range(n))
        for _ in range(M):
            arrived: list[int] = []
            for i, p in enumerate(order):
                seconds = (work.g if back else 1.0) * self.device(p, work.B / M)
                waits = [after[p], *made[p][-1:], *arrived]
                made[p].append(graph.compute(p, seconds, after=waits))
                if i + 1 < n:
                    arrived = [graph.send(p, order[i + 1], size / M, after=made[p][-1:])]
        return made

    def readout(self, after: Sequence[int]) -> list[int]:
        """The head's input on every device: a sum over all, or what the last one has; or the loss, of a head there."""
        work, graph, last = self.work, self.graph, self.n - 1
        if work.eta:
            lossy = [*after[:-1], graph.compute(last, work.head(work.B), after=after[-1:])]
            return graph.broadcast(work.e, lossy, last)
        return graph.all_reduce(self.canvas, after) if work.rho == 1 else graph.broadcast(self.canvas, after, last)

    def heads(self, after: Sequence[int]) -> list[int]:
        """Forward and backward of the head on every device; or its backward, where the last one alone has it."""
        work = self.work
        if not work.eta:
            return self.everywhere((1 + work.g) * work.head(work.B), after)
        return [*after[:-1], self.graph.compute(self.n - 1, work.g * work.head(work.B), after=after[-1:])]

    @property
    def canvas(self) -> float:
        work = self.work
        return work.B * work.T * work.D * work.e

    def end(self, after: Sequence[int], *, shared: bool = False) -> Graph:
        """What regions say about the canvas, and the stem's backward; with what SID's regions share where asked for."""
        work = self.work
        size, stem = self.canvas, work.p_s * work.e
        if stem < size:
            size = stem + shared * work.p_c * work.e
        else:
            size += shared * (work.p_c + work.p_v) * work.e
        reduced = self.graph.all_reduce(size, after)
        self.everywhere(work.g * work.stem(work.B), reduced)
        return self.graph


def chain(work: Workload, link: Link, shares: Sequence[float] | None = None) -> Graph:
    """Latents forward, adjoints back, device after device."""
    regions = Regions(work, link, shares, interface=pooled_flops(work.r, work.D))
    size = work.B * work.r * work.e
    made = regions.cascade(regions.everywhere(work.stem(work.B)), size)
    read = regions.readout([tasks[-1] for tasks in made])
    made = regions.cascade(regions.heads(read), size, back=True)
    return regions.end([tasks[-1] for tasks in made])


def scan(work: Workload, link: Link, shares: Sequence[float] | None = None) -> Graph:
    """Latents forward; Jacobians while others still wait; then everything at once."""
    regions = Regions(work, link, shares, interface=pooled_flops(work.r, work.D))
    graph, n, g, x = regions.graph, work.n, work.g, work.x
    made = regions.cascade(regions.everywhere(work.stem(work.B)), work.B * work.r * work.e)
    ready = [tasks[-1] for tasks in made]
    read = regions.readout(ready)
    if n > 2:
        each = (work.o + work.r * work.w * work.B / work.s) * work.L
        for p in range(n - 1):
            seconds = x * g * sum(regions.shares[k] * each for k in regions.on[p])
            read[p] = graph.join([read[p], graph.compute(p, seconds, after=[ready[p]])])
    told = regions.heads(read)
    # the first device's latent comes from nobody; of the last region alone, no other device has a cotangent
    for p in range(1, n) if work.rho == 1 else range(max(n - 1, 1), n):
        told[p] = graph.compute(p, x * g * regions.device(p, work.B), after=[told[p]])
    size = n * work.B * (work.r**2 + work.r) * work.e
    steps = (n - 1) * (work.o_c + 2 * work.r**2 * work.B / work.s)
    return regions.end(regions.regional(g, regions.everywhere(steps, graph.all_gather(size, told))))


def token(work: Workload, link: Link, shares: Sequence[float] | None = None) -> Graph:
    """All regions at once, forward and backward."""
    regions = Regions(work, link, shares, interface=token_flops(work.r, work.D, work.T))
    graph, g, positions = regions.graph, work.g, work.B * work.T
    size = regions.slots * positions * work.r * work.e
    cells = (work.K - 1) * (work.o_c + 2 * work.gamma * work.r**2 * positions / work.s)
    told = graph.all_gather(size, regions.regional(1.0, regions.everywhere(work.stem(work.B))))
    read = graph.all_reduce(regions.canvas, regions.everywhere(cells, told))
    back = regions.regional(g, regions.everywhere((1 + g) * work.head(work.B), read))
    return regions.end(regions.everywhere(g * cells, graph.all_gather(size, back)))


def sid(work: Workload, link: Link, shares: Sequence[float] | None = None) -> Graph:
    """A cascade of beliefs, the sum of the losses; then all regions learn."""
    interface = 2 * work.D * work.C * work.tau
    regions = Regions(work, link, shares, interface=interface, readout=True)
    made = regions.cascade(regions.everywhere(work.stem(work.B)), work.B * work.tau * work.C * work.e)
    summed = regions.graph.all_reduce(work.e, [tasks[-1] for tasks in made])
    learned = []
    for p in range(work.n):
        seconds = work.g * work.M * regions.device(p, work.B / work.M)
        learned.append(regions.graph.compute(p, seconds, after=[summed[p]]))
    return regions.end(learned, shared=True)


def hbll(work: Workload, link: Link, shares: Sequence[float] | None = None) -> Graph:
    """Sweeps of all regions at once, then all learn."""
    regions = Regions(work, link, shares, interface=pooled_flops(work.r, work.D))
    graph, n, g = regions.graph, work.n, work.g
    size = regions.slots * work.B * work.tau * work.r * work.e
    levels = 2 * bits(work.K) + 2
    now = regions.everywhere(levels * work.o_c * (1 + g), regions.everywhere(work.stem(work.B)))
    for _ in range(round(work.J)):
        now = graph.all_gather(size, regions.regional(1.0, now))
    emitted = regions.regional(1.0, now)
    emitted[-1] = graph.compute(n - 1, work.head(work.B), after=emitted[-1:])
    learned = regions.regional(g, graph.all_reduce(work.e, graph.all_gather(size, emitted)))
    learned[-1] = graph.compute(n - 1, g * work.head(work.B), after=learned[-1:])
    return regions.end(learned)
