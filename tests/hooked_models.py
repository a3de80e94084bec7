"""Models that ``torch.export`` cannot hold in a graph: Python decides, call by call, which blocks run."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint


class Block(nn.Module):
    """Residual MLP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(gelu(self.up(self.norm(x))))


class Branching(nn.Module):
    """Features `[B, 4]` -> logits `[B, 3]`; before each block the sign of the hidden state decides what it is given."""

    def __init__(self, depth: int = 6, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Linear(4, width)
        self.blocks = nn.ModuleList(self.block(i, width) for i in range(depth))
        self.head = nn.Linear(width, 3)
        self.path: list[str] = []

    def block(self, i: int, width: int) -> nn.Module:
        return Block(width)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.between(self.stem(x)))

    def between(self, x: Tensor) -> Any:
        path = []
        for block in self.blocks:
            if x.mean() > 0:
                x = block(x)
                path.append("+")
            else:
                x = block(x) * 0.5
                path.append("-")
        self.path = path
        return x


class EarlyExit(Branching):
    """Stops after the first block whose output is large enough; ``limit`` says how large."""

    limit = 1e9

    def between(self, x: Tensor) -> Tensor:
        self.path = []
        for i, block in enumerate(self.blocks):
            x = block(x)
            self.path.append(str(i))
            if x.abs().max() > self.limit:
                break
        return x


class LayerDrop(Branching):
    """Skips blocks in training, by Python's random numbers; ``dropped`` names them instead where it is set."""

    rate = 0.4
    dropped: set[int] | None = None

    def between(self, x: Tensor) -> Tensor:
        self.path = []
        for i, block in enumerate(self.blocks):
            draws = self.dropped is None and self.training
            if i not in (self.dropped or ()) and not (draws and random.random() < self.rate):
                x = block(x)
                self.path.append(str(i))
        return x


class Looping(Branching):
    """Runs all blocks again and again, as often as the data says."""

    def between(self, x: Tensor) -> Tensor:
        self.path = []
        for _ in range(1 + int(x.detach().abs().sum()) % 3):
            for i, block in enumerate(self.blocks):
                x = block(x)
                self.path.append(str(i))
        return x


class Skipping(Branching):
    """The last block but one reads, past two others, what the second one gave."""

    def between(self, x: Tensor) -> Tensor:
        kept = None
        for i, block in enumerate(self.blocks):
            if i == len(self.blocks) - 2:
                assert kept is not None
                x = x + kept
            x = block(x) if x.mean() > 0 else block(-x)
            kept = x if i == 1 else kept
        return x


class Experts(Branching):
    """Blocks side by side: none reads what another one gives."""

    def between(self, x: Tensor) -> Tensor:
        return sum((block(x) for block in self.blocks if x.mean() > -1e9), torch.zeros(()))


class Twice(Branching):
    """Two passes through the same blocks, the second on a value of its own."""

    def between(self, x: Tensor) -> Tensor:
        other = x.flip(-1)
        for block in self.blocks:
            x = block(x) if x.mean() > 0 else block(-x)
        for block in self.blocks:
            other = block(other)
        return x + other


class Checkpointed(Branching):
    """Recomputes its blocks in the backward."""

    reentrant = False

    def between(self, x: Tensor) -> Any:
        for block in self.blocks:
            x = checkpoint(block, x if x.mean() > 0 else -x, use_reentrant=self.reentrant)
        return x


class Written(Block):
    """Writes over what it is given."""

    def forward(self, x: Tensor) -> Tensor:
        x += self.down(gelu(self.up(self.norm(x.clone()))))
        return x


class InPlace(Branching):
    """Blocks that write over the hidden state, which the first of them shares with the stem."""

    def block(self, i: int, width: int) -> nn.Module:
        return Written(width)

    def between(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            if x.mean() > -1e9:
                x = block(x)
        return x


@dataclass
class Hidden:
    """What ``Dressed`` blocks give."""

    label: str
    state: Tensor
    norm: Tensor


class DressedBlock(Block):
    def forward(self, mask: Tensor, *, options: dict[str, Any]) -> Hidden:
        out = super().forward(options["state"])
        return Hidden("hidden", out, out.norm())


class Dressed(Branching):
    """Hidden states inside keyword arguments and dataclasses."""

    def block(self, i: int, width: int) -> nn.Module:
        return DressedBlock(width)

    def between(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            if x.mean() > -1e9:
                x = block(torch.ones(2, dtype=torch.long), options={"state": x}).state
        return x


class CausalBlock(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, width: int, causal: bool) -> None:
        super().__init__()
        self.norm, self.mix, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = Block(width)
        self.causal = causal

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        q, k, v = (part.unsqueeze(1) for part in self.mix(self.norm(x)).chunk(3, -1))
        mixed = scaled_dot_product_attention(q, k, v, is_causal=self.causal).squeeze(1)
        return self.mlp(x + self.out(mixed)), None


class LanguageModel(nn.Module):
    """Tokens `[B, T]` -> logits `[B, T, 11]`; stops early where the hidden states of a batch are large."""

    limit = 1e9

    def __init__(self, depth: int = 4, width: int = 8, causal: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, width)
        self.layers = nn.ModuleList(CausalBlock(width, causal) for _ in range(depth))
        self.head = nn.Linear(width, 11)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x, _ = layer(x)
            if x.abs().max() > self.limit:
                break
        return self.head(x)


class NoList(nn.Module):
    """A branch, and no list of blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Block(4), Block(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.second(x) if x.mean() > 0 else x
