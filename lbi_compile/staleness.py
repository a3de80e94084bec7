"""What tells that a model is no longer the one that was captured."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn

from .errors import StaleCaptureError
from .hooked.plan import is_hooked

if TYPE_CHECKING:
    from .bounded import BoundedModule


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# Numbers that people change while they train; a captured program has them baked in.
_SETTINGS = ("p", "dropout", "momentum", "eps")


class Fingerprint(NamedTuple):
    """A model as it was captured.

    It holds modules and forwards themselves, not their ``id``: what took the place of a deleted one may stand at its
    address.

    Attributes:
        state: Every module with the names of its children, its hooks, a forward of its own, and its settings, in the
            order of a walk.
        named: Every module by its path, likewise.
    """

    state: tuple[Any, ...]
    named: frozenset[tuple[str, Any]]


def fingerprint(bounded: BoundedModule) -> Fingerprint:
    """Every submodule with its hooks; those of the bounded model too, which has a list of its own."""
    told = _told(bounded)
    modules = (*bounded.source.named_modules(), *_own(bounded))
    named = frozenset((name, (module, *told(vars(module)))) for name, module in modules)
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
            expected="the modules, hooks, forwards and settings such as dropout rates that were captured",
            do="swap modules, add adapters, parametrizations and hooks, and set rates first, then transform",
        )


def _state(bounded: BoundedModule) -> tuple[Any, ...]:
    """As ``Fingerprint.state``. Every call asks for it, and ``named_modules`` would take as long as a layer."""
    told = _told(bounded)
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
        found.append((module, tuple(children), *told(about)))
        stack.extend(child for child in children.values() if child is not None)
    return tuple(found)


def _told(bounded: BoundedModule) -> Callable[[dict[str, Any]], tuple[Any, ...]]:
    # a model that runs as it is runs its hooks and settings too, and its forward may add some of its own
    return (lambda _: ()) if is_hooked(bounded._plan) else _of_module


def _of_module(about: dict[str, Any]) -> tuple[Any, ...]:
    settings = (about.get(name) for name in _SETTINGS)
    return (
        # by their keys, which are never used twice: one hook taken away and another put in its place are as many
        *(tuple(about[kind]) for kind in _HOOKS),
        about.get("forward"),
        *(value for value in settings if isinstance(value, (int, float))),
    )


def _own(bounded: BoundedModule) -> list[tuple[str, nn.Module]]:
    return [(name, child) for name, child in bounded.named_children() if name != "lbi"]


def placement(model: nn.Module) -> set[Any]:
    return {(t.device, t.dtype) for t in itertools.chain(model.parameters(), model.buffers())}


def modes_of(model: nn.Module) -> tuple[bool, ...]:
    """Training flag of every submodule: freezing the statistics of one BatchNorm is a mode of its own."""
    return tuple(child.training for child in model.modules() if child is not model)
