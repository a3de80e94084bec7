"""The table and the figure of the comparison of local credit rules, made of its rows."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from figures import figure
from local_arms import ARMS

Row = Mapping[str, Any]
_FAR = 20.0  # points below the best arm that would press all others together


def judged(rows: Sequence[Row], arm: str, wrong: float) -> list[dict[str, Any]]:
    """What was found on the test split for an arm at a share of wrong classes, one for each seed."""
    return [
        row["found"]
        for row in rows
        if row["what"]["arm"] == arm and row["what"]["judge"] == "test" and row["what"]["wrong"] == wrong
    ]


def mean(values: Sequence[float], *, digits: int = 1) -> str:
    """Mean and standard deviation of several seeds, as a cell of a table.

    Args:
        values: One for each seed.
        digits: After the point.

    Example:
        >>> mean([1.0, 2.0, 3.0])
        '2.0 ± 1.0'
    """
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{spread}"


def table(rows: Sequence[Row]) -> str:
    """Markdown: accuracy by arm and share of wrong classes, regions of SID, paths of HBLL, what was aimed at.

    Args:
        rows: Of one budget, as ``Rows.asked`` gives them.
    """
    shares = sorted({row["what"]["wrong"] for row in rows if row["what"]["judge"] == "test"})
    lines = ["| arm | settings tried | chosen | " + " | ".join(f"{share:.0%} wrong" for share in shares) + " |"]
    lines.append("|---|---|---|" + "---|" * len(shares))
    for name, arm in ARMS.items():
        tested = [row for row in rows if row["what"]["arm"] == name and row["what"]["judge"] == "test"]
        if not tested:
            continue
        tried = sum(row["what"]["arm"] == name and row["what"]["judge"] == "validation" for row in rows)
        chosen = ", ".join(
            " ".join(map(str, value)) if isinstance(value, list) else f"{setting} {value}"
            for setting, value in tested[0]["what"]["chosen"].items()
        )
        cells = [mean([found["accuracy"] for found in judged(rows, name, share)]) for share in shares]
        lines.append(f"| {arm.label} | {tried} | {chosen} | {' | '.join(cells)} |")
    lines += ["", *_regions(rows), *_paths(rows), *_aims(rows)]
    return "\n".join(lines).rstrip() + "\n"


def _regions(rows: Sequence[Row]) -> list[str]:
    found = {name: judged(rows, name, 0.0) for name in ("alone", "sid")}
    if not found["sid"]:
        return []
    count = len(found["sid"][0]["regions"])
    lines = ["| accuracy of region | " + " | ".join(str(k + 1) for k in range(count)) + " |", "|---|" + "---|" * count]
    for name, results in found.items():
        if results:
            cells = [mean([result["regions"][k] for result in results]) for k in range(count)]
            lines.append(f"| {ARMS[name].label} | {' | '.join(cells)} |")
    return [*lines, ""]


def _paths(rows: Sequence[Row]) -> list[str]:
    found = judged(rows, "hbll", 0.0)
    if not found:
        return []
    lines = ["| path of HBLL | accuracy | FLOPs of one picture |", "|---|---|---|"]
    lines.append(f"| linear probe on the canvas | {mean([one['probe'] for one in found])} | |")
    for hops, flops in found[0]["flops"].items():
        lines.append(f"| {hops} hop{'s' * (hops != '1')} | {mean([one['paths'][hops] for one in found])} | {flops:,} |")
    return [*lines, ""]


def aims(rows: Sequence[Row]) -> list[tuple[str, float, float]]:
    """What was aimed at: in words, what was found, and the least that reaches it."""

    def at(arm: str, share: float = 0.0) -> float | None:
        found = judged(rows, arm, share)
        return statistics.fmean(one["accuracy"] for one in found) if found else None

    bp, none, sid, hbll = (at(name) for name in ("bp", "bp0", "sid", "hbll"))
    made: list[tuple[str, float, float]] = []
    if bp is None or none is None:
        return made
    made.append(("backprop, 8 blocks against 0 blocks", bp - none, 5.0))
    for label, value, least in (("SID", sid, -1.5), ("HBLL, all hops,", hbll, -2.5)):
        if value is not None:
            made.append((f"{label} against backprop", value - bp, least))
            made.append((f"{label} above 0 blocks, as a share of the gap", (value - none) / (bp - none), 0.5))
    noisy, other = at("bp", 0.4), at("sid", 0.4)
    if noisy is not None and other is not None:
        made.append(("SID against backprop, 40% wrong classes", other - noisy, 2.0))
    found = judged(rows, "hbll", 0.0)
    if found:
        probe = statistics.fmean(one["probe"] for one in found)
        paths = [statistics.fmean(one["paths"][hops] for one in found) for hops in found[0]["paths"]]
        made.append(("shortest path of HBLL against a linear probe", paths[0] - probe, 0.0))
        rise = min((b - a for a, b in itertools.pairwise(paths)), default=0.0)
        made.append(("least rise of HBLL from one path to the next", rise, 0.0))
    return made


def _aims(rows: Sequence[Row]) -> list[str]:
    made = aims(rows)
    if not made:
        return []
    lines = ["| aim | found | at least | |", "|---|---|---|---|"]
    for words, value, least in made:
        lines.append(f"| {words} | {value:+.2f} | {least:+.2f} | {'reached' if value >= least else 'missed'} |")
    return lines


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw accuracy by arm, over the share of wrong classes, and of the paths of HBLL over their hops.

    Args:
        rows: As for ``table``.
        path: The PNG file.

    Raises:
        PackageError: ``matplotlib`` is not installed.
    """
    drawn = figure(14, 4)
    arms, noise, paths = drawn.subplots(1, 3)
    found = {
        (name, share): [one["accuracy"] for one in judged(rows, name, share)]
        for name in ARMS
        for share in sorted({row["what"]["wrong"] for row in rows})
    }
    _draw_arms(arms, {name: values for (name, share), values in found.items() if values and not share})
    noise.set(xlabel="training pictures with a wrong class, %", ylabel="test accuracy, %")
    for name, arm in ARMS.items():
        shares = [share for (of, share), values in found.items() if of == name and values]
        if len(shares) > 1:
            middle = [statistics.fmean(found[name, share]) for share in shares]
            reach = [
                [abs(m - edge(found[name, share])) for m, share in zip(middle, shares, strict=True)]
                for edge in (min, max)
            ]
            noise.errorbar([100 * share for share in shares], middle, reach, label=arm.label, capsize=2, marker=".")
            noise.legend(fontsize="small")
    _draw_paths(paths, judged(rows, "hbll", 0.0), found.get(("bp", 0.0), []))
    drawn.savefig(path, dpi=110)


