"""What tells that a model is no longer the one that was captured."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn

from .errors import StaleCaptureError
from .hooked.plan import is_hooked

if TYPE_CHECKING:
    from .bounded import BoundedModule


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Fingerprint(NamedTuple):
    """A model as it was captured.

    Attributes:
        state: Every module with the names of its children and how many hooks it has, in the order of a walk.
        named: Every module by its path, likewise.
    """

    state: tuple[Any, ...]
    named: frozenset[tuple[str, Any]]


def fingerprint(bounded: BoundedModule) -> Fingerprint:
    """Every submodule with its hooks; those of the bounded model too, which has a list of its own."""
    counted = _counted(bounded)
    modules = (*bounded.source.named_modules(), *_own(bounded))
    named = frozenset((name, (id(module), *_hooks(vars(module), counted))) for name, module in modules)
    return Fingerprint(_state(bounded), named)


def raise_if_stale(bounded: BoundedModule) -> None:
    """Refuse to run a model that is no longer the one that was captured.

    Raises:
        StaleCaptureError: Modules or hooks were changed.
    """
    seen: Fingerprint | None = bounded._seen
    if seen is not None and _state(bounded) != seen.state:
        changed = sorted({name for name, _ in fingerprint(bounded).named ^ seen.named})
        where = ", ".join(name or "<model>" for name in changed[:4]) or "the order of its modules"
        raise StaleCaptureError(
            f"the model changed after transform at {where}",
            expected="the modules and hooks that were captured",
            do="swap modules, add adapters, parametrizations and hooks first, then transform",
        )


def _state(bounded: BoundedModule) -> tuple[Any, ...]:
    """As ``Fingerprint.state``. Every call asks for it, and ``named_modules`` would take as long as a layer."""
    counted = _counted(bounded)
    found: list[Any] = []
    stack: list[nn.Module] = [bounded.source, *(child for _, child in _own(bounded))]
    met: set[int] = set()
    while stack:
        module = stack.pop()
        if id(module) in met:
            continue
        met.add(id(module))
        about = vars(module)
        children: dict[str, nn.Module | None] = about["_modules"]
        found.append((id(module), tuple(children), *_hooks(about, counted)))
        stack.extend(child for child in children.values() if child is not None)
    return tuple(found)


def _hooks(about: dict[str, Any], counted: tuple[str, ...]) -> list[int]:
    return [len(about[kind]) for kind in counted]


def _counted(bounded: BoundedModule) -> tuple[str, ...]:
    # a model that runs as it is runs its hooks too, and its forward may add some of its own
    return () if is_hooked(bounded._plan) else _HOOKS


def _own(bounded: BoundedModule) -> list[tuple[str, nn.Module]]:
    return [(name, child) for name, child in bounded.named_children() if name != "lbi"]


def placement(model: nn.Module) -> set[Any]:
    return {(t.device, t.dtype) for t in itertools.chain(model.parameters(), model.buffers())}


def modes_of(model: nn.Module) -> tuple[bool, ...]:
    """Training flag of every submodule: freezing the statistics of one BatchNorm is a mode of its own."""
    return tuple(child.training for child in model.modules() if child is not model)
