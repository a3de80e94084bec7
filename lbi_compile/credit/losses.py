"""Row losses of local objectives: the fused cross entropy by device, and both directions of SID's divergence."""

from __future__ import annotations

import functools
import math
import types
import warnings
from typing import Any

import torch
from torch import Tensor

from ..kernels import soft_cross_entropy_reference as reference
from .targets import Targets, negative_entropy


@functools.cache
def _triton_form() -> types.ModuleType | None:
    try:
        from ..kernels import soft_cross_entropy as form
    except ImportError as error:
        warnings.warn(
            f"a local loss got CUDA tensors, but triton cannot be imported ({type(error).__name__}: {error}). It runs"
            " as plain torch operators instead: as exact, but with more memory. Install the triton that belongs to"
            f" torch {torch.__version__}.",
            RuntimeWarning,
            stacklevel=3,
        )
        return None
    return form


def soft_cross_entropy(logits: Tensor, **given: Any) -> Tensor:
    """Row losses by the form that suits the device; see ``kernels/soft_cross_entropy_reference.py``."""
    form = _triton_form() if logits.is_cuda else None
    return (form or reference).soft_cross_entropy(logits, **given)


def forward_divergence(logits: Tensor, prior: Tensor | None, targets: Targets, alpha: float) -> Tensor:
    """``alpha KL(y || p) + (1 - alpha) KL(q || p)`` of each row, with ``p = softmax(logits)``.

    Its gradient by the logits is ``p - (alpha y + (1 - alpha) q)``: one soft-label cross entropy.

    Args:
        logits: `[N, C]`.
        prior: q, `[N, C]`; ``None`` for the uniform distribution.
        targets: y.
        alpha: Share of the target.

    Returns:
        `[N]`.
    """
    classes, rest = logits.shape[-1], 1 - alpha
    own = alpha * negative_entropy(targets, classes)
    if prior is None:
        own = own - rest * math.log(classes)
    if targets.index is not None:
        flat = alpha * targets.smoothing / classes + (rest / classes if prior is None else 0.0)
        hard = alpha * (1 - targets.smoothing)
        rows = soft_cross_entropy(
            logits, prior=prior, index=targets.index, hard=hard, flat=flat, soft=0.0 if prior is None else rest
        )
        return rows + own
    assert targets.dense is not None
    mix = alpha * targets.dense + rest * (1 / classes if prior is None else prior)
    rows = soft_cross_entropy(logits, prior=mix, soft=1.0) - torch.special.xlogy(mix, mix).sum(-1)
    if prior is not None:
        own = own + rest * torch.special.xlogy(prior, prior).sum(-1)
    return rows + own


def reverse_divergence(logits: Tensor, prior: Tensor | None, targets: Targets, alpha: float) -> Tensor:
    """``alpha KL(p || y) + (1 - alpha) KL(p || q)`` of each row; its minimiser is ``p ~ y^alpha q^(1 - alpha)``.

    Args:
        logits: `[N, C]`.
        prior: Logarithm of q, `[N, C]`; ``None`` for the uniform distribution.
        targets: y, nowhere zero.
        alpha: Share of the target.

    Returns:
        `[N]`.
    """
    classes = logits.shape[-1]
    log_p = logits.to(targets.mass.dtype).log_softmax(-1)
    aim = alpha * targets.distribution(classes).log()
    aim = aim + (1 - alpha) * (-math.log(classes) if prior is None else prior)
    p = log_p.exp()
    # a masked class has no share and an infinite logarithm
    return torch.where(p > 0, p * torch.where(p > 0, log_p - aim, 0.0), 0.0).sum(-1)
