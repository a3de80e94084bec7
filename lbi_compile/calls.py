"""Calls: what a captured program depends on, and whether a call fits one."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from . import engines, newton
from ._torch import dynamic_sizes, quiet_about_gradients
from .capture import Inputs
from .errors import BatchCouplingError, ShapeNotCapturedError


def call_signature(value: Any) -> Any:
    """What a capture depends on: structure, rank and dtype of tensors, and every constant."""
    if isinstance(value, Tensor):
        return ("tensor", value.dim(), value.dtype)
    if isinstance(value, Mapping):
        return ("map", tuple((key, call_signature(value[key])) for key in value))
    if isinstance(value, (tuple, list)):
        return ("row", tuple(call_signature(item) for item in value))
    return (type(value), value)  # 1, 1.0 and True are equal, and not the same constant


class ShapeCheck:
    """Compares a call with what a program was captured for.

    Args:
        inputs: For each input leaf its name and captured sizes (an ``int`` is fixed, a name may vary), or ``None``.
        coupled: Why samples mix where the scan needs them apart; ``None`` where they do not.

    Attributes:
        modes: Training flag of every submodule at capture.
    """

    def __init__(
        self, inputs: list[tuple[str, tuple[int | str, ...]] | None], coupled: BatchCouplingError | None
    ) -> None:
        self.inputs = inputs
        self.coupled = coupled
        self.modes: tuple[bool, ...] = ()

    def __str__(self) -> str:
        return ", ".join(f"{name} [{', '.join(map(str, sizes))}]" for name, sizes in filter(None, self.inputs))

    @property
    def ranks(self) -> list[int]:
        """Number of axes of each input tensor."""
        return [len(sizes) for _, sizes in filter(None, self.inputs)]

    def raise_if_coupled(self, engine: str, *, forward: str = newton.SEQUENTIAL) -> None:
        """Refuse the scan, and a forward that needs Jacobians, where samples mix.

        Raises:
            BatchCouplingError: They do.
        """
        if self.coupled is None:
            return
        if engine == engines.SCAN:
            raise copy.copy(self.coupled)  # an error that is raised holds on to the frames it passed
        if forward in (newton.PARALLEL, newton.QUASI):
            raise BatchCouplingError(
                self.coupled.found,
                expected="regions that treat every sample alone, so that each has interface Jacobians of its own",
                do='use forward="sequential", or forward="jacobi", which needs no Jacobians',
            )

    @contextlib.contextmanager
    def marked_sizes(self, leaves: list[Any]) -> Iterator[None]:
        """Inside, the sizes that may vary are marked for Dynamo on the caller's tensors; afterwards no mark is left.

        Marks rather than ``dynamic=True``, under which fixed sizes and constants of layers become symbols too.
        """
        with contextlib.ExitStack() as stack:
            for leaf, wanted in zip(leaves, self.inputs, strict=True):
                axes = [axis for axis, size in enumerate(wanted[1]) if isinstance(size, str)] if wanted else []
                if axes:
                    stack.enter_context(dynamic_sizes(leaf, axes))
                if wanted and leaf.requires_grad and not leaf.is_leaf:
                    stack.enter_context(quiet_about_gradients())
            yield

    def __call__(self, inputs: Inputs) -> None:
        bound: dict[str, int] = {}
        for leaf, wanted in zip(inputs.leaves, self.inputs, strict=True):
            if wanted is None:
                continue
            name, sizes = wanted
            for axis, (size, want) in enumerate(zip(leaf.shape, sizes, strict=True)):
                expected = bound.setdefault(want, size) if isinstance(want, str) else want
                if size != expected:
                    captured = ", ".join(map(str, sizes))
                    raise ShapeNotCapturedError(
                        f"{name} of shape {list(leaf.shape)}: size {size} on axis {axis}",
                        expected=f"[{captured}], where a name stands for any size and equal names for equal sizes",
                        do="give inputs of the captured sizes, or transform again with example inputs of this shape",
                    )
