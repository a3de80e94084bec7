"""Targets: what ``torch.nn.functional.cross_entropy`` takes, as one row per prediction."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import OptionError, TargetError


@dataclass(frozen=True, slots=True)
class Targets:
    """Targets of N predictions.

    The loss of a batch is ``(mass * row loss).sum() / total``, as ``cross_entropy`` has it.

    Attributes:
        index: Classes `[N]`, -1 for a row that does not count; ``None`` for distributions.
        dense: Distributions `[N, C]`; ``None`` for classes.
        mass: Weight of each row, `[N]`.
        total: Sum of the weights of the classes; for probabilities the number of rows.
        smoothing: Label smoothing still to be applied to ``index``.
    """

    index: Tensor | None
    dense: Tensor | None
    mass: Tensor
    total: Tensor
    smoothing: float

    def distribution(self, classes: int) -> Tensor:
        """The targets as distributions `[N, C]`; a row that does not count is uniform."""
        if self.dense is not None:
            return self.dense
        assert self.index is not None
        y = torch.nn.functional.one_hot(self.index.clamp(min=0), classes).to(self.mass.dtype)
        y = (1 - self.smoothing) * y + self.smoothing / classes
        return torch.where(self.index[:, None] < 0, 1 / classes, y)

    def mean(self, rows: Tensor) -> Tensor:
        """Row losses `[N]` as the loss of the batch; rows without weight count as zero whatever they hold."""
        return torch.where(self.mass > 0, self.mass * rows, 0.0).sum() / self.total


class TargetReader(nn.Module):
    """Reads targets, with the options of ``torch.nn.functional.cross_entropy``.

    Args:
        classes: Number of classes C.
        weight: Weight of each class `[C]`, or ``None``.
        ignore_index: Class of the rows that do not count.
        label_smoothing: Share of the target that is spread over all classes.

    Raises:
        OptionError: An option has a value it cannot have.
    """

    weight: Tensor | None

    def __init__(
        self, classes: int, *, weight: Tensor | Sequence[float] | None, ignore_index: int, label_smoothing: float
    ) -> None:
        super().__init__()
        if not 0.0 <= label_smoothing < 1.0:
            raise OptionError(
                f"label_smoothing={label_smoothing}", expected="a number from 0 to below 1", do="pass for example 0.1"
            )
        self.classes, self.ignore_index, self.label_smoothing = classes, ignore_index, label_smoothing
        given = None if weight is None else torch.as_tensor(weight, dtype=torch.get_default_dtype()).detach().clone()
        if given is not None and given.shape != (classes,):
            raise OptionError(
                f"weight of shape {list(given.shape)}", expected=f"[{classes}], one for each class", do="give as many"
            )
        self.register_buffer("weight", given, persistent=False)

    def forward(
        self, target: Any, *, shape: Sequence[int], class_dim: int, fold: Callable[[Tensor], Tensor], like: Tensor
    ) -> Targets:
        """Read the targets of one call.

        Args:
            target: Classes in the shape of the logits without ``class_dim``, or probabilities in their shape.
            shape: Shape of the logits.
            class_dim: Their dim of classes.
            fold: Moves classes last and positions together.
            like: Tensor whose device the rows get; they are float64 where it is, else float32.

        Raises:
            TargetError: The target is of another kind or shape.
        """
        classes = self.classes
        expected = [size for dim, size in enumerate(shape) if dim != class_dim]
        if not isinstance(target, Tensor):
            raise self._refused(f"a target of type {type(target).__name__}", expected, shape)
        exact = torch.float64 if like.dtype == torch.float64 else torch.float32
        weight = None if self.weight is None else self.weight.to(device=like.device, dtype=exact)
        if not (target.is_floating_point() or target.is_complex() or target.dtype == torch.bool):
            if list(target.shape) != expected:
                raise self._refused(f"classes of shape {list(target.shape)}", expected, shape)
            index = fold(target.to(like.device).long().unsqueeze(class_dim)).reshape(-1)
            counts = index != self.ignore_index
            if weight is None:
                mass = counts.to(exact)
                return Targets(torch.where(counts, index, -1), None, mass, mass.sum(), self.label_smoothing)
            own = torch.where(counts, weight[torch.where(counts, index, 0)], 0.0)
            if not self.label_smoothing:
                return Targets(torch.where(counts, index, -1), None, own, own.sum(), 0.0)
            # weights of classes and smoothing together: the weighted target of a row is a distribution of its own
            eps = self.label_smoothing
            hard = torch.nn.functional.one_hot(torch.where(counts, index, 0), classes).to(exact)
            spread = (1 - eps) * own[:, None] * hard + eps / classes * weight
            mass = torch.where(counts, spread.sum(-1), 0.0)
            return Targets(None, spread / spread.sum(-1, keepdim=True), mass, own.sum(), 0.0)
        if not target.is_floating_point() or list(target.shape) != list(shape):
            raise self._refused(f"{target.dtype} targets of shape {list(target.shape)}", expected, shape)
        y = fold(target.detach().to(device=like.device, dtype=exact)).reshape(-1, classes)
        sums = y.sum(-1)
        if bool(((y < 0).any(-1) | ((sums - 1).abs() > 1e-2)).any()):
            raise self._refused("targets that are no probabilities", expected, shape)
        eps = self.label_smoothing
        y = ((1 - eps) * y + eps / classes) * (1.0 if weight is None else weight)
        mass = y.sum(-1)
        total = torch.tensor(float(len(y)), dtype=exact, device=y.device)
        return Targets(None, y / torch.where(mass > 0, mass, 1.0)[:, None], mass, total, 0.0)

    def _refused(self, found: str, expected: Sequence[int], shape: Sequence[int]) -> TargetError:
        return TargetError(
            f"{found} for logits of shape {list(shape)}",
            expected=f"class indices of shape {list(expected)} (integers), or class probabilities of the logits' shape",
            do='local credit rules teach classification only; train a regression with credit="exact"',
        )


def negative_entropy(targets: Targets, classes: int) -> Tensor | float:
    """``sum_c y_c log y_c`` of each row, `[N]`, or one number for all."""
    if targets.dense is not None:
        return torch.special.xlogy(targets.dense, targets.dense).sum(-1)
    eps = targets.smoothing
    if not eps:
        return 0.0
    top, rest = 1 - eps + eps / classes, eps / classes
    return top * math.log(top) + (classes - 1) * rest * math.log(rest)
