"""What stands for the interfaces of a bounded model until its first call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from .errors import NotBuiltError


class Unbuilt(nn.Module):
    """Stands for the interfaces of a bounded model that has seen no inputs: an optimizer cannot be built yet."""

    def __init__(self) -> None:
        super().__init__()
        self._parameters["unbuilt"] = UnbuiltParameter()  # pyright: ignore[reportArgumentType]

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        raise not_built("interface parameters to save")

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        if any(key.startswith(prefix) for key in state_dict):
            raise not_built("interface parameters to load into")


class UnbuiltParameter(nn.UninitializedParameter):
    @property
    def is_leaf(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        # the one property of a parameter that every optimizer asks for before it accepts it
        raise not_built("parameters for an optimizer")


def not_built(what: str) -> NotBuiltError:
    return NotBuiltError(
        f"a bounded model without {what}: it was transformed without example inputs and not called yet",
        expected="one call, which captures the model and makes the interface parameters",
        do="call bounded(x) once, or pass example_inputs to transform, before asking for this",
    )
