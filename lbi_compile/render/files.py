"""Drawings as files: checked before the work, written whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from lbi_compile.errors import OptionError

from . import dot, html, svg
from .graph import Picture

FORMS = {
    "html": (html.page, "a page that can be zoomed and opened module by module"),
    "svg": (svg.drawing, "a drawing"),
    "dot": (dot.source, "Graphviz text"),
}


def check(files: Mapping[str, Path]) -> None:
    """See that every file can be written where it is wanted.

    Args:
        files: Path by key of ``FORMS``.

    Raises:
        OptionError: A folder does not exist, or a path is that of a folder.
    """
    for form, path in files.items():
        if path.is_dir():
            raise OptionError(
                f"--{form} {path}, which is a folder",
                expected="the name of a file",
                do=f"name {path / f'model.{form}'}",
            )
        if not path.parent.is_dir():
            raise OptionError(
                f"--{form} {path}, in a folder that does not exist",
                expected="a folder that exists",
                do=f"make {path.parent} first",
            )


def write(picture: Picture, files: Mapping[str, Path]) -> list[str]:
    """Write a picture in every wanted form.

    Args:
        picture: The picture.
        files: Path by key of ``FORMS``.

    Returns:
        One line for each file, saying what was written.

    Raises:
        OptionError: A file cannot be written.

    Example:
        >>> write(picture, {"html": Path("model.html")})  # doctest: +SKIP
        ['wrote model.html: a page that can be zoomed and opened module by module, 112,613 bytes']
    """
    check(files)
    lines = []
    for form, path in files.items():
        draw, what = FORMS[form]
        content = draw(picture).encode()
        try:
            _replace(path, content)
        except OSError as error:
            raise OptionError(
                f"--{form} {path}: {error.strerror}", expected="a file that can be written", do="name another place"
            ) from error
        lines.append(f"wrote {path}: {what}, {len(content):,} bytes")
    return lines


def _replace(path: Path, content: bytes) -> None:
    """Write beside the file, then put it in its place: a reader sees the old or the new one."""
    if path.exists() and not path.is_file():  # a pipe or a device, such as /dev/stdout, is written as it is
        path.write_bytes(content)
        return
    number, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(number, "wb") as file:
            file.write(content)
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(name, 0o666 & ~mask)  # as any other new file, not private as a temporary one
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
