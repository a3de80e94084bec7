"""Attributes lent to modules for the length of a call, so that several threads can call the same modules at once."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

_lock = threading.Lock()
_lent: dict[tuple[int, str], _Loan] = {}


@dataclass(slots=True)
class _Loan:
    value: Any
    borrowers: int
    before: tuple[Any, ...]  # the module's own value, or nothing where its class has it


@contextmanager
def lent(module: nn.Module, name: str, value: Any) -> Iterator[None]:
    """Inside, ``module`` has an attribute of its own; the first who asks decides on its value, the last takes it away.

    Hooks will not do: a call by another thread that meets one as it comes or goes fails, for torch keeps a hook and
    what it says of its arguments in two places. An attribute is there or it is not.

    Args:
        module: The module.
        name: The attribute.
        value: Its value for as long as somebody is inside.

    Example:
        >>> block = nn.Identity()
        >>> with lent(block, "training", False):
        ...     block.training
        False
    """
    own, key = vars(module), (id(module), name)
    with _lock:
        loan = _lent.get(key)
        if loan is None:
            loan = _lent[key] = _Loan(value, 0, (own[name],) if name in own else ())
            own[name] = value
        loan.borrowers += 1
    try:
        yield
    finally:
        with _lock:
            loan.borrowers -= 1
            if not loan.borrowers:
                del _lent[key]
                if own.get(name) is not loan.value:
                    pass  # somebody put a value of their own over ours meanwhile, and may rest on it
                elif loan.before:
                    (own[name],) = loan.before
                else:
                    del own[name]
