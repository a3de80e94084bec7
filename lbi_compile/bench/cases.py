"""The models of ``bench step`` and ``bench transform``: deep, narrow, and made of equal layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lbi_compile.demo_model import CausalTransformer
from lbi_compile.errors import OptionError

MLP, TRANSFORMER = "mlp", "transformer"
NAMES = (MLP, TRANSFORMER)
CLASSES = 10


class Shape(NamedTuple):
    """Sizes of a model and of its cut: layers L, width D, regions K, latent width R."""

    layers: int
    width: int
    regions: int
    r: int


DEFAULTS = {MLP: Shape(256, 64, 64, 4), TRANSFORMER: Shape(48, 64, 8, 16)}
VOCABULARY = 256


class Layer(nn.Module):
    """`x + GELU(Linear(x))`, `[B, D]` -> `[B, D]`; small steps, so that hundreds in turn keep to one scale."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        nn.init.normal_(self.linear.weight, std=1 / math.sqrt(width * depth))

    def forward(self, x: Tensor) -> Tensor:
        return x + F.gelu(self.linear(x))


class ResidualMLP(nn.Module):
    """A classifier: linear stem, residual layers, linear head; `[B, 2 D]` -> `[B, 10]`.

    Args:
        width: Width D of every layer; the input is twice as wide, so that it is no canvas.
        layers: Number of residual layers.

    Example:
        >>> ResidualMLP(width=8, layers=3)(torch.zeros(2, 16)).shape
        torch.Size([2, 10])
    """

    def __init__(self, *, width: int, layers: int) -> None:
        super().__init__()
        self.stem = nn.Linear(2 * width, width)
        self.layers = nn.ModuleList(Layer(width, layers) for _ in range(layers))
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class Size(NamedTuple):
    """Sizes of one cell: batch ``B`` and, where the case has positions, length ``T``."""

    batch: int
    length: int | None = None


class Case(NamedTuple):
    """A model, how it is cut, and what it is fed with.

    Attributes:
        name: ``"mlp"`` or ``"transformer"``.
        layers: Number of layers.
        width: Width D.
        regions: Number of regions K; a divisor of ``layers``, so that regions are equal.
        r: Latent width.
        interface: ``"pooled"`` or ``"token"``.
        size: Sizes of the inputs.
    """

    name: str
    layers: int
    width: int
    regions: int
    r: int
    interface: str
    size: Size

    @property
    def starts(self) -> list[str]:
        """Paths of the modules that start the second and every later region."""
        prefix = "layers" if self.name == MLP else "blocks"
        return [f"{prefix}.{k * self.layers // self.regions}" for k in range(1, self.regions)]

    def model(self, *, dtype: torch.dtype, device: torch.device, seed: int = 0) -> nn.Module:
        """The dense model, with the same random numbers on every device; the global generators stay as they are."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if self.name == MLP:
                made: nn.Module = ResidualMLP(width=self.width, layers=self.layers)
            else:
                assert self.size.length is not None
                heads = max(1, self.width // 16)
                made = CausalTransformer(
                    vocabulary=VOCABULARY,
                    length=max(self.size.length, _EXAMPLE.length or 0),
                    width=self.width,
                    depth=self.layers,
                    heads=heads,
                )
        return made.to(dtype=dtype, device=device)

    def inputs(self, *, dtype: torch.dtype, device: torch.device, seed: int = 1, size: Size | None = None) -> Tensor:
        """Random inputs: features `[B, 2 D]` of ``dtype``, or tokens `[B, T]`."""
        size, draw = size or self.size, torch.Generator().manual_seed(seed)
        if self.name == MLP:
            return torch.randn(size.batch, 2 * self.width, generator=draw).to(dtype=dtype, device=device)
        assert size.length is not None
        return torch.randint(VOCABULARY, (size.batch, size.length), generator=draw).to(device)

    def example(self, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Inputs to capture the model with, of other sizes than those that are timed."""
        return self.inputs(dtype=dtype, device=device, seed=2, size=_EXAMPLE)

    def loss(self, *, device: torch.device, seed: int = 3) -> Callable[[Tensor], Tensor]:
        """Cross entropy with random targets, a function of the logits."""
        classes = CLASSES if self.name == MLP else VOCABULARY
        count = self.size.batch * (self.size.length or 1)
        targets = torch.randint(classes, (count,), generator=torch.Generator().manual_seed(seed)).to(device)
        return lambda logits: F.cross_entropy(logits.flatten(0, -2), targets)


# Neither size is one, and they are not equal: a capture would fix them.
_EXAMPLE = Size(2, 3)


def make(name: str, shape: Shape, *, sizes: Sequence[Size], interface: str | None = None) -> tuple[Case, ...]:
    """One case for each size.

    Args:
        name: ``"mlp"`` or ``"transformer"``.
        shape: Sizes of the model and of its cut.
        sizes: Sizes of the inputs.
        interface: By default pooled for ``"mlp"`` and token for ``"transformer"``.

    Raises:
        OptionError: The layers do not fall into equal regions.
    """
    if shape.layers % shape.regions:
        raise OptionError(
            f"{shape.layers} layers and {shape.regions} regions",
            expected="a number of regions that divides that of the layers, so that all regions are equal",
            do="choose for example --layers 256 --regions 64",
        )
    chosen = interface or ("pooled" if name == MLP else "token")
    return tuple(Case(name, *shape, chosen, size) for size in sizes)
