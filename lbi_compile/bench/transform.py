"""``bench transform``: seconds and peak memory of capturing a model, of its passes and of inserting the interfaces."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lbi_compile
from lbi_compile.capture import as_inputs, capture

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True, slots=True)
class Cost:
    """What one stage took.

    Attributes:
        stage: ``"capture"``, the name of a pass, ``"the rest"`` or ``"transform"``, which is all of them.
        seconds: Wall time.
        peak_bytes: How far the memory of the process rose above its start; ``None`` for passes, and where the system
            does not tell.
        result: What it left, in words.
    """

    stage: str
    seconds: float
    peak_bytes: int | None
    result: str


def costs(model: Any, inputs: Any, **options: Any) -> tuple[Cost, ...]:
    """Capture a model, and then transform it whole, which captures it once more.

    Args:
        model: The model.
        inputs: Example inputs, in one of the forms that ``transform`` takes.
        options: Of ``transform``.
    """
    given = as_inputs(model, inputs)
    capture(model, given)  # the first of all also pays for what the exporter imports
    with _measured() as captured:
        found = capture(model, given)
    nodes = len(found.graph_module.graph.nodes)
    del found
    with _measured() as whole:
        bounded = lbi_compile.transform(model, inputs, **options)
    passes = tuple(Cost(one.name, one.seconds, None, one.result) for one in bounded.plan.passes)
    rest = whole.seconds - captured.seconds - sum(one.seconds for one in passes)
    return (
        Cost("capture", captured.seconds, captured.peak_bytes, f"{nodes} nodes"),
        *passes,
        Cost("the rest", max(rest, 0.0), None, "other stages: inserting, making the interface, looking for a leak"),
        Cost("transform", whole.seconds, whole.peak_bytes, f"{len(bounded.plan.regions)} regions"),
    )


class _Span:
    seconds = 0.0
    peak_bytes: int | None = None


@contextmanager
def _measured() -> Iterator[_Span]:
    gc.collect()
    span, start = _Span(), _resettable(_peak)
    began = time.perf_counter()
    yield span
    span.seconds = time.perf_counter() - began
    if start is not None:
        span.peak_bytes = max(0, _peak() - start)


def _resettable(read: Callable[[], int]) -> int | None:
    """Set the system's high-water mark of this process back to what it holds now, and read it."""
    try:
        _RESET.write_text("5")
        return read()
    except OSError:  # not Linux, or a sandbox that keeps these files
        return None


def _peak() -> int:
    (line,) = [line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024
