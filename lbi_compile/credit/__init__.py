"""Local credit rules: regions that are taught by objectives of their own instead of by a gradient from later regions.

``transform(model, x, regions=K, credit="sid")``, or with options ``credit=SID(alpha=0.3)``; then
``bounded.local_loss(x, target=y).backward()`` gives every region its gradient from a graph of its own.
"""

from __future__ import annotations

from typing import Any

from ..errors import OptionError
from .base import Credit, LocalCredit
from .hbll_rule import HBLL
from .sid import SID

__all__ = ["HBLL", "SID", "Credit", "LocalCredit", "as_credit"]

_RULES: dict[str, type[Credit]] = {"sid": SID, "hbll": HBLL}


def as_credit(credit: Any) -> Credit | None:
    """Read what ``transform(credit=...)`` takes; ``None`` for exact credit.

    Raises:
        OptionError: It names no rule.

    Example:
        >>> as_credit("sid").alpha
        0.5
    """
    if isinstance(credit, Credit):
        return credit
    if credit == "exact":
        return None
    if isinstance(credit, str) and credit in _RULES:
        return _RULES[credit]()
    raise OptionError(
        f"credit={credit!r}",
        expected=f'"exact", {", ".join(map(repr, _RULES))}, or options such as SID(alpha=0.3)',
        do="pass one of these",
    )