def _draw_arms(axes: Any, found: Mapping[str, Sequence[float]]) -> None:
    """A row of points for every arm; those far below the best one only in words."""
    best = max((statistics.fmean(values) for values in found.values()), default=0.0)
    near = [name for name in found if statistics.fmean(found[name]) > best - _FAR]
    far = ", ".join(f"{ARMS[name].label} {statistics.fmean(found[name]):.1f}" for name in found if name not in near)
    for at, name in enumerate(reversed(near)):
        axes.plot(found[name], [at] * len(found[name]), "o", color="C0", alpha=0.6)
    axes.set_yticks(range(len(near)), [ARMS[name].label for name in reversed(near)], fontsize="small")
    axes.set(xlabel="test accuracy, %" + (f"\nnot shown: {far}" if far else ""))
    axes.grid(axis="x", alpha=0.3)


def _draw_paths(axes: Any, found: Sequence[Mapping[str, Any]], whole: Sequence[float]) -> None:
    axes.set(xlabel="hops of HBLL", ylabel="test accuracy, %", xscale="log")
    if found:
        hops = list(found[0]["paths"])
        for one in found:
            axes.plot([int(n) for n in hops], [one["paths"][n] for n in hops], "o-", color="C0", alpha=0.5)
        axes.set_xticks([int(n) for n in hops], hops)
        axes.minorticks_off()
        probe = statistics.fmean(one["probe"] for one in found)
        axes.set(xlabel=f"hops of HBLL\nnot shown: linear probe on the canvas {probe:.1f}")
    if whole:
        axes.axhline(statistics.fmean(whole), color="C2", ls="--", label=ARMS["bp"].label)
        axes.legend(fontsize="small", loc="lower right")
