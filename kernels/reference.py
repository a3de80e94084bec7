"""Plain torch twins of the scan kernels: the oracle of every other form, and what runs where none of them does.

Differentiable by autograd, and usable under FakeTensorMode with a symbolic number of indices.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from lbi_compile._torch import no_autocast

# Up to this width a product and a sum are faster than bmm on a CPU: 1.2 ms against 2.7 ms at R = 16, N = 8192 (one
# thread, torch 2.13); at R = 32 they are slower, 17 us against 11 us for N = 64.
_NARROW = 16


def suffix_scan(J: Tensor, last: Tensor, b: Tensor | None = None) -> Tensor:
    """Solve the adjoint recursion ``lam[K] = last``, ``lam[k] = J[k]^T lam[k + 1] + b[k]``.

    Args:
        J: ``[K, N, R, R]``, ``J[k, n, i, j] = d m_{k+1,i} / d m_{k,j}`` of index n.
        last: ``[N, R]``, the adjoint of the last latent; or ``[N, S, R]``, S of them that share each J.
        b: ``[K, *last.shape]``, what reaches ``m_k`` by other ways; ``None`` for nothing.

    Returns:
        ``[K + 1, *last.shape]`` in the dtype of ``last``. float64 accumulates in float64, every other dtype in float32.

    Example:
        >>> J, last = torch.full((2, 1, 1, 1), 3.0), torch.ones(1, 1)
        >>> suffix_scan(J, last).flatten().tolist()
        [9.0, 3.0, 1.0]

    Source: chain rule over the latents; kernels/README.md.
    """
    return torch.stack(_sweep(J.mT, last, b, reversed(range(J.shape[0])))[::-1])


def prefix_scan(J: Tensor, first: Tensor, b: Tensor | None = None) -> Tensor:
    """Run the linear recurrence ``m[0] = first``, ``m[k + 1] = J[k] m[k] + b[k]``; transpose of :func:`suffix_scan`.

    Args:
        J: ``[K, N, R, R]``, as for :func:`suffix_scan`.
        first: ``[N, R]`` or ``[N, S, R]``.
        b: ``[K, *first.shape]`` or ``None``.

    Returns:
        ``[K + 1, *first.shape]`` in the dtype of ``first``. float64 accumulates in float64, every other dtype in
        float32.

    Example:
        >>> J, first = torch.full((2, 1, 1, 1), 3.0), torch.ones(1, 1)
        >>> prefix_scan(J, first).flatten().tolist()
        [1.0, 3.0, 9.0]

    Source: kernels/README.md.
    """
    return torch.stack(_sweep(J, first, b, range(J.shape[0])))


def suffix_products(J: Tensor) -> Tensor:
    """All products ``P[K] = I``, ``P[k] = J[K - 1] ... J[k]``: ``P[k] = d m_K / d m_k``.

    Args:
        J: ``[K, N, R, R]``.

    Returns:
        ``[K + 1, N, R, R]`` in the dtype of ``J``. float64 accumulates in float64, every other dtype in float32.

    Example:
        >>> suffix_products(torch.full((2, 1, 1, 1), 3.0)).flatten().tolist()
        [9.0, 3.0, 1.0]
    """
    exact = _exact(J)
    product = torch.eye(J.shape[-1], dtype=exact, device=J.device).expand(J.shape[1:])
    products = [product.to(J.dtype)]
    with no_autocast():
        for k in reversed(range(J.shape[0])):
            product = product @ J[k].to(exact)
            products.append(product.to(J.dtype))
    return torch.stack(products[::-1])


def prefix_products(J: Tensor) -> Tensor:
    """All products ``Q[0] = I``, ``Q[k] = J[k - 1] ... J[0]``: ``Q[k] = d m_k / d m_0``.

    Args:
        J: ``[K, N, R, R]``.

    Returns:
        ``[K + 1, N, R, R]`` in the dtype of ``J``. float64 accumulates in float64, every other dtype in float32.

    Example:
        >>> prefix_products(torch.full((2, 1, 1, 1), 3.0)).flatten().tolist()
        [1.0, 3.0, 9.0]
    """
    exact = _exact(J)
    product = torch.eye(J.shape[-1], dtype=exact, device=J.device).expand(J.shape[1:])
    products = [product.to(J.dtype)]
    with no_autocast():
        for k in range(J.shape[0]):
            product = J[k].to(exact) @ product
            products.append(product.to(J.dtype))
    return torch.stack(products)


def _exact(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _sweep(A: Tensor, start: Tensor, b: Tensor | None, steps: Iterable[int]) -> list[Tensor]:
    """``[start, v_1, v_2, ...]`` with ``v <- A[k] v + b[k]`` for each k of ``steps``; every v as ``start``."""
    exact = _exact(start)
    v, values = start.to(exact), [start]
    with no_autocast():  # which would round the products to bfloat16
        for k in steps:
            v = _apply(A[k].to(exact), v)
            if b is not None:
                v = v + b[k]
            values.append(v.to(start.dtype))
    return values


def _apply(A: Tensor, v: Tensor) -> Tensor:
    """``A v`` per index: ``[N, R, R]``, ``[N, R]`` -> ``[N, R]``, or with S vectors per index in the middle."""
    if A.stride(0) == 0 and A.shape[0] > 1:  # expanded over N: one matrix for every index
        return v @ A[0].mT
    if v.dim() == 3:
        return torch.bmm(v, A.mT)
    if A.shape[-1] <= _NARROW:
        return (A * v.unsqueeze(-2)).sum(-1)
    return torch.bmm(v.unsqueeze(-2), A.mT).squeeze(-2)
