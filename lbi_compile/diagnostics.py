"""Diagnostics of a bounded model: how large its interface Jacobians are, by themselves and multiplied."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from . import engines
from .bounded import BoundedModule
from .interfaces import Latents
from .kernels.products import product_norms
from .newton import SEQUENTIAL

# widest latent whose Jacobians are formed for the norms
WIDEST = 64


@dataclass(frozen=True, slots=True)
class JacobianNorms:
    """Spectral norms of one kind of latent.

    Attributes:
        latent: ``"token"`` or ``"chunk"`` where two kinds cross, else ``"latent"``.
        first: ``k`` of the first Jacobian `J_k = d m_{k+1} / d m_k`.
        norms: Spectral norm of each `J_k` in the order of ``k``, the largest over its independent indices.
        products: Spectral norm of the running product as adjoints meet it: first the last `J_k` alone, last the product
            of all, the largest over the indices. Infinite only where it is too large for float64.
    """

    latent: str
    first: int
    norms: tuple[float, ...]
    products: tuple[float, ...]


def jacobian_norms(bounded: BoundedModule, *args: Any, **kwargs: Any) -> tuple[JacobianNorms, ...]:
    """Spectral norms of all interface Jacobians of one call, and of their running products.

    A product that falls fast says that adjoints fade before they reach the first regions, one that grows that they
    explode. Random state stays as it is; statistics of BatchNorm in training are updated as by any call.

    Args:
        bounded: The model; samples have to be independent of each other between latents.
        args: What the model takes, like ``kwargs``.

    Returns:
        One entry for each kind of latent of which at least two cross; none beyond a width of 64.

    Raises:
        BatchCouplingError: A region mixes samples, so that there is no Jacobian for each of them.

    Example:
        >>> norms = jacobian_norms(bounded, x)[0]
        >>> print(norms.norms, norms.products[-1])
    """
    # pinned by a parallel forward, no latent would depend on another
    alone = bounded.with_engine(engines.AUTOGRAD), bounded.with_forward(SEQUENTIAL)
    with torch.random.fork_rng(), alone[0], alone[1], torch.enable_grad():
        out, taps = bounded.forward_regions(*args, **kwargs)
        del out
    for checks in bounded._checks.values():
        checks.raise_if_coupled(engines.SCAN)
    found = [_norms_of(kind, first, latents) for kind, first, latents in kinds_of(taps.m)]
    return tuple(one for one in found if one is not None)


def kinds_of(latents: Sequence[Any]) -> list[tuple[str, int, list[Tensor]]]:
    """Latents that enter regions 0 .. K-1 by kind: its name, the first region that one enters, and all of them.

    Args:
        latents: As in ``Taps.m``.
    """
    two = any(isinstance(m, Latents) for m in latents)
    kinds = {"chunk": lambda m: m.chunk, "token": lambda m: m.token} if two else {"latent": lambda m: m}
    found = []
    for name, pick in kinds.items():
        entering = [(k, value) for k, m in enumerate(latents) if m is not None and (value := pick(m)) is not None]
        if entering:
            found.append((name, entering[0][0], [value for _, value in entering]))
    return found


def _norms_of(kind: str, first: int, latents: Sequence[Tensor]) -> JacobianNorms | None:
    if len(latents) < 2 or latents[0].shape[-1] > WIDEST:
        return None
    jacobians = torch.stack([interface_jacobian(after, before) for before, after in pairwise(latents)])
    single = product_norms(jacobians.flatten(0, 1)[None])[0][0].view(jacobians.shape[:2])  # not finite: NaN, no error
    products, _ = product_norms(jacobians)
    return JacobianNorms(kind, first, tuple(single.amax(1).tolist()), tuple(reversed(products[:-1].amax(1).tolist())))


def interface_jacobian(after: Tensor, before: Tensor) -> Tensor:
    """`d m_{k+1} / d m_k` for every independent index, `[N, R, R]`, by R vector-Jacobian products.

    Args:
        after: `m_{k+1}`, `[..., R]`, computed from ``before`` with a recorded graph.
        before: `m_k`, `[..., R]`.
    """
    rows = []
    for i in range(after.shape[-1]):
        cotangent = torch.zeros_like(after)
        cotangent[..., i] = 1
        (row,) = torch.autograd.grad(after, before, cotangent, retain_graph=True, allow_unused=True)
        rows.append(torch.zeros_like(before) if row is None else row)
    return torch.stack(rows, -2).flatten(0, -3)
