"""What earlier calls of a bounded model tell about the latents of the next one."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Weight of the last call in the running moments: weights move, and with them the latents.
NEWEST = 0.1
# Ridge of the regression, as a share of the mean variance: fewer samples than numbers are then no trouble.
RIDGE = 1e-2
# A canvas wider than this is no feature: the regression solves for as many numbers squared.
WIDEST = 1024


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
    latent on features of the samples: `m_1`, which one region gives exactly, and the canvas; its moments are running
    means over the calls before. Where a call has the very inputs of the one before it, the guess is their latents; the
    first call of all takes `m_1` everywhere.
    """

    def __init__(self) -> None:
        self._moments: _Moments | None = None
        self._features: Tensor | None = None  # [N, P] of the call that a guess was made for
        self._last: Tensor | None = None  # [K - 1, ..., R]
        self._seen: _Seen | None = None

    def guess(
        self,
        leaves: list[Any],
        first: Callable[[], tuple[Tensor, Tensor]],
        latents: int,
        *,
        agree: Callable[[bool], bool] = bool,
    ) -> Tensor:
        """A guess of all latents.

        Args:
            leaves: Inputs of the call.
            first: Computes `m_1`, `[..., R]`, and the canvas, `[B, ..., D]`.
            latents: How many there are.
            agree: Is told whether the inputs are those of the call before, and says what all who guess are to take.

        Returns:
            `[K - 1, ..., R]`, in float32 where latents have fewer bits.
        """
        if agree(self._seen is not None and self._seen.same(leaves)):
            assert self._last is not None
            self._features = None
            return self._last
        start, canvas = first()
        start = start.to(torch.promote_types(start.dtype, torch.float32))
        constant = start.expand(latents, *start.shape).clone()
        self._features = features(start, canvas)
        if self._moments is None or self._moments.latents.shape[1] != self._features.shape[1]:
            return constant
        guess = self._moments.predict(self._features).view(constant.shape)
        guess[0] = start
        return torch.where(guess.isfinite(), guess, constant)

    def keep(self, leaves: list[Any], latents: Tensor) -> None:
        """Remember the latents of the call that was guessed last, `[K - 1, ..., R]`."""
        self._last, self._seen = latents, _Seen(leaves)
        if self._features is None or not len(self._features):
            return
        new = _Moments.of(self._features, latents.flatten(1, -2))
        same = self._moments is not None and self._moments.latents.shape == new.latents.shape
        self._moments = self._moments.lerp(new) if self._moments is not None and same else new


def features(start: Tensor, canvas: Tensor) -> Tensor:
    """What later latents are guessed from: `m_1` and, where it is of the same samples, the canvas.

    Args:
        start: `m_1`, `[..., R]`.
        canvas: `[B, ..., D]`; its mean over the axes between, with mean 0 and variance 1 in each sample.

    Returns:
        `[N, P]`, P = R + D or R.
    """
    flat = start.reshape(-1, start.shape[-1])
    mean = canvas.detach().to(start.dtype).flatten(1, -2).mean(1) if canvas.dim() > 2 else canvas.detach()
    if mean.dim() != 2 or len(mean) != len(flat) or mean.shape[1] > WIDEST:
        return flat
    return torch.cat([flat, F.layer_norm(mean.to(start.dtype), mean.shape[1:])], 1)


class _Moments(NamedTuple):
    """Moments of features `x` `[N, P]` and latents `m` `[K - 1, N, R]` over samples.

    Attributes:
        x: Mean of features, `[P]`.
        m: Mean of latents, `[K - 1, R]`.
        own: Covariance of features, `[P, P]`.
        latents: Covariance of features with latents, `[K - 1, P, R]`.
    """

    x: Tensor
    m: Tensor
    own: Tensor
    latents: Tensor

    @classmethod
    def of(cls, x: Tensor, m: Tensor) -> _Moments:
        x_mean, m_mean = x.mean(0), m.mean(1)
        centred = (x - x_mean).mT / len(x)
        return cls(x_mean, m_mean, centred @ (x - x_mean), centred @ (m - m_mean[:, None]))

    def lerp(self, new: _Moments) -> _Moments:
        return _Moments(*(old.lerp(value, NEWEST) for old, value in zip(self, new, strict=True)))

    def predict(self, x: Tensor) -> Tensor:
        """The regression of latents on features, `[K - 1, N, R]`; their mean where it cannot be solved."""
        ridge = RIDGE * self.own.diagonal().mean().clamp(min=torch.finfo(self.own.dtype).tiny)
        eye = torch.eye(len(self.own), dtype=self.own.dtype, device=self.own.device)
        factor, failed = torch.linalg.cholesky_ex(self.own + ridge * eye)
        slopes = torch.cholesky_solve(self.latents, factor.expand(len(self.latents), -1, -1))
        slopes = torch.where(failed > 0, torch.zeros_like(slopes), slopes)
        return self.m[:, None] + (x - self.x) @ slopes
