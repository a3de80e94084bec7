"""Figures of the examples, by matplotlib, which the library itself does not need."""

from __future__ import annotations

from typing import Any

from data import package


def figure(width: float, height: float) -> Any:
    """An empty figure that needs no display.

    Args:
        width: In inches, like ``height``.
        height: Likewise.

    Raises:
        PackageError: ``matplotlib`` is not installed.

    Example:
        >>> figure(4, 3).add_subplot(title="nothing yet").get_title()
        'nothing yet'
    """
    return package("matplotlib.figure", needed_for="the figure").Figure(figsize=(width, height), layout="constrained")
