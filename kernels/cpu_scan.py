"""The scans on a CPU: one numpy call per step, straight into the result.

A step is a few hundred multiplications where indices are few, and then a torch operator costs many times what it
computes. Numpy's calls are cheaper and write where they are told (figures: README.md). The arithmetic is that of the
oracle, :mod:`lbi_compile.kernels.reference`, step by step; only the order of the sums inside one product may differ.

Nothing is kept between calls and inputs are only read, so threads may scan at once.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

# Low precision is widened this many steps at a time, so that no second copy of all Jacobians exists.
_SLAB = 64


def suffix_scan(J: Tensor, last: Tensor, b: Tensor | None = None) -> Tensor:
    """Solve the adjoint recursion; see :func:`lbi_compile.kernels.reference.suffix_scan`.

    Args:
        J: ``[K, N, R, R]``, any strides.
        last: ``[N, R]`` or ``[N, S, R]``.
        b: ``[K, *last.shape]`` or ``None``.

    Returns:
        ``[K + 1, *last.shape]``, contiguous, in the dtype of ``last``.

    Example:
        >>> suffix_scan(torch.full((2, 1, 1, 1), 3.0), torch.ones(1, 1)).flatten().tolist()
        [9.0, 3.0, 1.0]
    """
    return _scan(J, last, b, descending=True)


def prefix_scan(J: Tensor, first: Tensor, b: Tensor | None = None) -> Tensor:
    """Run the linear recurrence; see :func:`lbi_compile.kernels.reference.prefix_scan`.

    Args:
        J: ``[K, N, R, R]``, any strides.
        first: ``[N, R]`` or ``[N, S, R]``.
        b: ``[K, *first.shape]`` or ``None``.

    Returns:
        ``[K + 1, *first.shape]``, contiguous, in the dtype of ``first``.

    Example:
        >>> prefix_scan(torch.full((2, 1, 1, 1), 3.0), torch.ones(1, 1)).flatten().tolist()
        [1.0, 3.0, 9.0]
    """
    return _scan(J.mT, first, b, descending=False)


def _scan(A: Tensor, start: Tensor, b: Tensor | None, *, descending: bool) -> Tensor:
    """``v <- v A[k] + b[k]`` with v a row vector per index, over all k in the one order or the other."""
    A, start, b = A.detach(), start.detach(), None if b is None else b.detach()
    K, N, R, _ = A.shape
    exact = torch.float64 if start.dtype == torch.float64 else torch.float32
    out = start.new_empty((K + 1, *start.shape), dtype=exact)
    out[K if descending else 0] = start
    if N > 1 and A.stride(1) == 0:  # one Jacobian for every index: all of them are rows of one product
        A, N = A[:, :1], 1
    rows = list(out.view(K + 1, N, out[0].numel() // (N * R) if N else 1, R).numpy())  # each [N, S, R]
    # Without a batch axis `dot` is the cheaper call.
    if N == 1:
        rows, A, times = [row[0] for row in rows], A[:, 0], np.dot
    else:
        times = np.matmul
    slabs = range(0, K, _SLAB)
    with np.errstate(all="ignore"):  # overflow is an answer here, as in torch
        for begin in reversed(slabs) if descending else slabs:
            end = min(begin + _SLAB, K)
            matrices = list(A[begin:end].to(exact).numpy())
            added = None if b is None else list(b[begin:end].to(exact).reshape(end - begin, *rows[0].shape).numpy())
            for k in range(end - 1, begin - 1, -1) if descending else range(begin, end):
                source, target = (rows[k + 1], rows[k]) if descending else (rows[k], rows[k + 1])
                times(source, matrices[k - begin], target)
                if added is not None:
                    np.add(target, added[k - begin], target)
    return out.to(start.dtype)
