"""Tables and figures of the studies of model quality, made of their rows."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from choosing import with_best_rate
from figures import figure
from local_report import mean
from quality_arms import ARMS

Row = Mapping[str, Any]
BOUNDED = ("chunked", "token-gru", "token", "token-own", "both")


def chosen(rows: Sequence[Row], architecture: str, arm: str, **varied: Any) -> dict[int, dict[str, Any]]:
    """What was found with the rate that is best on the validation split with seed 0, by seed.

    Args:
        rows: Of one budget.
        architecture: Which.
        arm: Which.
        varied: Options in which runs differ from the arm; runs with others are left out.

    Returns:
        The row's ``found`` by seed; nothing where no rate was tried or all diverged.
    """
    mine = []
    for row in rows:
        what = row["what"]
        other = {name: what[name] for name in ("r", "regions") if name in what}
        if (what["architecture"], what["arm"], other) == (architecture, arm, varied):
            mine.append(row)
    return with_best_rate(mine, lambda found: found["validation"]["held_out"])


def best(rows: Sequence[Row], architecture: str) -> str:
    """The bounded arm without a leak that has the least validation loss with seed 0."""
    found = {arm: chosen(rows, architecture, arm) for arm in BOUNDED}
    losses = {arm: seeds[0]["validation"]["held_out"] for arm, seeds in found.items() if 0 in seeds}
    return min(losses, key=lambda arm: losses[arm])


def gaps(ours: Mapping[int, Any], theirs: Mapping[int, Any]) -> list[float]:
    """Test loss of one arm minus that of another, seed by seed: both saw the same text in the same order."""
    return [_nats(ours[seed]) - _nats(theirs[seed]) for seed in sorted(ours.keys() & theirs.keys())]


def _nats(found: Mapping[str, Any]) -> float:
    return found["test"]["held_out"]


def table(rows: Sequence[Row]) -> str:
    """Markdown: test loss of every arm and its gaps to dense and to ``self``, what a leak is worth, variations.

    Args:
        rows: Of one budget.
    """
    lines: list[str] = []
    for architecture in dict.fromkeys(row["what"]["architecture"] for row in rows):
        lines += [f"**{architecture}**", "", *_arms(rows, architecture), ""]
        lines += _varied(rows, architecture)
    lines += _leaks(rows)
    seconds = sum(row["cpu_seconds"] for row in rows)
    lines.append(f"{len(rows)} runs, {seconds / 60:.0f} minutes of one core.")
    return "\n".join(lines) + "\n"


def _arms(rows: Sequence[Row], architecture: str) -> list[str]:
    heads = ["arm", "parameters", "MFLOPs", "rate", "seeds", "nats per byte", "bits per byte", "- dense", "- self"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    dense, own = (chosen(rows, architecture, arm) for arm in ("dense", "self"))
    for name, arm in ARMS.items():
        found = chosen(rows, architecture, name)
        if not found:
            continue
        lines.append(_line(arm.label, found, dense, own))
    return lines


def _line(label: str, found: Mapping[int, Any], dense: Mapping[int, Any], own: Mapping[int, Any]) -> str:
    one = next(iter(found.values()))
    edge = "*" if one["rate"] in (one["rates"][0], one["rates"][-1]) and len(one["rates"]) > 2 else ""
    values = [_nats(each) for each in found.values()]
    cells = [
        label,
        f"{one['parameters']:,}",
        f"{one['flops'] / 1e6:.1f}",
        f"{one['rate']:g}{edge}",
        str(len(found)),
        mean(values, digits=4),
        mean([value / math.log(2) for value in values], digits=3),
        signed(gaps(found, dense)),
        signed(gaps(found, own)),
    ]
    return "| " + " | ".join(cells) + " |"


def signed(values: Sequence[float]) -> str:
    """Mean and standard deviation of gaps, with a sign.

    Example:
        >>> signed([0.01, 0.03])
        '+0.0200 ± 0.0141'
    """
    text = mean(values, digits=4)
    return text if not text or text.startswith("-") else f"+{text}"


def _varied(rows: Sequence[Row], architecture: str) -> list[str]:
    """Other latent widths and numbers of regions, beside the arm itself."""
    kinds = dict.fromkeys(
        (row["what"]["arm"], name, row["what"][name])
        for row in rows
        if row["what"]["architecture"] == architecture
        for name in ("r", "regions")
        if name in row["what"]
    )
    if not kinds:
        return []
    lines = [
        "| variation | parameters | rate | seeds | nats per byte | - the arm itself |",
        "|---|---|---|---|---|---|",
    ]
    for arm, name, value in kinds:
        found = chosen(rows, architecture, arm, **{name: value})
        if found:
            one = next(iter(found.values()))
            losses = mean([_nats(each) for each in found.values()], digits=4)
            gap = signed(gaps(found, chosen(rows, architecture, arm)))
            label = f"{ARMS[arm].label}, {name}={value}"
            lines.append(f"| {label} | {one['parameters']:,} | {one['rate']:g} | {len(found)} | {losses} | {gap} |")
    return [*lines, ""]


def _leaks(rows: Sequence[Row]) -> list[str]:
    lines = []
    for architecture in dict.fromkeys(row["what"]["architecture"] for row in rows):
        found = [one["prefix"] for one in chosen(rows, architecture, "paper").values() if "prefix" in one["prefix"]]
        if found:
            published, prefix = ([one[name] for one in found] for name in ("published", "prefix"))
            worth = [after - before for before, after in zip(published, prefix, strict=True)]
            cells = [mean(published, digits=4), mean(prefix, digits=4), signed(worth)]
            lines.append(f"| {architecture} | {' | '.join(cells)} |")
    if not lines:
        return []
    head = (
        "| the paper's form | latent of the whole sequence, as published | latent of the prefix | worth of the leak |"
    )
    return [head, "|---|---|---|---|", *lines, ""]


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw the test loss of every arm by architecture, with the spread over seeds.

    Args:
        rows: As for ``table``.
        path: The PNG file.

    Raises:
        PackageError: ``matplotlib`` is not installed.
    """
    names = list(dict.fromkeys(row["what"]["architecture"] for row in rows))
    drawn = figure(1.5 + 3.2 * len(names), 4.2)
    for place, architecture in enumerate(names):
        axes = drawn.add_subplot(1, len(names), place + 1, title=architecture, xlabel="test, nats per byte")
        shown = [(arm.label, chosen(rows, architecture, name)) for name, arm in ARMS.items()]
        shown = [(label, [_nats(one) for one in found.values()]) for label, found in shown if found]
        for height, (_, values) in enumerate(reversed(shown)):
            axes.plot(values, [height] * len(values), "|", color="C0", markersize=12)
            axes.plot(statistics.fmean(values), height, "o", color="C0")
        axes.set_yticks(range(len(shown)), [label for label, _ in reversed(shown)] if place == 0 else [""] * len(shown))
        axes.grid(axis="x", alpha=0.3)
    drawn.savefig(path, dpi=130)
