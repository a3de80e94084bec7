"""Small pieces the views share: bars and lists of layers as text, and renderables as plain strings."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from lbi_compile.plan import Point


def shape(point: Point) -> str:
    """Type and sizes of a value.

    Example:
        >>> shape(Point("embed", "aten.add.Tensor", 0, ("B", "T", 64), "float32"))
        'float32 [B, T, 64]'
    """
    return f"{point.dtype} [{', '.join(map(str, point.shape))}]"


def layers(paths: Iterable[str]) -> str:
    """Module paths with runs of numbered siblings drawn together.

    Example:
        >>> layers(["embed", "blocks.0", "blocks.1", "blocks.2", "norm"])
        'embed, blocks.0-2, norm'
    """
    runs: list[tuple[str, int | None, int | None]] = []
    for path in paths:
        match = re.fullmatch(r"(.*?)(\d+)", path)
        stem, number = (match[1], int(match[2])) if match else (path, None)
        last = runs[-1] if runs else None
        if last and number is not None and last[0] == stem and last[2] is not None and number == last[2] + 1:
            runs[-1] = (stem, last[1], number)
        else:
            runs.append((stem, number, number))
    return ", ".join(
        stem if first is None else f"{stem}{first}" if first == last else f"{stem}{first}-{last}"
        for stem, first, last in runs
    )


def bar(share: float, width: int, *, ascii_only: bool) -> str:
    """A horizontal bar, ``share`` of ``width`` cells long; any share above zero shows.

    Example:
        >>> bar(0.5, 8, ascii_only=True)
        '####'
    """
    if ascii_only:
        return "#" * max(round(share * width), share > 0)
    eighths = max(round(share * width * 8), int(share > 0))
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()


def facts(rows: Iterable[tuple[str, RenderableType]], *, indent: int = 2) -> Table:
    """Names and values in two columns; long values wrap inside theirs."""
    table = Table.grid(padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(Text(" " * indent + name, style="dim"), verbatim(value))
    return table


def verbatim(value: RenderableType) -> RenderableType:
    """Keep rich from reading markup and emoji codes into a string, such as the brackets of a shape."""
    return Text(value) if isinstance(value, str) else value


def drawn(renderable: RenderableType, console: Console) -> str:
    """What ``console`` would print, without the blanks rich pads lines with."""
    with console.capture() as capture:
        console.print(verbatim(renderable))
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def show(renderable: RenderableType) -> None:
    """Print to standard output: colour on a terminal only; ``NO_COLOR`` and ``COLUMNS`` count."""
    print(drawn(renderable, Console(highlight=False)), flush=True)  # whoever reads a pipe wants it now


def plain(renderable: RenderableType, width: int | None = None) -> str:
    """Text without colour, ``width`` columns wide; by default as wide as the terminal, or 80 where there is none."""
    console = Console(file=io.StringIO(), width=width, color_system=None, force_terminal=False, highlight=False)
    return drawn(renderable, console)
