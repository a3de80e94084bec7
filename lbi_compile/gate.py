"""Threads that call one bounded model: while one captures, none runs.

An exporter puts fake tensors in the place of a model's parameters while it traces, and regions fetch parameters by name
when they run.
"""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Iterator


class Gate:
    """Lets any number of threads run, or one alone.

    Example:
        >>> gate = Gate()
        >>> with gate.running():
        ...     pass
        >>> with gate.alone(), gate.running(), gate.alone():
        ...     pass
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside: Counter[int] = Counter()  # how often each thread is running
        self._owner: int | None = None
        self._depth = 0
        # a first call compiles: the second thread that needs the same code waits for it
        self.compiling = threading.RLock()

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Inside, no other thread is :meth:`alone`."""
        me = threading.get_ident()
        with self._changed:
            # a thread that runs already may go on in: whoever waits to be alone waits for it to leave altogether
            self._changed.wait_for(lambda: self._owner in (None, me) or self._inside[me])
            self._inside[me] += 1
        try:
            yield
        finally:
            with self._changed:
                self._inside[me] -= 1
                if not self._inside[me]:
                    del self._inside[me]
                self._changed.notify_all()

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Inside, no other thread is :meth:`running` or alone."""
        me = threading.get_ident()
        with self._changed:
            self._changed.wait_for(lambda: self._owner in (None, me) and not set(self._inside) - {me})
            self._owner = me
            self._depth += 1
        try:
            yield
        finally:
            with self._changed:
                self._depth -= 1
                if not self._depth:
                    self._owner = None
                self._changed.notify_all()
