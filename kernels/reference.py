"""Plain torch twins of the scan kernels: the oracle of the Triton form, and what runs where it does not.

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
        last: ``[N, R]``, the adjoint of the last latent.
        b: ``[K, N, R]``, what reaches ``m_k`` by other ways; ``None`` for nothing.

    Returns:
        ``[K + 1, N, R]`` in the dtype of ``last``. float64 accumulates in float64, every other dtype in float32.

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
        first: ``[N, R]``.
        b: ``[K, N, R]`` or ``None``.

    Returns:
        ``[K + 1, N, R]`` in the dtype of ``first``. float64 accumulates in float64, every other dtype in float32.

    Example:
        >>> J, first = torch.full((2, 1, 1, 1), 3.0), torch.ones(1, 1)
        >>> prefix_scan(J, first).flatten().tolist()
        [1.0, 3.0, 9.0]

    Source: kernels/README.md.
    """
    return torch.stack(_sweep(J, first, b, range(J.shape[0])))


def _sweep(A: Tensor, start: Tensor, b: Tensor | None, steps: Iterable[int]) -> list[Tensor]:
    """``[start, v_1, v_2, ...]`` with ``v <- A[k] v + b[k]`` for each k of ``steps``; every v ``[N, R]``."""
    exact = torch.float64 if start.dtype == torch.float64 else torch.float32
    v, values = start.to(exact), [start]
    with no_autocast():  # which would round the products to bfloat16
        for k in steps:
            v = _apply(A[k].to(exact), v)
            if b is not None:
                v = v + b[k]
            values.append(v.to(start.dtype))
    return values


def _apply(A: Tensor, v: Tensor) -> Tensor:
    """``A v`` per index: ``[N, R, R]``, ``[N, R]`` -> ``[N, R]``."""
    if A.stride(0) == 0 and A.shape[0] > 1:  # expanded over N: one matrix for every index
        return v @ A[0].mT
    if A.shape[-1] <= _NARROW:
        return (A * v.unsqueeze(-2)).sum(-1)
    return torch.bmm(v.unsqueeze(-2), A.mT).squeeze(-2)
