"""Scikit-learn's digits as classification tasks: turned, shifted and blurred by noise, or row by row.

The 1,797 pictures are split once into those to train on, to choose by (validation) and to judge by (test); no picture
lends its variants to two of them.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from data import package
from torch import Tensor

from lbi_compile.errors import OptionError

CLASSES = 10
SPLITS = {"train": 1000, "validation": 300, "test": 497}
_SEEDS = {"train": 1, "validation": 2, "test": 3}


@dataclass(frozen=True, slots=True)
class Split:
    """Pictures and their classes.

    Attributes:
        x: Pictures `[N, size * size]`, or rows `[N, T, F]`.
        y: Classes `[N]`.
    """

    x: Tensor
    y: Tensor


@functools.cache
def pictures() -> dict[str, Split]:
    """The original pictures `[N, 8, 8]` from 0 to 1, by split.

    Raises:
        PackageError: ``scikit-learn`` is not installed.

    Example:
        >>> {name: tuple(split.x.shape) for name, split in pictures().items()}
        {'train': (1000, 8, 8), 'validation': (300, 8, 8), 'test': (497, 8, 8)}
    """
    found = package("sklearn.datasets", needed_for="its digits").load_digits()
    x, y = torch.tensor(found.images / 16, dtype=torch.float32), torch.tensor(found.target)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0)).split(list(SPLITS.values()))
    return {name: Split(x[chosen], y[chosen]) for name, chosen in zip(SPLITS, order, strict=True)}


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnedDigits:
    """Variants of the digits: turned, resized, shifted, with noise, on a larger square.

    Attributes:
        size: Pixels of a side.
        degrees: Turned by up to this much either way.
        noise: Standard deviation of what is added to every pixel.
        copies: Variants of each picture to train on; the other splits have ten of each.
        wrong: Share of the training *pictures* whose class is replaced by another one; their variants share it, so that
            it cannot be averaged away.
        seed: Of the wrong classes.
    """

    size: int = 10
    degrees: float = 20.0
    noise: float = 0.1
    copies: int = 40
    wrong: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_wrong(self.wrong)
        if self.size < 1 or self.copies < 1:
            raise OptionError(
                f"size={self.size}, copies={self.copies}", expected="at least 1 of each", do="pass larger numbers"
            )

    @property
    def features(self) -> int:
        """Pixels of a picture F."""
        return self.size**2

    @property
    def classes(self) -> int:
        """Classes C."""
        return CLASSES

    def split(self, name: str) -> Split:
        """One split as `[N, F]`, every pixel at mean 0 and deviation 1 over the training split.

        Args:
            name: ``"train"``, ``"validation"`` or ``"test"``.
        """
        base = self._variants("train")
        mean, deviation = base.x.mean(0), base.x.std(0) + 1e-3
        made = base if name == "train" else self._variants(name)
        y = self._with_wrong(made.y) if name == "train" else made.y
        return Split((made.x - mean) / deviation, y)

    def _variants(self, name: str) -> Split:
        original, copies = pictures()[name], self.copies if name == "train" else 10
        draw = torch.Generator().manual_seed(_SEEDS[name])
        x, y = original.x.repeat(copies, 1, 1), original.y.repeat(copies)
        count = len(y)

        def between(low: float, high: float, *shape: int) -> Tensor:
            return low + (high - low) * torch.rand(count, *shape, generator=draw)

        angle, scale = torch.deg2rad(between(-self.degrees, self.degrees)), between(0.8, 1.2)
        shift = between(-0.35, 0.35, 2)
        cos, sin = angle.cos() / scale, angle.sin() / scale
        turn = torch.stack((cos, -sin, shift[:, 0], sin, cos, shift[:, 1]), 1).view(-1, 2, 3) * (self.size / 8)
        grid = F.affine_grid(turn, [count, 1, self.size, self.size], align_corners=False)
        seen = F.grid_sample(x.unsqueeze(1), grid, align_corners=False).flatten(1)
        return Split(seen + self.noise * torch.randn(seen.shape, generator=draw), y)

    def _with_wrong(self, y: Tensor) -> Tensor:
        other = wrong_classes(SPLITS["train"], self.wrong, classes=CLASSES, seed=self.seed)
        return (y + other.repeat(self.copies)) % CLASSES


def check_wrong(share: float) -> None:
    """Refuse what is no share of wrong classes.

    Raises:
        OptionError: It is none.
    """
    if not 0 <= share < 1:
        raise OptionError(f"wrong={share}", expected="a share from 0 to below 1", do="pass for example 0.2")


def wrong_classes(count: int, share: float, *, classes: int, seed: int) -> Tensor:
    """What to add to classes, modulo C, so that some become another one: `[N]`, 0 for those that stay.

    Args:
        count: Pictures N.
        share: Chance of a picture to get a wrong class.
        classes: Classes C.
        seed: Of the draw.
    """
    draw = torch.Generator().manual_seed(seed)
    chosen = torch.rand(count, generator=draw) < share
    return torch.randint(1, classes, (count,), generator=draw) * chosen


def rows(name: str) -> Split:
    """Digits as sequences of their rows, `[N, 8, 8]`, at mean 0 and deviation 1 over the training split.

    Args:
        name: ``"train"``, ``"validation"`` or ``"test"``.
    """
    base, made = pictures()["train"].x, pictures()[name]
    return Split((made.x - base.mean()) / base.std(), made.y)
