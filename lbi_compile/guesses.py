"""What earlier calls of a bounded model tell about the latents of the next one."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Weight of the last call in the running moments: weights move, and with them the latents.
NEWEST = 0.1
# Ridge of the regression, as a share of the mean variance: fewer samples than numbers are then no trouble.
RIDGE = 1e-2


class _Seen:
    """The inputs of a call, to tell whether the next one has the same."""

    def __init__(self, leaves: list[Any]) -> None:
        self._leaves = [
            (weakref.ref(leaf), leaf._version) if isinstance(leaf, Tensor) and not leaf.is_inference() else leaf
            for leaf in leaves
        ]

    def same(self, leaves: list[Any]) -> bool:
        """These very tensors, and none was written to since."""
        return len(leaves) == len(self._leaves) and all(map(_is_leaf, self._leaves, leaves))


def _is_leaf(seen: Any, leaf: Any) -> bool:
    if isinstance(leaf, Tensor):
        return isinstance(seen, tuple) and seen[0]() is leaf and seen[1] == leaf._version
    return not isinstance(seen, tuple) and seen is leaf


class Memory:
    """The guess of all latents of a call.

    Latents are per sample, and samples change from step to step. So the guess is a linear regression of every later
    latent on `m_1`, which one region gives exactly; its moments are running means over the calls before. Where a call
    has the very inputs of the one before it, the guess is their latents; the first call of all takes `m_1` everywhere.
    """

    def __init__(self) -> None:
        self._mean: Tensor | None = None  # [K - 1, R]
        self._moments: Tensor | None = None  # [K - 1, R, R]: of m_1 with every latent, the first of all its own
        self._last: Tensor | None = None  # [K - 1, ..., R]
        self._seen: _Seen | None = None

    def guess(self, leaves: list[Any], first: Callable[[], Tensor], latents: int) -> Tensor:
        """A guess of all latents.

        Args:
            leaves: Inputs of the call.
            first: Computes `m_1`, `[..., R]`.
            latents: How many there are.

        Returns:
            `[K - 1, ..., R]`, in float32 where latents have fewer bits.
        """
        if self._last is not None and self._seen is not None and self._seen.same(leaves):
            return self._last
        start = first()
        start = start.to(torch.promote_types(start.dtype, torch.float32))
        constant = start.expand(latents, *start.shape).clone()
        if self._mean is None or self._moments is None:
            return constant
        flat = start.reshape(-1, start.shape[-1]) - self._mean[0]  # [N, R]
        guess = (self._mean[:, None] + flat @ self._slopes(self._moments)).view(constant.shape)
        guess[0] = start
        return torch.where(guess.isfinite(), guess, constant)

    @staticmethod
    def _slopes(moments: Tensor) -> Tensor:
        """`C_11^{-1} C_1k` with a ridge, `[K - 1, R, R]`."""
        own = moments[0]
        ridge = RIDGE * own.diagonal().mean().clamp(min=torch.finfo(own.dtype).tiny)
        eye = torch.eye(own.shape[-1], dtype=own.dtype, device=own.device)
        factor, failed = torch.linalg.cholesky_ex(own + ridge * eye)
        slopes = torch.cholesky_solve(moments, factor.expand_as(moments))
        return torch.where(failed > 0, eye, slopes)

    def keep(self, leaves: list[Any], latents: Tensor) -> None:
        """Remember the latents of a call, `[K - 1, ..., R]`."""
        self._last, self._seen = latents, _Seen(leaves)
        flat = latents.flatten(1, -2)  # [K - 1, N, R]
        if not flat.shape[1]:
            return
        mean = flat.mean(1)
        moments = (flat[0] - mean[0]).mT @ (flat - mean[:, None]) / flat.shape[1]
        if self._mean is None or self._moments is None:
            self._mean, self._moments = mean, moments
        else:
            self._mean, self._moments = self._mean.lerp(mean, NEWEST), self._moments.lerp(moments, NEWEST)
