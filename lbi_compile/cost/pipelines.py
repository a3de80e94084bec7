"""Schedules that train the model as it is, as graphs of tasks: what waits for what, nothing summed up beforehand."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from lbi_compile.errors import OptionError
from lbi_compile.simulate import Graph, Link, simulate

from .dense import BUCKET, MOST_BUCKETS
from .symbols import Workload


class Stages:
    """A model in n stages as tasks of a pipeline.

    Args:
        work: Numbers of the step.
        link: Between devices.
        shares: Share of all layers in each stage; equal ones by default.
    """

    def __init__(self, work: Workload, link: Link, shares: Sequence[float] | None = None) -> None:
        self.work, self.graph, self.n, self.M = work, Graph(work.n, link), work.n, work.M
        self.shares = tuple(shares or [1 / work.n] * work.n)
        if len(self.shares) != work.n or abs(sum(self.shares) - 1) > 1e-6:
            raise OptionError(f"shares {self.shares}", expected=f"{work.n} that sum to 1", do="give such shares")
        self.size = work.B * work.T * work.D * work.e / work.M

    def seconds(self, stage: int, kind: str = "F") -> float:
        """Of a stage on a micro-batch: F forward, G backward, and of that B for activations and W for parameters."""
        work, part = self.work, self.work.B / self.M
        ends = (work.stem(part) if stage == 0 else 0.0) + (work.head(part) if stage == self.n - 1 else 0.0)
        share = {"F": 1.0, "G": work.g, "B": work.g * work.x, "W": work.g * (1 - work.x)}[kind]
        return share * (self.shares[stage] * work.L * work.layer(part) + ends)


def one(work: Workload, link: Link) -> Graph:
    """One device."""
    graph = Graph(1, link)
    forward = work.stem(work.B) + work.L * work.layer(work.B) + work.head(work.B)
    graph.compute(0, work.g * forward, after=[graph.compute(0, forward)])
    return graph


def data(work: Workload, link: Link) -> Graph:
    """Replicas that reduce their gradients bucket by bucket."""
    graph, part, n = Graph(work.n, link), work.B / work.n, work.n
    forward = work.stem(part) + work.L * work.layer(part) + work.head(part)
    size = work.parameters * work.e
    buckets = min(max(1, -(-round(size) // BUCKET)), MOST_BUCKETS)
    last = [graph.compute(p, forward) for p in range(n)]
    reduced = list(last)
    for _ in range(buckets):
        last = [graph.compute(p, work.g * forward / buckets, after=[last[p]]) for p in range(n)]
        # one communicator: the next bucket is reduced after this one
        reduced = graph.all_reduce(size / buckets, [graph.join([last[p], reduced[p]]) for p in range(n)])
    return graph


def gpipe(work: Workload, link: Link, shares: Sequence[float] | None = None) -> Graph:
    """All forwards, then all backwards."""
    order = [("F", j) for j in range(work.M)] + [("G", j) for j in range(work.M)]
    return _pipeline(Stages(work, link, shares), lambda stage: order, alternates=False)


def one_f_one_b(work: Workload, link: Link, shares: Sequence[float] | None = None) -> Graph:
    """`min(M, n - stage)` forwards, then a backward and a forward in turn."""

    def order(stage: int) -> list[tuple[str, int]]:
        ahead = min(work.M, work.n - stage)
        made = [("F", j) for j in range(ahead)]
        for j in range(work.M):
            made += [("G", j)] + ([("F", j + ahead)] if j + ahead < work.M else [])
        return made

    return _pipeline(Stages(work, link, shares), order)


def zero_bubble(work: Workload, link: Link, shares: Sequence[float] | None = None) -> Graph:
    """1F1B with the backward of parameters apart, taken up where a device has nothing else to do (ZB-H1).

    At most n micro-batches are alive at a stage. The order is the one that comes about without messages: a device that
    took what lies there would else begin a backward of parameters just before what it should do next arrives.
    """
    free, jobs = _ideal_order(Stages(work, Link(math.inf, 0.0), shares))
    ends = simulate(free).ends
    lists: list[list[tuple[float, str, int]]] = [[] for _ in range(work.n)]
    for task, (kind, stage, j) in jobs.items():
        lists[stage].append((ends[task], kind, j))
    return _pipeline(Stages(work, link, shares), lambda stage: [job[1:] for job in sorted(lists[stage])])


def _ideal_order(stages: Stages) -> tuple[Graph, dict[int, tuple[str, int, int]]]:
    """Tasks of a zero-bubble schedule whose devices take backwards first and those of parameters last."""
    graph, n, M = stages.graph, stages.n, stages.M
    made: dict[tuple[str, int, int], int] = {}
    # in an order in which all that is waited for comes first: along diagonals of micro-batch and stage
    todo = [(j + n, stage, "F", j) for j in range(M) for stage in range(n)]
    todo += [(j + 2 * n, n - 1 - stage, "B", j) for j in range(M) for stage in range(n)]
    waiting = sorted(todo)
    while waiting:
        left = []
        for one in waiting:
            _, at, kind, j = one
            stage = at if kind == "F" else n - 1 - at
            needs = [("F", stage - 1, j), ("B", stage, j - n + stage), ("W", stage, j - n)]
            if kind == "B":
                needs = [("F", stage, j), ("B", stage + 1, j)]
            needs = [need for need in needs if 0 <= need[1] < n and need[2] >= 0]
            if any(need not in made for need in needs):
                left.append(one)
                continue
            after = [made[need] for need in needs]
            made[kind, stage, j] = graph.compute(
                stage, stages.seconds(stage, kind), after=after, priority=int(kind == "F")
            )
            if kind == "B":
                after = [made[kind, stage, j]]
                made["W", stage, j] = graph.compute(stage, stages.seconds(stage, "W"), after=after, priority=2)
        waiting = left
    return graph, {task: job for job, task in made.items()}


def _pipeline(stages: Stages, order: Callable[[int], Sequence[tuple[str, int]]], *, alternates: bool = True) -> Graph:
    """Stages that work off a fixed list each; a task is added once all it waits for has been.

    Args:
        stages: The stages.
        order: For each stage pairs of kind (F forward; G backward; B and W its two parts) and micro-batch.
        alternates: Forwards and backwards alternate, so that messages cross: all but the first and the last.
    """
    graph, n = stages.graph, stages.n
    lists = [list(order(stage)) for stage in range(n)]
    at: list[int] = [0] * n
    before: list[tuple[int, ...]] = [()] * n
    arrived: dict[tuple[bool, int, int], int] = {}  # what a stage waits for: forward or back, stage, micro-batch
    turn = list(range(n))
    while turn:
        stage = turn.pop()
        while at[stage] < len(lists[stage]):
            kind, j = lists[stage][at[stage]]
            onward = kind == "F"
            need = (onward, stage, j)
            waits = before[stage]
            if kind != "W" and stage != (0 if onward else n - 1):
                if need not in arrived:
                    break
                waits = (*waits, arrived[need])
            task = graph.compute(stage, stages.seconds(stage, kind), after=waits)
            before[stage], at[stage] = (task,), at[stage] + 1
            other = stage + (1 if onward else -1)
            if kind != "W" and 0 <= other < n:
                crosses = alternates and j != (0 if onward else stages.M - 1)
                arrived[onward, other, j] = graph.send(stage, other, stages.size, after=[task], crosses=crosses)
                turn.append(other)
    return graph
