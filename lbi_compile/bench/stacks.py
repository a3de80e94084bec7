"""Models of ``bench parallel``: a stem, equal blocks, a head, so that pipelines and regions can both divide them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lbi_compile.demo_model import TransformerBlock

LM, CLASSIFIER, LEAN = "lm", "classifier", "lean"
KINDS = (LM, CLASSIFIER, LEAN)


class LeanBlock(nn.Module):
    """`x + gelu(W norm(x))`, one `D x D` matrix and no attention: far fewer FLOPs for each byte of activations than a
    transformer's block has, so that a slow link is felt by whoever sends activations. Made for that, and named so.

    Args:
        width: Width D.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.gelu(self.linear(self.norm(x)))


class Stack(nn.Module):
    """`head(blocks(stem(x)))`, a transformer of ``layers`` blocks with nothing tied.

    ``"lm"`` reads tokens `[B, T]` and predicts one of ``classes`` at every position, causally; ``"classifier"`` reads
    patches `[B, T, P]` of 16 numbers and predicts one class for a sample; so does ``"lean"``, whose blocks are
    :class:`LeanBlock`.

    Args:
        kind: ``"lm"``, ``"classifier"`` or ``"lean"``.
        layers: Number of blocks L.
        width: Width D.
        length: Positions T.
        classes: Tokens, or classes.
    """

    position: Tensor

    def __init__(self, kind: str, *, layers: int, width: int, length: int, classes: int) -> None:
        super().__init__()
        self.kind = kind
        self.stem = nn.Embedding(classes, width) if kind == LM else nn.Linear(_PATCH, width)
        # fixed: a table that is trained would be most of a small stem, whose gradients some schedules send
        self.register_buffer("position", torch.randn(length, width) * 0.02)
        heads = max(1, width // 32)
        self.blocks = nn.ModuleList(
            LeanBlock(width) if kind == LEAN else TransformerBlock(width, heads=heads, causal=kind == LM)
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def embed(self, x: Tensor) -> Tensor:
        """From inputs to the canvas."""
        return self.stem(x) + self.position

    def read(self, h: Tensor) -> Tensor:
        """From the last block to logits."""
        h = self.norm(h)
        return self.head(h if self.kind == LM else h.mean(1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.read(x)


class Stage(nn.Module):
    """A run of a stack's blocks, with its stem where it is the first and its head where it is the last.

    Args:
        stack: The model; its parameters are shared.
        index: Of the stage.
        stages: Their number.
    """

    def __init__(self, stack: Stack, index: int, stages: int) -> None:
        super().__init__()
        layers = len(stack.blocks)
        self.first, self.last = index == 0, index == stages - 1
        self.blocks = nn.ModuleList(stack.blocks[index * layers // stages : (index + 1) * layers // stages])
        self._stack = (stack,)
        if self.first:
            self.stem = stack.stem
        if self.last:
            self.norm, self.head = stack.norm, stack.head

    def forward(self, x: Tensor) -> Tensor:
        (stack,) = self._stack
        x = stack.embed(x) if self.first else x
        for block in self.blocks:
            x = block(x)
        return stack.read(x) if self.last else x


class Sizes(NamedTuple):
    """Sizes of a stack and of its cut.

    Attributes:
        kind: ``"lm"``, ``"classifier"`` or ``"lean"``.
        layers: L.
        width: D.
        length: T.
        classes: Tokens, or classes.
        regions: K.
        r: Latent width.
        readout: Of the pooled interface.
    """

    kind: str = LM
    layers: int = 8
    width: int = 256
    length: int = 256
    classes: int = 256
    regions: int = 8
    r: int = 16
    readout: str = "auto"

    def model(self, seed: int) -> Stack:
        """The model, the same on every rank."""
        torch.manual_seed(seed)
        return Stack(self.kind, layers=self.layers, width=self.width, length=self.length, classes=self.classes)

    def batch(self, samples: int, seed: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets."""
        draw = torch.Generator().manual_seed(seed)
        targets = (samples, self.length) if self.kind == LM else (samples,)
        y = torch.randint(self.classes, targets, generator=draw)
        if self.kind == LM:
            return torch.randint(self.classes, (samples, self.length), generator=draw), y
        return torch.randn(samples, self.length, _PATCH, generator=draw), y

    @property
    def starts(self) -> list[str]:
        """Paths of the blocks that start all regions but the first."""
        return [f"blocks.{k * self.layers // self.regions}" for k in range(1, self.regions)]


_PATCH = 16


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over all targets."""
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten())


Loss = Callable[[Tensor, Tensor], Tensor]
