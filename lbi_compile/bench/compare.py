"""Compare variants of one computation: build each, check each, and only then time them against each other."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lbi_compile.errors import LBIError

from .check import Check, judge, tolerance_beside
from .measure import Ratio, Spread, Timed, paired, peak_bytes, ratios

OK, WRONG, GAVE_UP, CANNOT = "ok", "wrong", "gave up", "cannot run"


class Contender(NamedTuple):
    """A variant, ready to run.

    Attributes:
        parts: What of it is timed, by the name of the part.
        tensors: Runs it once and gives what is checked, by name.
        whole: Runs all of it once, for the memory it takes.
        moved: Bytes it has to read and write at least, where that is its floor; else 0.
        held: Bytes it holds from one run to the next to work in.
        about: What there is to say about it once it has run.
    """

    parts: Mapping[str, Timed]
    tensors: Callable[[], Mapping[str, Tensor | None]]
    whole: Callable[[], Any]
    moved: int = 0
    held: int = 0
    about: Callable[[], str] = str


class Oracle(NamedTuple):
    """What variants should give.

    Attributes:
        exact: Gives it, in float64 where ``plain`` is there.
        plain: Gives what the simplest way to compute it gives in the run's dtype: nobody is asked to round less.
    """

    exact: Callable[[], Mapping[str, Tensor | None]]
    plain: Callable[[], Mapping[str, Tensor | None]] | None = None


class Variant(NamedTuple):
    """One row of a table of variants.

    Attributes:
        name: As in the table.
        what: One line that says what it is.
        make: Builds it.
        oracle: Name of the oracle that says what it should give.
        baseline: Others are compared with it.
        compiled: Its first run compiles.
    """

    name: str
    what: str
    make: Callable[[], Contender]
    oracle: str
    baseline: bool = False
    compiled: bool = False


@dataclass(frozen=True, slots=True)
class Row:
    """What came of one variant.

    Attributes:
        name: Its name.
        what: What it is.
        baseline: Others are compared with it.
        status: ``"ok"``, ``"wrong"``, ``"gave up"`` or ``"cannot run"``.
        note: Why, where it is not ok; else what there is to say about it.
        compile_seconds: From before the first run to its end where that compiles, else ``None``.
        check: How what it gives compares with its oracle; ``None`` where it did not run.
        seconds: Time of one run by part; empty where any variant of the cell failed its check.
        peak_bytes: Most memory of one run: what it holds for itself, and tensors made meanwhile; ``None`` where it was
            not asked for.
        moved: Bytes it has to read and write at least, or 0.
    """

    name: str
    what: str
    baseline: bool
    status: str
    note: str = ""
    compile_seconds: float | None = None
    check: Check | None = None
    seconds: Mapping[str, Spread] = field(default_factory=dict)
    peak_bytes: int | None = None
    moved: int = 0


@dataclass(frozen=True, slots=True)
class Cell:
    """One case at one size.

    Attributes:
        case: What was run: the case's name and sizes.
        ok: No variant failed its check, and at least one was timed.
        rows: The variants.
        ratios: Paired ratios by part, variant and baseline; empty where ``ok`` is false.
    """

    case: Mapping[str, Any]
    ok: bool
    rows: tuple[Row, ...]
    ratios: tuple[Ratio, ...]


class Terms(NamedTuple):
    """How to compare.

    Attributes:
        rounds: How often each part of each variant is timed.
        device: Where.
        dtype: Sets the tolerance of the checks.
        compile_limit: Seconds after which a variant that compiles is given up.
        memory: Whether to measure memory too.
        seed: Of the order of the rounds.
        clock: Seconds, on a CPU.
    """

    rounds: int
    device: torch.device
    dtype: torch.dtype
    compile_limit: float = 600.0
    memory: bool = False
    seed: int = 0
    clock: Callable[[], float] = time.perf_counter


def compare(
    case: Mapping[str, Any],
    variants: Sequence[Variant],
    oracles: Mapping[str, Oracle],
    how: Terms,
) -> Cell:
    """Build, check and time variants. No speed is given where one that ran is wrong, before the rounds or after them.

    Args:
        case: Describes the case, for the record.
        variants: What to compare.
        oracles: What the variants should give, by the name of the oracle.
        how: Rounds, device and limits.
    """
    expected = {name: _Expected.of(oracle, name, how.dtype) for name, oracle in oracles.items()}
    rows: dict[str, Row] = {}
    running: dict[str, Contender] = {}
    for variant in variants:
        row, contender = _start(variant, expected[variant.oracle], how)
        rows[variant.name] = row
        if contender is not None:
            running[variant.name] = contender
    found: list[Ratio] = []
    if all(row.status != WRONG for row in rows.values()):
        spreads: dict[str, dict[str, Spread]] = {name: {} for name in running}
        baselines = [row.name for row in rows.values() if row.baseline]
        for part in dict.fromkeys(part for contender in running.values() for part in contender.parts):
            timed = {name: one.parts[part] for name, one in running.items() if part in one.parts}
            seconds = paired(timed, rounds=how.rounds, device=how.device, seed=how.seed, clock=how.clock)
            found += ratios(part, seconds, baselines)
            for name, numbers in seconds.items():
                spreads[name][part] = Spread.of(numbers)
        for variant in variants:
            if variant.name not in running:
                continue
            row, contender = rows[variant.name], running[variant.name]
            again = expected[variant.oracle].judge(contender, how.dtype)
            if not again.ok:
                rows[variant.name] = replace(row, status=WRONG, note="wrong after the rounds", check=again)
                continue
            most = contender.held + peak_bytes(contender.whole, how.device) if how.memory else None
            rows[variant.name] = replace(row, seconds=spreads[variant.name], peak_bytes=most, note=contender.about())
    right = all(row.status != WRONG for row in rows.values())
    if not right:
        rows, found = {name: replace(row, seconds={}) for name, row in rows.items()}, []
    return Cell(case, right and bool(running), tuple(rows.values()), tuple(found))


class _Expected(NamedTuple):
    tensors: Mapping[str, Tensor | None]
    tolerance: float | None
    name: str

    @classmethod
    def of(cls, oracle: Oracle, name: str, dtype: torch.dtype) -> _Expected:
        tensors, tolerance = _copied(oracle.exact()), None
        if oracle.plain is not None:
            tolerance = tolerance_beside(oracle.plain(), tensors, dtype=dtype)
        return cls(tensors, tolerance, name)

    def judge(self, contender: Contender, dtype: torch.dtype) -> Check:
        return judge(contender.tensors(), self.tensors, dtype=dtype, oracle=self.name, tolerance=self.tolerance)


def _start(variant: Variant, expected: _Expected, how: Terms) -> tuple[Row, Contender | None]:
    row = Row(variant.name, variant.what, variant.baseline, OK)
    start = time.perf_counter()
    try:
        with time_limit(how.compile_limit) if variant.compiled else contextlib.nullcontext():
            contender = variant.make()
            contender.whole()
    except OutOfTime:
        return replace(row, status=GAVE_UP, note=f"not compiled after {how.compile_limit:g} s"), None
    except LBIError as error:
        return replace(row, status=CANNOT, note=f"{type(error).__name__}: {error.found}"), None
    except Exception as error:
        if not variant.baseline:
            raise
        # a baseline is not ours to mend: torch's own compilers may fail on a model
        return replace(row, status=CANNOT, note=f"{type(error).__name__}: {_line(error)}"), None
    row = replace(row, moved=contender.moved)
    if variant.compiled:
        row = replace(row, compile_seconds=time.perf_counter() - start)
    check = expected.judge(contender, how.dtype)
    if check.ok:
        return replace(row, check=check), contender
    return replace(row, status=WRONG, note=f"{check.worst} is off by {check.error:.1e}", check=check), None


def _copied(tensors: Mapping[str, Tensor | None]) -> dict[str, Tensor | None]:
    return {name: None if tensor is None else tensor.detach().clone() for name, tensor in tensors.items()}


def _line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), "")[:160]


class OutOfTime(BaseException):
    """A block ran past its limit. Not an ``Exception``: compilers wrap those, or take another way and go on."""


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Leave the block with :class:`OutOfTime` after ``seconds``; outside of the main thread there is no limit.

    Example:
        >>> with time_limit(60.0):
        ...     print("in time")
        in time
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def ring(number: int, frame: FrameType | None) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
