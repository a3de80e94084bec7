"""Settings chosen on a validation split: one after another as they are tried, or from the rows of all that were."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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


def with_best_rate(rows: Sequence[Mapping[str, Any]], loss: Callable[[Any], float]) -> dict[int, dict[str, Any]]:
    """What was found with the rate that is best on the validation split with seed 0, by seed.

    Args:
        rows: Of one arm, with ``rate`` and ``seed`` in ``what``; runs that ``diverged`` are left out.
        loss: Of a row's ``found``, on the validation split.

    Returns:
        The row's ``found``, with the ``rate`` and all ``rates`` that came to an end; nothing where none did.

    Example:
        >>> rows = [{"what": {"rate": rate, "seed": 0}, "found": {"loss": 9 * rate}} for rate in (0.1, 0.3)]
        >>> with_best_rate(rows, lambda found: found["loss"])
        {0: {'rate': 0.1, 'rates': [0.1, 0.3], 'loss': 0.9}}
    """
    ended = [row for row in rows if "diverged" not in row["found"]]
    tried = {row["what"]["rate"]: loss(row["found"]) for row in ended if row["what"]["seed"] == 0}
    rate = min(tried, key=lambda rate: tried[rate], default=None)
    return {
        row["what"]["seed"]: {"rate": rate, "rates": sorted(tried), **row["found"]}
        for row in ended
        if row["what"]["rate"] == rate
    }
