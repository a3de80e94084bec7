"""``bench parallel``: real processes, one thread each, that take turns at all schedules, beside the closed forms."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lbi_compile.cost import FORMS, Estimate, Workload
from lbi_compile.errors import OptionError
from lbi_compile.simulate import Link

from .check import TOLERANCE
from .measure import Spread
from .slowlink import Place
from .stacks import CLASSIFIER, LEAN, LM, Sizes

NAMES = ("token", "pooled", "chunked", "sid", "ddp", "gpipe", "1f1b")
# Of the two latents for regions that follow each other, the one that does not suit a case: it would leak, or look back.
OTHERS = {LM: ("pooled",), CLASSIFIER: ("chunked",), LEAN: ("chunked",)}
# What of a stack's sizes is asked for.
ASKED = ("layers", "width", "length", "regions", "r", "readout")
# Seconds in which a rank has to answer another one.
TIMEOUT = 300


@dataclass(frozen=True, slots=True)
class Line:
    """One schedule at one batch.

    Attributes:
        name: As in the table.
        form: Short name of its closed form.
        baseline: The same in one process; empty for what runs in one itself.
        error: Largest relative error of a gradient, against one process.
        ok: It is small enough.
        sent: Bytes all ranks handed to the process group, as collectives over rings send them.
        form_sent: The same by the closed form.
        seconds: Of a step; empty where any gradient of the batch was wrong.
        ratio: The baseline's step over this one, round by round.
        predicted: The same by the closed forms, of numbers measured in this run.
    """

    name: str
    form: str
    baseline: str
    error: float
    ok: bool
    sent: float
    form_sent: float
    seconds: Spread | None
    ratio: Spread | None
    predicted: float | None


@dataclass(frozen=True, slots=True)
class Meeting:
    """One batch.

    Attributes:
        samples: In the batch.
        link: As measured among the ranks.
        crowding: How many times as long ranks take while all of them compute, as one does alone.
        lines: The schedules.
        mbit: Megabits per second that links were limited to; ``None`` where they were not.
        delay: Seconds by which messages were held back.
    """

    samples: int
    link: Link
    crowding: float
    lines: tuple[Line, ...]
    mbit: float | None = None
    delay: float = 0.0

    @property
    def ok(self) -> bool:
        return all(line.ok for line in self.lines)


def sizes(kind: str, *, layers: int, width: int, length: int, regions: int, r: int, readout: str) -> Sizes:
    """Sizes of a case.

    Raises:
        OptionError: The layers do not fall into equal regions.
    """
    if layers % regions:
        raise OptionError(
            f"{layers} layers and {regions} regions", expected="regions that divide the layers", do="take 8 and 4"
        )
    return Sizes(kind, layers, width, length, 256 if kind == LM else 10, regions, r, readout)


def run(
    sizes: Sizes,
    *,
    ranks: int,
    batches: Sequence[int],
    names: Sequence[str],
    micro_batches: Sequence[int] = (1, 2, 4, 8),
    rounds: int = 10,
    seed: int = 0,
    reduce: str = "auto",
    head: str = "all",
    places: Sequence[Place] = (),
    speeds: Sequence[float | None] = (None,),
    timeout: float = TIMEOUT,
) -> tuple[Meeting, ...]:
    """Start ranks, let them measure, and put what they found beside the closed forms.

    Args:
        sizes: Of the model and its cut.
        ranks: Processes.
        batches: Samples of a step.
        names: Of :data:`NAMES`.
        micro_batches: Of pipelines.
        rounds: How often each schedule has its turn.
        seed: Of the model, the data and the order.
        reduce: As for ``parallelize``.
        head: As for ``parallelize``, of latents that cross from region to region.
        places: Where ranks run; by default all here.
        speeds: Megabits per second of the links of the places, all of them in every round; ``None`` for no limit.
        timeout: Seconds after which a rank that does not answer is given up.

    Raises:
        OptionError: A name or a number does not fit, or a rank failed.
    """
    unknown = [name for name in names if name not in NAMES]
    if unknown or not 2 <= ranks <= sizes.regions:
        raise OptionError(
            f"{', '.join(unknown) or ranks}" + ("" if unknown else " ranks"),
            expected=f"some of {', '.join(NAMES)}, and from 2 to {sizes.regions} ranks",
            do="name those",
        )
    if head == "last" and sizes.readout != "last":
        raise OptionError(
            f"head='last' with readout={sizes.readout!r}",
            expected="a readout of the last region",
            do="say --readout last",
        )
    settings = {
        "sizes": sizes._asdict(),
        "batches": list(batches),
        "names": list(names),
        "micro_batches": list(micro_batches),
        "rounds": rounds,
        "seed": seed,
        "reduce": reduce,
        "head": head,
        "timeout": timeout,
        "speeds": list(speeds),
        "ends": [end for place in places for end in place.ends],
    }
    record = _launch(settings, list(places) or [Place()] * ranks)
    return tuple(meeting(cell, ranks) for cell in record["cells"])


def _launch(settings: Mapping[str, Any], places: Sequence[Place]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        given, out = Path(folder) / "settings.json", Path(folder) / "out.json"
        given.write_text(json.dumps(settings))
        port = _free_port()
        started = []
        for rank, place in enumerate(places):
            names = {
                **{"RANK": rank, "WORLD_SIZE": len(places), "LOCAL_RANK": rank},
                **{"MASTER_ADDR": places[0].address, "MASTER_PORT": port},
                **{"GLOO_SOCKET_IFNAME": place.interface, "OMP_NUM_THREADS": 1},
            }
            command = [*place.prefix, sys.executable, "-m", "lbi_compile.bench.worker", str(given), str(out)]
            with (Path(folder) / f"{rank}.log").open("w") as log:
                started.append(
                    subprocess.Popen(
                        command,
                        env={**os.environ, **{name: str(value) for name, value in names.items()}},
                        stdout=log,
                        stderr=log,
                        start_new_session=True,
                    )
                )
        try:
            failed = _wait(started)
        finally:
            for process in started:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        if failed is not None:
            told = (Path(folder) / f"{failed}.log").read_text().strip().splitlines()
            raise OptionError(
                f"rank {failed} ended with {started[failed].returncode}: {' | '.join(told[-3:])[:600]}",
                expected="ranks that run to their end",
                do="look at the message; a rank that waits for another gives up after its timeout",
            )
        return json.loads(out.read_text())


def _wait(started: Sequence[subprocess.Popen[Any]]) -> int | None:
    """Wait for all processes; gives the first one that failed, as soon as it has."""
    while True:
        codes = [process.poll() for process in started]
        failed = [rank for rank, code in enumerate(codes) if code]
        if failed:
            return failed[0]
        if None not in codes:
            return None
        time.sleep(0.2)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("", 0))
        return found.getsockname()[1]


def meeting(cell: Mapping[str, Any], ranks: int) -> Meeting:
    """What ranks measured on one batch, beside the closed forms."""
    link, tolerance = Link(**cell["link"]), next(value for dtype, value in TOLERANCE.items() if "float32" in str(dtype))
    works = {name: Workload(**numbers) for name, numbers in cell["workloads"].items()}
    right = all(one["error"] <= tolerance for one in cell["contestants"])
    seconds = {one["name"]: one["seconds"] for one in cell["contestants"]}
    lines = []
    for one in cell["contestants"]:
        alone, base = not one["baseline"], one["baseline"]
        name = (base or one["name"]).partition(",")[0]
        work = works.get(name, next(iter(works.values()), None))
        ratio = predicted = None
        form_sent = 0.0
        if work is not None and not alone:
            here = dataclasses.replace(work, n=ranks, M=one["micro_batches"], eta=float(one["head_on_last"]))
            form = FORMS[one["form"]]
            before = FORMS["one" if name == "dense" else one["form"]](dataclasses.replace(work, n=1, M=1), link)
            estimate = form(here, link)
            predicted, form_sent = before.seconds / crowded(estimate, ranks, cell["crowding"]), estimate.sent
        if right and not alone:
            ratio = Spread.of([b / v for b, v in zip(seconds[base], seconds[one["name"]], strict=True)])
        lines.append(
            Line(
                one["name"],
                one["form"],
                base,
                one["error"],
                one["error"] <= tolerance,
                one["sent"],
                form_sent,
                Spread.of(one["seconds"]) if right else None,
                ratio,
                predicted,
            )
        )
    return Meeting(cell["samples"], link, cell["crowding"], tuple(lines), cell["mbit"])


def crowded(estimate: Estimate, ranks: int, crowding: float) -> float:
    """Seconds of a step on devices that share a machine.

    While a rank computes, so does each other one for a share `(n b / t - 1) / (n - 1)` of that time, with b seconds of
    computing in a step of t: none in a pipeline with one micro-batch, all of it where nobody ever waits.

    Args:
        estimate: On devices that share nothing.
        ranks: Their number n.
        crowding: How many times as long a computation takes while all compute.

    Example:
        >>> crowded(Estimate(seconds=2.0, busy=2.0, flops=0, sent=0, memory=0), 2, 1.25)
        2.5
        >>> crowded(Estimate(seconds=2.0, busy=1.0, flops=0, sent=0, memory=0), 2, 1.25)
        2.0
    """
    together = max(0.0, (ranks * estimate.busy / estimate.seconds - 1) / (ranks - 1))
    return estimate.seconds + estimate.busy * (crowding - 1) * min(1.0, together)
