"""What the command lines of the examples share: errors in words, studies whose rows are kept, and tables of them."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from result_rows import Rows
from rich.console import Console

from lbi_compile.errors import LBIError, OptionError

Say = Callable[[Any], None]


def parser_of(doc: str | None, *, home: Path | None = None) -> argparse.ArgumentParser:
    """A parser that is described by the first line of a module's docstring.

    Args:
        doc: The docstring.
        home: Default of ``--out``, the folder of a study; without it there is no such option.
    """
    made = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    if home is not None:
        made.add_argument("--out", type=Path, default=home, help="folder of rows, table and figure")
    return made


def add_sizes(parser: argparse.ArgumentParser, default: Any, names: Sequence[str] | None = None) -> None:
    """Add an option for every whole number of a dataclass.

    Args:
        parser: Where to.
        default: An instance; its values are the defaults.
        names: Its fields; all by default.
    """
    for name in names or [field.name for field in dataclasses.fields(default)]:
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=int, default=getattr(default, name), metavar="N", help="default %(default)s")


def at_least_one(*sizes: int) -> None:
    """Refuse a size below 1.

    Raises:
        OptionError: There is one.
    """
    if min(sizes) < 1:
        raise OptionError(
            f"a number below 1 ({min(sizes)})", expected="sizes and seeds from 1 on", do="pass larger numbers"
        )


def run(
    parser: argparse.ArgumentParser, arguments: list[str] | None, body: Callable[[argparse.Namespace, Say], None]
) -> int:
    """Run a command line.

    Args:
        parser: What it understands.
        arguments: What it was given; by default what the process was given.
        body: Does the work; gets the options and what prints a line.

    Returns:
        Its exit code: 0, or 2 where it could not run, with the reason on the error stream.
    """
    options = parser.parse_args(arguments)
    try:
        body(options, Console(highlight=False, soft_wrap=True).print)
    except LBIError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def study(
    name: str,
    parser: argparse.ArgumentParser,
    arguments: list[str] | None,
    body: Callable[[argparse.Namespace, Rows, Say], str],
) -> int:
    """Run a study that keeps its rows in ``rows.jsonl`` and writes ``table.md``, both in the folder ``--out``.

    Args:
        name: Of its file, without ``.py``.
        parser: Of ``parser_of(..., home=...)``.
        arguments: As for ``run``.
        body: Does the work; gets the options, the rows and what prints a line, and gives the table.

    Returns:
        As ``run``.
    """
    given = sys.argv[1:] if arguments is None else arguments

    def whole(options: argparse.Namespace, say: Say) -> None:
        rows = Rows(options.out / "rows.jsonl", command=shlex.join(["python", f"examples/{name}.py", *given]))
        text = body(options, rows, say)
        (options.out / "table.md").write_text(text)
        say(text)

    return run(parser, given, whole)
