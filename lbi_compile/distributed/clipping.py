"""Clipping gradients over the whole model, of which every rank holds a part."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..errors import DistributedError
from .module import RegionParallel


def region_parallel(module: nn.Module) -> RegionParallel:
    """The region-parallel model inside a wrapper such as ``DistributedDataParallel``.

    Raises:
        DistributedError: There is none.
    """
    for inner in module.modules():
        if isinstance(inner, RegionParallel):
            return inner
    raise DistributedError(
        f"a {type(module).__name__} without a region-parallel model in it",
        expected="what parallelize returned, or a wrapper around it",
        do="call parallelize first",
    )


@torch.no_grad()
def clip_grad_norm_(module: nn.Module, max_norm: float) -> Tensor:
    """Scale the gradients of the whole model so that their common 2-norm is at most ``max_norm``.

    Gradients of parameters that every rank holds count once. Under FSDP the parts of a gradient are put together first.

    Args:
        module: What ``parallelize`` returned, or a wrapper around it. Call it on every rank.
        max_norm: The bound.

    Returns:
        The norm before, the same on every rank; as ``torch.nn.utils.clip_grad_norm_`` of one process gives it.

    Example:
        >>> loss.backward()
        >>> norm = lbi_compile.distributed.clip_grad_norm_(parallel, 1.0)
        >>> optimizer.step()
    """
    parallel = region_parallel(module)
    own: list[Tensor] = []
    common: list[Tensor] = []
    for name, p in parallel.named_parameters():
        if p.grad is not None:
            (common if parallel.placement.home[name] is None else own).append(_whole(p.grad).norm())
    device = next(parallel.parameters()).device
    squares = [
        torch.stack(norms).square().sum() if norms else torch.zeros((), device=device) for norms in (own, common)
    ]
    dtype = torch.promote_types(torch.float32, max((s.dtype for s in squares), key=lambda d: d.itemsize))
    total = parallel.ranks.all_reduce(squares[0].to(dtype), "gradient norm") if parallel.ranks.size > 1 else squares[0]
    norm = (total + squares[1]).sqrt()
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for p in parallel.parameters():
        if p.grad is not None:
            p.grad.mul_(scale.to(p.grad.dtype))
    return norm


def _whole(grad: Tensor) -> Tensor:
    """A gradient that FSDP keeps in parts, put together."""
    whole = getattr(grad, "full_tensor", None)
    return grad if whole is None else whole()
