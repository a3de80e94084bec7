"""Which schedule to take for a training step, or none of ours, and why."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from lbi_compile.errors import OptionError
from lbi_compile.quantities import seconds as told
from lbi_compile.quantities import size
from lbi_compile.simulate import Link, simulate

from . import FORMS, GRAPHS
from .form import BOUNDED, DENSE, LOCAL, Estimate, Form
from .symbols import Workload

# What bounding a model has to win at least: forms are good to about this, and a bounded model is another model.
MARGIN = 1.1
# Schedules that ``torch.distributed.pipelining`` runs in micro-batches; those of regions run in one.
_SPLIT = ("gpipe", "1f1b", "zero-bubble")


@dataclass(frozen=True, slots=True)
class Row:
    """One schedule.

    Attributes:
        name: Its short name.
        title: What it is.
        trains: ``"dense"``, ``"bounded"`` or ``"local"``.
        micro_batches: The number that makes it fastest.
        estimate: Its figures; ``None`` where it is not possible.
        refusal: Why it is not possible.
        simulated: Seconds by simulation; ``None`` where it was not asked for.
    """

    name: str
    title: str
    trains: str
    micro_batches: int
    estimate: Estimate | None
    refusal: str | None
    simulated: float | None = None


@dataclass(frozen=True, slots=True)
class Point:
    """One point of a sweep.

    Attributes:
        K: Regions.
        r: Latent width.
        name: The schedule of exact credit that is fastest.
        seconds: Of its step; ``None`` where none is possible.
        ratio: The fastest step of the model as it is, over this one.
    """

    K: int
    r: int
    name: str
    seconds: float | None
    ratio: float | None


@dataclass(frozen=True, slots=True)
class Advice:
    """What to do.

    Attributes:
        choice: Short name of the schedule to take.
        use: Whether it is one of regions (``True``), or one of the model as it is.
        text: The advice, one sentence.
        why: Its reasons, a sentence each.
    """

    choice: str
    use: bool
    text: str
    why: tuple[str, ...]


def rows(
    work: Workload, link: Link, *, memory: float | None = None, simulated: bool = False, only: Sequence[str] = ()
) -> tuple[Row, ...]:
    """Every schedule in numbers, each with the micro-batches that suit it.

    Args:
        work: The step.
        link: Between devices.
        memory: Bytes of a device; what needs more is not possible.
        simulated: Simulate them too.
        only: Names of those wanted; by default all.
    """
    return tuple(_row(FORMS[name], work, link, memory, simulated) for name in only or FORMS)


def _row(form: Form, work: Workload, link: Link, memory: float | None, simulated: bool) -> Row:
    splits = [1]
    while form.name in _SPLIT and 2 * splits[-1] <= work.B:
        splits.append(2 * splits[-1])
    tried = [dataclasses.replace(work, M=M) for M in splits]
    possible = [one for one in tried if form.refuses(one) is None]
    if not possible:
        return Row(form.name, form.title, form.trains, 1, None, form.refuses(tried[0]))
    found = {one.M: form(one, link) for one in possible}
    if memory is not None:
        fitting = {M: one for M, one in found.items() if one.memory <= memory}
        if not fitting:
            least = min(one.memory for one in found.values())
            return Row(form.name, form.title, form.trains, 1, None, f"needs {least / 2**30:.3g} GiB of a device")
        found = fitting
    M = min(found, key=lambda M: found[M].seconds)
    seconds = None
    if simulated:
        chosen = next(one for one in possible if one.M == M)
        seconds = simulate(GRAPHS[form.name](chosen, link)).seconds
    return Row(form.name, form.title, form.trains, M, found[M], None, seconds)


def best(table: Sequence[Row], *trains: str) -> Row | None:
    """The fastest of the possible rows that train one of ``trains``."""
    found = [row for row in table if row.estimate is not None and row.trains in trains]
    return min(found, key=_seconds, default=None)


def _seconds(row: Row) -> float:
    assert row.estimate is not None
    return row.estimate.seconds


def sweep(work: Workload, link: Link, *, Ks: Sequence[int], rs: Sequence[int]) -> tuple[Point, ...]:
    """The fastest schedule of exact credit for every K and r, beside the fastest of the model as it is."""
    if not Ks or not rs or min(*Ks, *rs) < 1:
        raise OptionError(f"--sweep K={Ks} r={rs}", expected="whole numbers from 1 on", do="write K=2,4,8 r=8,16")
    dense = best(rows(work, link), DENSE)
    points = []
    for K in Ks:
        for r in rs:
            found = best(rows(dataclasses.replace(work, K=K, r=r), link, only=("chain", "scan", "token")), BOUNDED)
            seconds = None if found is None else _seconds(found)
            ratio = None if seconds is None or dense is None else _seconds(dense) / seconds
            points.append(Point(K, r, "" if found is None else found.name, seconds, ratio))
    return tuple(points)


def advise(table: Sequence[Row], work: Workload, link: Link) -> Advice:
    """Choose, and give the reasons.

    Args:
        table: As :func:`rows` gives it.
        work: The step.
        link: Between devices.

    Raises:
        OptionError: Nothing fits into the devices.
    """
    dense, bounded, local = best(table, DENSE), best(table, BOUNDED), best(table, LOCAL)
    fastest = best(table, DENSE, BOUNDED)
    if fastest is None:
        raise OptionError(
            "no schedule fits into a device", expected="devices with more memory", do="take more or larger devices"
        )
    notes = list(_reasons(table, dense, bounded, work, link))
    if local is not None:
        notes.append(
            f"{local.title} would take {told(_seconds(local))}, {_seconds(local) / _seconds(fastest):.3g} times as"
            " long; it follows no gradient of a loss of the whole, so its worth is a matter of quality, not of time."
        )
    if bounded is None:
        assert dense is not None
        why = next(row.refusal for row in table if row.trains == BOUNDED)
        return Advice(dense.name, False, f"Do not use regions here: not possible ({why}).", tuple(notes))
    if dense is None:
        text = f"Use {bounded.title}: nothing else fits into these devices."
        return Advice(bounded.name, True, text, (*notes, _caveat(work)))
    ratio = _seconds(dense) / _seconds(bounded)
    if ratio < MARGIN:
        word = "no faster" if ratio <= 1 else f"only {ratio:.2f} times as fast, less than forms are good for"
        text = (
            f"Do not use regions for speed here: the fastest of them, {bounded.title}, takes "
            f"{told(_seconds(bounded))} a step, {word}; take {dense.title}, {told(_seconds(dense))}."
        )
        return Advice(dense.name, False, text, tuple(notes))
    text = (
        f"Use {bounded.title}: {told(_seconds(bounded))} a step, {ratio:.2f} times as fast as the fastest schedule of"
        f" the model as it is ({dense.title}, {told(_seconds(dense))})."
    )
    return Advice(bounded.name, True, text, (*notes, _caveat(work)))


def _caveat(work: Workload) -> str:
    return (
        f"It trains another function, in which {work.r} numbers cross a boundary: compare its quality with the model as"
        ' it is, and with interface="zero" and "self", before you trust the time.'
    )


def _reasons(table: Sequence[Row], dense: Row | None, bounded: Row | None, work: Workload, link: Link) -> list[str]:
    by_name = {row.name: row for row in table}
    found = []
    one = by_name.get("one")
    if work.n == 1:
        found.append("With one device nobody waits for anybody: regions can only add work.")
    elif one is not None and one.estimate is not None:
        rest = [row for row in table if row.estimate is not None and row.trains != LOCAL and row.name != "one"]
        if rest and min(map(_seconds, rest)) > _seconds(one):
            found.append(
                f"One device takes {told(_seconds(one))}: at {link.bandwidth * 8 / 1e6:.4g} Mb/s and"
                f" {told(link.latency)} latency every other device costs more than it brings."
            )
    data = by_name.get("data")
    if data is not None and work.n > 1:
        if data.estimate is None:
            found.append(f"Data parallel is not possible: {data.refusal}.")
        elif data is dense:
            found.append(f"Data parallel waits {data.estimate.waiting:.0%} of the time.")
        else:
            found.append(
                f"Data parallel sends {size(data.estimate.sent)} of gradients a step and waits"
                f" {data.estimate.waiting:.0%} of the time."
            )
    pipe = best([row for row in table if row.name in _SPLIT], DENSE)
    if pipe is not None and work.n > 1 and pipe.estimate is not None:
        found.append(
            f"The best pipeline ({pipe.title}, {pipe.micro_batches} micro-batches) waits {pipe.estimate.waiting:.0%}."
        )
    if bounded is not None and bounded.estimate is not None and work.n > 1:
        found.append(f"{bounded.title} waits {bounded.estimate.waiting:.0%} and sends {size(bounded.estimate.sent)}.")
    scan, chain = by_name.get("scan"), by_name.get("chain")
    if scan is not None and chain is not None and scan.estimate is not None and chain.estimate is not None:
        least = 1 + work.x * (work.r + 1) - 1 / work.g
        if work.n > 1 and scan.estimate.seconds > chain.estimate.seconds:
            found.append(
                f"Jacobians of r = {work.r} pay with more than about {least:.0f} devices; with {work.n} the chain of"
                " pooled latents is the faster one."
            )
    return found
