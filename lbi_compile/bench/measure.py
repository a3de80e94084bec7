"""Paired timing: variants take turns in random order, round by round, and are compared within each round."""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

# A reading shorter than this is mostly the clock's and the interpreter's; short work is repeated to fill it.
_LEAST = 1e-3
_MOST_REPEATS = 1000
_WARM_UP = 3


class Timed(NamedTuple):
    """One thing to time.

    Attributes:
        run: What is timed; it gets what ``setup`` gave. What it returns is freed outside of the timed span.
        setup: Runs before every ``run``, and is not timed; ``None`` for nothing.
    """

    run: Callable[[Any], Any]
    setup: Callable[[], Any] | None = None


@dataclass(frozen=True, slots=True)
class Spread:
    """Median, least and largest of a list of numbers, and the numbers.

    Attributes:
        median: Their median.
        min: The least.
        max: The largest.
        all: One number per round.
    """

    median: float
    min: float
    max: float
    all: tuple[float, ...]

    @classmethod
    def of(cls, numbers: Sequence[float]) -> Spread:
        return cls(statistics.median(numbers), min(numbers), max(numbers), tuple(numbers))


@dataclass(frozen=True, slots=True)
class Ratio:
    """How many times as fast a variant is as a baseline.

    Attributes:
        part: What was timed.
        variant: Its name.
        baseline: The other's name.
        ratio: The baseline's time over the variant's, within each round.
    """

    part: str
    variant: str
    baseline: str
    ratio: Spread


def paired(
    timed: Mapping[str, Timed],
    *,
    rounds: int,
    device: torch.device,
    seed: int = 0,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Time variants against each other: every round times each of them once, in a random order.

    Whatever slows the machine for a while then slows all of them, and their ratio within a round stays. Python's
    garbage collector is off during the rounds.

    Args:
        timed: What to time, by name.
        rounds: Number of rounds, at least 1.
        device: Where the work runs; on a GPU its own events are the clock.
        seed: Of the order.
        clock: Seconds, on a CPU: ``time.process_time`` leaves out what others do on the machine meanwhile.

    Returns:
        Seconds of one ``run`` by name, one number per round.

    Example:
        >>> seconds = paired({"a": Timed(lambda _: sum(range(9))), "b": Timed(lambda _: sum(range(99)))}, rounds=3,
        ...                  device=torch.device("cpu"))
        >>> [len(seconds[name]) for name in ("a", "b")]
        [3, 3]
    """
    read = _cuda_seconds if device.type == "cuda" else functools.partial(_cpu_seconds, clock=clock)
    repeats = {}
    for name, one in timed.items():
        for _ in range(_WARM_UP):
            once = read(one, 1)
        repeats[name] = max(1, min(_MOST_REPEATS, round(_LEAST / max(once, 1e-9))))
    order, draw = list(timed), random.Random(seed)
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    with _without_collector():
        for _ in range(rounds):
            draw.shuffle(order)
            for name in order:
                seconds[name].append(read(timed[name], repeats[name]))
    return seconds


def ratios(part: str, seconds: Mapping[str, Sequence[float]], baselines: Sequence[str]) -> tuple[Ratio, ...]:
    """Ratios of every variant to every baseline, paired by round.

    Example:
        >>> (one,) = ratios("step", {"slow": [2.0, 9.0], "fast": [1.0, 3.0]}, ["slow"])
        >>> one.variant, one.ratio.min, one.ratio.max
        ('fast', 2.0, 3.0)
    """
    return tuple(
        Ratio(part, variant, base, Spread.of([b / v for b, v in zip(seconds[base], own, strict=True)]))
        for variant, own in seconds.items()
        for base in baselines
        if base in seconds and base != variant
    )


def _cpu_seconds(timed: Timed, repeats: int, *, clock: Callable[[], float]) -> float:
    run, setup, total = timed.run, timed.setup, 0.0
    for _ in range(repeats):
        state = None if setup is None else setup()
        start = clock()
        kept = run(state)
        total += clock() - start
        del kept, state
    return total / repeats


def _cuda_seconds(timed: Timed, repeats: int) -> float:
    run, setup = timed.run, timed.setup
    if setup is None:  # back to back, as in a loop of them
        with _cuda_span() as span:
            for _ in range(repeats):
                run(None)
        return span[0] / repeats
    total = 0.0
    for _ in range(repeats):
        state = setup()
        with _cuda_span() as span:
            kept = run(state)
        total += span[0]
        del kept, state
    return total / repeats


@contextlib.contextmanager
def _cuda_span() -> Iterator[list[float]]:
    """Seconds on the current stream, from an idle GPU to the end of the work: launches count."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    span: list[float] = []
    torch.cuda.synchronize()
    start.record()
    yield span
    end.record()
    end.synchronize()
    span.append(start.elapsed_time(end) / 1e3)


@contextlib.contextmanager
def _without_collector() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def peak_bytes(run: Callable[[], Any], device: torch.device) -> int:
    """Most bytes that tensors made during ``run`` hold at one time; what was there before does not count.

    On a GPU it is the caching allocator's peak. On a CPU it is summed over the allocator's own records, in blocks as
    the allocator gives them; what a library such as oneDNN takes for itself beside it is not seen.

    Args:
        run: The work; it should have run before, so that nothing is compiled or cached within it.
        device: Where it runs.

    Example:
        >>> peak_bytes(lambda: torch.ones(1024) + torch.ones(1024), torch.device("cpu"))
        12288
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        kept = run()
        torch.cuda.synchronize()
        del kept
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # it tells of each start and stop else, amid the tables
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        kept = run()
    del kept
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(path))
        events = [event for event in json.loads(path.read_text())["traceEvents"] if event["name"] == "[memory]"]
    live = most = 0
    for event in sorted(events, key=lambda event: event["args"]["Ev Idx"]):
        live += event["args"]["Bytes"]
        most = max(most, live)
    return most
