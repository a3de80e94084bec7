"""The scans on a CUDA device: chooses a Triton form and allocates.

Importing this file needs Triton; :mod:`lbi_compile.kernels.ops` does so only when it meets a CUDA tensor. The oracle is
:mod:`lbi_compile.kernels.reference`, which has the same signatures.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from lbi_compile.kernels.chunked_form import sweep_chunks
from lbi_compile.kernels.forms import Form, choose
from lbi_compile.kernels.rows_form import sweep_rows
from lbi_compile.kernels.vector_form import sweep


def suffix_scan(J: Tensor, last: Tensor, b: Tensor | None = None, *, form: Form | None = None) -> Tensor:
    """Solve the adjoint recursion on the device; see :func:`lbi_compile.kernels.reference.suffix_scan`.

    Args:
        J: ``[K, N, R, R]``, any strides.
        last: ``[N, R]`` or ``[N, S, R]``, any strides.
        b: ``[K, *last.shape]``, any strides, or ``None``.
        form: The form to use with one vector per index, ``None`` for what :func:`~lbi_compile.kernels.forms.choose`
            says.

    Returns:
        ``[K + 1, *last.shape]``, contiguous, in the dtype of ``last``.

    Example:
        >>> suffix_scan(J.cuda(), last.cuda())  # doctest: +SKIP
    """
    return _scan(J, last, b, form, descending=True)


def prefix_scan(J: Tensor, first: Tensor, b: Tensor | None = None, *, form: Form | None = None) -> Tensor:
    """Run the linear recurrence on the device; see :func:`lbi_compile.kernels.reference.prefix_scan`.

    Args:
        J: ``[K, N, R, R]``, any strides.
        first: ``[N, R]`` or ``[N, S, R]``, any strides.
        b: ``[K, *first.shape]``, any strides, or ``None``.
        form: As for :func:`suffix_scan`.

    Returns:
        ``[K + 1, *first.shape]``, contiguous, in the dtype of ``first``.

    Example:
        >>> prefix_scan(J.cuda(), first.cuda())  # doctest: +SKIP
    """
    return _scan(J.mT, first, b, form, descending=False)


def _scan(J: Tensor, start: Tensor, b: Tensor | None, form: Form | None, *, descending: bool) -> Tensor:
    K, N, R, _ = J.shape
    out = start.new_empty((K + 1, *start.shape))
    if out.numel() == 0:
        return out
    if start.dim() == 3:
        sweep_rows(J, start, b, out, descending=descending)
        return out
    if form is None:
        form = choose(K, N, R, dtype=J.dtype, device="cuda", processors=_processors(J.device))
    if form.name == "chunked":
        sweep_chunks(J, start, b, out, chunk=form.chunk, descending=descending)
    else:
        sweep(J, start[None], b, out, chunk=max(K, 1), descending=descending)
    return out


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
