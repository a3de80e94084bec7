"""What the scans mean, written out as loops over Python numbers; shared by the CPU, interpreter and GPU tests."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

R_SIZES = (1, 3, 4, 16, 33, 64)
K_SIZES = (1, 2, 5, 37)
N_SIZES = (1, 3, 17)


def problem(
    K: int, N: int, R: int, *, dtype: torch.dtype = torch.float64, b: bool = True, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Random J ``[K, N, R, R]``, end ``[N, R]`` and b ``[K, N, R]``; scaled so that products of J stay near 1."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return draw(K, N, R, R) / R**0.5, draw(N, R), draw(K, N, R) if b else None


def hard_problems(K: int) -> Iterator[tuple[str, Tensor, Tensor, Tensor | None]]:
    """float32 problems whose adjoints are tame while products of their Jacobians are not; R = 2."""

    def everywhere(*rows: list[float]) -> Tensor:
        return torch.tensor(rows).expand(K, 1, 2, 2).contiguous()

    noise = torch.randn(K, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    unit, ones, one_each = torch.tensor([[0.0, 1.0]]), torch.ones(1, 2), torch.ones(K, 1, 2)
    wild = everywhere([10.0, 0.0], [0.0, 1.0])
    yield "overflow of a product", wild, unit, None
    yield "growth that cancels between rows", everywhere([2.0, 1.0], [1.0, 2.0]), torch.tensor([[1.0, -1.0]]), None
    yield "growth that b cancels", everywhere([1.75, 0.0], [0.0, 1.75]), ones, -0.75 * one_each
    yield "underflow of what the adjoint is", everywhere([1.0, 0.0], [0.0, 0.25]), unit * 1e30, None
    scales = torch.tensor([1e-25, 1e25]).repeat(K)[:K, None, None, None]
    yield "huge and tiny by turns", everywhere([1.0, 1.0], [-1.0, 1.0]) * scales / 2**0.5, ones, None
    yield "contraction", noise * 0.01, ones, one_each
    yield "no dependence", noise * 0, ones, one_each
    tame = torch.eye(2) * 0.9 + noise * 0.1
    yield "one wild index", torch.cat([tame, wild], 1), unit.expand(2, 2), None


def suffix_definition(J: Tensor, last: Tensor, b: Tensor | None) -> Tensor:
    """``lam[k, n, j] = sum_i J[k, n, i, j] lam[k + 1, n, i] + b[k, n, j]`` in float64."""
    K, N, R, _ = J.shape
    Js, values = J.double().tolist(), [last.double().tolist()]
    bs = torch.zeros(K, N, R).tolist() if b is None else b.double().tolist()
    for k in reversed(range(K)):
        after = values[0]
        values.insert(
            0,
            [[sum(Js[k][n][i][j] * after[n][i] for i in range(R)) + bs[k][n][j] for j in range(R)] for n in range(N)],
        )
    return torch.tensor(values, dtype=torch.float64).reshape(K + 1, N, R)


def prefix_definition(J: Tensor, first: Tensor, b: Tensor | None) -> Tensor:
    """``m[k + 1, n, i] = sum_j J[k, n, i, j] m[k, n, j] + b[k, n, i]`` in float64."""
    K, N, R, _ = J.shape
    Js, values = J.double().tolist(), [first.double().tolist()]
    bs = torch.zeros(K, N, R).tolist() if b is None else b.double().tolist()
    for k in range(K):
        before = values[-1]
        values.append(
            [[sum(Js[k][n][i][j] * before[n][j] for j in range(R)) + bs[k][n][i] for i in range(R)] for n in range(N)]
        )
    return torch.tensor(values, dtype=torch.float64).reshape(K + 1, N, R)


def relative_error(got: Tensor, exact: Tensor) -> float:
    """Largest error of one boundary's values over the largest of these values; NaN counts as infinite."""
    got, exact = got.double().cpu().flatten(1), exact.double().cpu().flatten(1)
    error = ((got - exact).abs().amax(1) / exact.abs().amax(1)).max().item()
    return error if error == error else float("inf")
