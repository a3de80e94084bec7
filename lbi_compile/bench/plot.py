"""A picture of a run of ``bench``: medians with their range, one panel for each part."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from lbi_compile.errors import OptionError

from .record import Record
from .report import describe


def check(path: Path | None) -> None:
    """Tell what is wrong with ``--plot`` before the work rather than after it.

    Raises:
        OptionError: matplotlib is missing, the name does not end in ``.png``, or there is no such folder.
    """
    if path is None:
        return
    if path.suffix != ".png" or not path.parent.is_dir():
        raise OptionError(f"--plot {path}", expected="a file name ending in .png in a folder that exists", do="fix it")
    library()


def library() -> Any:
    """``matplotlib.pyplot``, drawing into files.

    Raises:
        OptionError: It is not installed.
    """
    try:
        matplotlib = importlib.import_module("matplotlib")
    except ImportError as error:
        raise OptionError(
            "--plot without matplotlib installed",
            expected="the matplotlib package",
            do="pip install 'lbi-compile[plot]', or leave --plot out",
        ) from error
    matplotlib.use("agg")
    return importlib.import_module("matplotlib.pyplot")


def draw(record: Record, path: Path) -> None:
    """Write the picture.

    Args:
        record: The run.
        path: A ``.png`` file.
    """
    pyplot = library()
    parts = list(dict.fromkeys(part for cell in record.cells for row in cell.rows for part in row.seconds))
    figure, axes = pyplot.subplots(max(len(parts), 1), squeeze=False, figsize=(9, 3 * max(len(parts), 1) + 1))
    for axis, part in zip(axes[:, 0], parts, strict=False):
        for name in dict.fromkeys(row.name for cell in record.cells for row in cell.rows):
            _line(axis, record, part, name)
        axis.set(yscale="log", ylabel=f"{part}, seconds")
        axis.set_xticks(range(len(record.cells)), [_label(record, i) for i in range(len(record.cells))], fontsize=7)
        axis.legend(fontsize=7)
    if record.costs:
        axes[0, 0].barh([cost.stage for cost in record.costs], [cost.seconds for cost in record.costs])
        axes[0, 0].invert_yaxis()
        axes[0, 0].set(xlabel="seconds")
    figure.suptitle(f"{record.command}\n{record.machine['processor']}, torch {record.versions['torch']}", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120, format="png")
    pyplot.close(figure)


def _line(axis: Any, record: Record, part: str, name: str) -> None:
    found = [
        (i, row.seconds[part])
        for i, cell in enumerate(record.cells)
        for row in cell.rows
        if row.name == name and part in row.seconds
    ]
    if found:
        places, spreads = zip(*found, strict=True)
        ranges = [[s.median - s.min for s in spreads], [s.max - s.median for s in spreads]]
        axis.errorbar(places, [s.median for s in spreads], yerr=ranges, marker="o", capsize=2, label=name)


def _label(record: Record, i: int) -> str:
    """What tells the cell apart from the others: the parts of its description that are not the same in all."""
    own = describe(record.cells[i]).split(": ")[1].split(", ")
    others = [set(describe(cell).split(": ")[1].split(", ")) for cell in record.cells]
    apart = [word for word in own if not all(word in other for other in others)]
    return ", ".join(apart) or ", ".join(own)
