"""What tells that a model is no longer the one that was captured."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

from torch import nn

from .errors import StaleCaptureError
from .hooked_plan import is_hooked

if TYPE_CHECKING:
    from .bounded import BoundedModule


def fingerprint(bounded: BoundedModule) -> tuple[Any, ...]:
    """Every submodule by name with its hooks; those of the bounded model too, which has a list of its own."""
    own = [(name, child) for name, child in bounded.named_children() if name != "lbi"]
    # a model that runs as it is runs its hooks too, and its forward may add some of its own
    counted = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    hooks = () if is_hooked(bounded._plan) else counted
    return tuple(
        (name, id(module), *(len(getattr(module, kind)) for kind in hooks))
        for name, module in (*bounded.source.named_modules(), *own)
    )


def raise_if_stale(bounded: BoundedModule) -> None:
    """Refuse to run a model that is no longer the one that was captured.

    Raises:
        StaleCaptureError: Modules or hooks were changed.
    """
    seen = fingerprint(bounded)
    if bounded._seen and seen != bounded._seen:
        changed = sorted({a[0] for a, b in itertools.zip_longest(seen, bounded._seen, fillvalue=("?",)) if a != b})
        raise StaleCaptureError(
            f"the model changed after transform at {', '.join(name or '<model>' for name in changed[:4])}",
            expected="the modules and hooks that were captured",
            do="swap modules, add adapters, parametrizations and hooks first, then transform",
        )


def placement(model: nn.Module) -> set[Any]:
    return {(t.device, t.dtype) for t in itertools.chain(model.parameters(), model.buffers())}


def modes_of(model: nn.Module) -> tuple[bool, ...]:
    """Training flag of every submodule: freezing the statistics of one BatchNorm is a mode of its own."""
    return tuple(child.training for child in model.modules() if child is not model)
