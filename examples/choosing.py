"""Settings chosen on a validation split, one after another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

Choice = tuple[str, tuple[Any, ...]]


def choose(choices: Sequence[Choice], accuracy: Callable[[dict[str, Any]], float]) -> dict[str, Any]:
    """Choose a value for each setting; the first candidate of a setting holds until its turn comes.

    Args:
        choices: Settings with their candidates, in the order in which they are chosen.
        accuracy: Of settings, on the validation split.

    Returns:
        The chosen settings.

    Example:
        >>> choose([("rate", (0.1, 0.3)), ("width", (8, 4))], lambda s: s["rate"] - s["width"])
        {'rate': 0.3, 'width': 4}
    """
    chosen = {setting: candidates[0] for setting, candidates in choices}
    for setting, candidates in choices:
        reached = [accuracy({**chosen, setting: candidate}) for candidate in candidates]
        chosen[setting] = candidates[reached.index(max(reached))]
    return chosen
