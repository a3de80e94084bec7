"""Products of many Jacobians, carried as numbers near 1 and exponents of two, so that no step leaves their range.

4,096 Jacobians of norm 1.1 multiply out to `2^563`, and of norm 0.9 to `2^-622`: beyond float32, and with norms a
little further from 1 beyond float64 as well. Plain products then give infinity, `inf * 0 = NaN` beside it, or zeros
that never grow again, even where the product of all is a modest number. Here every row of a product has an exponent of
its own, for every row is an adjoint by itself. Scaling by powers of two rounds nothing.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lbi_compile._torch import no_autocast

# Rows are kept below 2^-HEADROOM, so that a step may multiply them by the largest numbers there are.
_HEADROOM = 10
# Entries of Jacobians whose products are held at once for their norms.
_AT_ONCE = 2**22
# Powers of two that are normal numbers, with their inverses, by the dtype that accumulates.
_LARGEST = {torch.float32: 120, torch.float64: 1000}


class Scaled(NamedTuple):
    """Products of Jacobians: row i of `P[k, n]` is ``rows[k, n, i] * 2 ** exponents[k, n, i]``.

    Attributes:
        rows: ``[K + 1, N, R, R]``, float32 or float64; no row is larger than `2^-9`.
        exponents: ``[K + 1, N, R]``, whole numbers.
    """

    rows: Tensor
    exponents: Tensor

    def norms(self) -> Tensor:
        """Spectral norms of all products, ``[K + 1, N]`` in float64; infinite only where they leave its range."""
        top = self.exponents.amax(-1, keepdim=True)
        rows = _times_power(self.rows.double(), (self.exponents - top)[..., None])
        norms = torch.linalg.matrix_norm(torch.nan_to_num(rows, nan=0.0, posinf=0.0, neginf=0.0), 2)
        norms = torch.where(rows.isfinite().all(-1).all(-1), norms, torch.nan)
        return _times_power(norms, top[..., 0])


def scaled_suffix_products(J: Tensor) -> Scaled:
    """``P[K] = I``, ``P[k] = J[K - 1] ... J[k]``, out of the range of a dtype too.

    Args:
        J: ``[K, N, R, R]``. float64 accumulates in float64, every other dtype in float32.

    Example:
        >>> found = scaled_suffix_products(torch.full((4096, 1, 1, 1), 2.0))
        >>> (found.rows[0].log2() + found.exponents[0]).item()
        4096.0
    """
    exact = torch.float64 if J.dtype == torch.float64 else torch.float32
    K, N, R, _ = J.shape
    powers = _powers(exact, J.device)
    rows = (torch.eye(R, dtype=exact, device=J.device) * 2.0**-_HEADROOM).expand(N, R, R)
    exponent = torch.full((N, R), _HEADROOM, dtype=torch.int64, device=J.device)
    found, exponents = [rows], [exponent]
    with no_autocast():
        for k in reversed(range(K)):
            rows = rows @ J[k].to(exact)
            size = rows.detach().abs().amax(-1)  # [N, R]
            told = (size > 0) & size.isfinite()
            shift = torch.where(told, torch.where(told, size, 1.0).log2().floor().to(torch.int64) + _HEADROOM, 0)
            shift = shift.clamp(-_LARGEST[exact], _LARGEST[exact])
            rows = rows * powers[_LARGEST[exact] - shift][..., None]
            exponent = exponent + shift
            found.append(rows)
            exponents.append(exponent)
    return Scaled(torch.stack(found[::-1]), torch.stack(exponents[::-1]))


def suffix_products(J: Tensor) -> Tensor:
    """``P[K] = I``, ``P[k] = J[K - 1] ... J[k]``; what leaves the range of the dtype on the way may come back.

    Args:
        J: ``[K, N, R, R]``.

    Returns:
        ``[K + 1, N, R, R]`` in the dtype of ``J``. float64 accumulates in float64, every other dtype in float32.

    Example:
        >>> J = torch.tensor([1e30, 1e30, 1e-30, 1e-30]).view(4, 1, 1, 1)
        >>> [f"{value:.0e}" for value in suffix_products(J).flatten().tolist()]
        ['1e+00', '1e-30', '0e+00', '1e-30', '1e+00']
    """
    scaled = scaled_suffix_products(J)
    return _times_power(scaled.rows, scaled.exponents[..., None]).to(J.dtype)


def prefix_products(J: Tensor) -> Tensor:
    """``Q[0] = I``, ``Q[k] = J[k - 1] ... J[0]``: suffixes of the transposed Jacobians in the other order.

    Args:
        J: ``[K, N, R, R]``.

    Returns:
        ``[K + 1, N, R, R]`` in the dtype of ``J``.

    Example:
        >>> prefix_products(torch.full((2, 1, 1, 1), 3.0)).flatten().tolist()
        [1.0, 3.0, 9.0]
    """
    return suffix_products(J.mT.flip(0)).flip(0).mT


def product_norms(J: Tensor) -> tuple[Tensor, Tensor]:
    """Spectral norms of the running products from the last Jacobian on, and from the first on.

    Args:
        J: ``[K, N, R, R]``.

    Returns:
        Norms of `J[K - 1] ... J[k]`, and of `J[k - 1] ... J[0]`: each ``[K + 1, N]``, k from 0 to K, in float64.

    Example:
        >>> suffixes, prefixes = product_norms(torch.tensor([2.0, 3.0]).view(2, 1, 1, 1))
        >>> suffixes.flatten().tolist(), prefixes.flatten().tolist()
        ([6.0, 3.0, 1.0], [1.0, 2.0, 6.0])
    """
    K, N, R, _ = J.shape
    suffixes, prefixes = [], []
    for part in J.detach().split(max(_AT_ONCE // max(K * R * R, 1), 1), 1) if N else (J.detach(),):
        wide = part.double()
        suffixes.append(scaled_suffix_products(wide).norms())
        prefixes.append(scaled_suffix_products(wide.mT.flip(0)).norms().flip(0))
    return torch.cat(suffixes, 1), torch.cat(prefixes, 1)


def _powers(dtype: torch.dtype, device: torch.device) -> Tensor:
    """`2^-L .. 2^L`; a table, for `exp2` and `ldexp` of whole numbers need not be exact on every device."""
    largest = _LARGEST[dtype]
    return torch.tensor([2.0**e for e in range(-largest, largest + 1)], dtype=dtype, device=device)


def _times_power(x: Tensor, exponent: Tensor) -> Tensor:
    """``x * 2 ** exponent``, infinite or 0 where that leaves the range, and 0 wherever ``x`` is."""
    largest = _LARGEST[x.dtype]
    powers = _powers(x.dtype, x.device)
    exponent = exponent.clamp(-3 * largest, 3 * largest)
    for _ in range(3):  # three factors that are normal numbers: with one, 0 * inf would be NaN
        part = exponent.clamp(-largest, largest)
        x, exponent = x * powers[part + largest], exponent - part
    return x
