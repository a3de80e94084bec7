"""Who waits for whom at the gate, thread by thread."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

import pytest

from lbi_compile.gate import Gate

# Of seconds: for what has to come, and for what must not.
LONG, SHORT = 20.0, 0.05


class Other:
    """Another thread that goes through a gate and stays inside until it is told to leave."""

    def __init__(self, way: Callable[[], contextlib.AbstractContextManager[None]]) -> None:
        self._way = way
        self.inside, self._leave = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        with self._way():
            self.inside.set()
            self._leave.wait(LONG)

    def waits(self) -> bool:
        return not self.inside.wait(SHORT)

    def leave(self) -> None:
        assert self.inside.wait(LONG), "it never came in"
        self._leave.set()
        self._thread.join(LONG)
        assert not self._thread.is_alive()


@pytest.fixture
def gate() -> Gate:
    return Gate()


@contextlib.contextmanager
def other(way: Callable[[], contextlib.AbstractContextManager[None]]) -> Iterator[Other]:
    thread = Other(way)
    try:
        yield thread
    finally:
        thread._leave.set()


def test_any_number_run(gate: Gate):
    with gate.running(), other(gate.running) as second, other(gate.running) as third:
        second.leave()
        third.leave()


def test_who_wants_to_be_alone_waits_for_all_to_leave(gate: Gate):
    with other(gate.running) as first, other(gate.running) as second:
        assert first.inside.wait(LONG)
        assert second.inside.wait(LONG)
        with other(gate.alone) as third:
            assert third.waits()
            first.leave()
            assert third.waits()
            second.leave()
            third.leave()


def test_a_thread_that_runs_goes_on_in_while_another_waits_to_be_alone(gate: Gate):
    with gate.running(), other(gate.alone) as second:
        assert second.waits()
        with gate.running():
            assert second.waits()
        assert second.waits()  # it has left once, and was inside twice
        with gate.alone():  # nobody else runs
            assert second.waits()
        third = Other(gate.running)
        third.leave()
    second.leave()


def test_one_is_alone_until_it_has_left_altogether(gate: Gate):
    with gate.alone():
        with gate.alone(), gate.running():
            pass
        with other(gate.running) as runner, other(gate.alone) as hermit:
            assert runner.waits()
            assert hermit.waits()
    runner.leave()
    hermit.leave()


def test_an_error_inside_lets_others_in(gate: Gate):
    for way in (gate.running, gate.alone):
        with pytest.raises(ZeroDivisionError), way():
            raise ZeroDivisionError
    with other(gate.alone) as second:
        second.leave()


def test_one_thread_compiles_at_a_time_and_may_come_back(gate: Gate):
    with gate.compiling, gate.compiling, other(lambda: gate.compiling) as second:  # type: ignore[arg-type, return-value]
        assert second.waits()
    second.leave()
