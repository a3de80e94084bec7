"""The zoo as a table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

# A record of plain values, as JSON holds it; ``measure`` says what is in it.
Row = dict[str, Any]

HEAD = (
    "model", "family", "dynamic", "places", "lanes", "K", "balance", "interface", "readout", "engine", "gradient error",
    "capture", "passes", "status",
)  # fmt: skip


def table(rows: Sequence[Row]) -> str:
    """A Markdown table, one line a model, and a summary with the shares that are green.

    Args:
        rows: What ``measure`` returned for each model.
    """
    lines = ["| " + " | ".join(HEAD) + " |", "|" + "---|" * len(HEAD)]
    lines += ["| " + " | ".join(_cells(row)) + " |" for row in rows]
    return "\n".join([*lines, "", summary(rows)])


def summary(rows: Sequence[Row]) -> str:
    """Shares of the models: captured, cut, exact, exact with the scan; and the reasons of the others."""
    count = len(rows)
    green = [row for row in rows if row["status"] == "green"]

    def share(part: int) -> str:
        return f"{part} of {count} ({part / max(count, 1):.0%})"

    text = f"Captured {share(sum('nodes' in row for row in rows))}; green {share(len(green))}; "
    text += f"green with the scan {share(sum(row['engine'] == 'scan' for row in green))}."
    for k in ("2", "4", "8"):
        text += f" K={k}: {share(sum(row.get('regions', {}).get(k) == 'ok' for row in rows))}."
    reasons = Counter(":".join(row["status"].split(":")[:2]) for row in rows if row["status"] != "green")
    if reasons:
        text += " Not green: " + ", ".join(f"{number} {reason}" for reason, number in reasons.most_common()) + "."
    return text


def _cells(row: Row) -> list[str]:
    works = [k for k, said in row.get("regions", {}).items() if said == "ok"]
    values = (
        row["name"],
        row["family"],
        "+".join(row.get("dynamic", ())) or ("none" if "nodes" in row else None),
        row.get("places"),
        row.get("lanes"),
        ", ".join(works) or None,
        _number(row.get("balance"), ".2f"),
        row.get("interface"),
        row.get("readout"),
        row.get("engine"),
        _number(row.get("error"), ".0e"),
        _number(row.get("capture_s"), ".1f", " s"),
        _number(row.get("passes_s"), ".2f", " s"),
        _status(row),
    )
    return ["" if value is None else str(value).replace("|", "\\|") for value in values]


def _status(row: Row) -> str:
    said = row.get("engines", {}).get("scan", "")
    # a chain where the scan was refused says why
    note = f"; no scan: {said.split(':')[1].strip()}" if said.startswith("refused: ") else ""
    return row["status"][:120] + note


def _number(value: float | None, form: str, unit: str = "") -> str | None:
    return None if value is None else f"{value:{form}}{unit}"
