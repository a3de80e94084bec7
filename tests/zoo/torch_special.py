"""Plain torch models with something to trip over: operators of their own, sharing, state, recomputation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.zoo.entry import FUNCTION, Entry, Made

BATCH, FEATURES, WIDTH, DEPTH = 3, 10, 32, 8


class Residual(nn.Module):
    """Features `[B, F]` -> stem, `DEPTH` residual blocks, classifier."""

    def __init__(self, block: Callable[[], nn.Module], *, depth: int = DEPTH) -> None:
        super().__init__()
        self.stem, self.out = nn.Linear(FEATURES, WIDTH), nn.Linear(WIDTH, 5)
        self.blocks = nn.ModuleList(block() for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.out(x)


@torch.library.custom_op("lbi_zoo::softsign", mutates_args=())
def softsign(x: Tensor) -> Tensor:
    """`x / (1 + |x|)`, as an operator torch knows nothing about."""
    return x / (1 + x.abs())


@softsign.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("lbi_zoo::softsign_backward", mutates_args=())
def softsign_backward(gradient: Tensor, x: Tensor) -> Tensor:
    """Gradient of ``softsign``; opaque as well."""
    return gradient / (1 + x.abs()).square()


@softsign_backward.register_fake
def _(gradient: Tensor, x: Tensor) -> Tensor:
    return torch.empty_like(gradient)


def _remember(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


softsign.register_autograd(
    lambda ctx, gradient: softsign_backward(gradient, *ctx.saved_tensors), setup_context=_remember
)


class CustomOp(nn.Module):
    """A block around an operator registered with ``torch.library.custom_op``."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(softsign(self.inner(x)))


class _Clipped(torch.autograd.Function):
    """Straight-through rounding: its gradient is not that of its forward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return (4 * x).round() / 4

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return gradient * (x.abs() < 1)


class AutogradFunction(nn.Module):
    """A block around an ``autograd.Function`` of the old style (``ctx`` in ``forward``)."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(_Clipped.apply(self.inner(x)))


def _mlp() -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 48), nn.GELU(), nn.Dropout(0.1), nn.Linear(48, WIDTH))


class TiedBlocks(nn.Module):
    """Eight passes through one block, and an output layer that is the stem transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block = nn.Linear(FEATURES, WIDTH, bias=False), _mlp()

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for _ in range(DEPTH):
            x = x + self.block(x)
        return x @ self.stem.weight


class Checkpointed(nn.Module):
    """Blocks that are recomputed in the backward."""

    def __init__(self) -> None:
        super().__init__()
        self.block = _mlp()

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.block, x, use_reentrant=False)  # type: ignore[return-value]


class Running(nn.Module):
    """Normalises by buffers that its forward updates, by assignment and in place."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("scale", torch.ones(WIDTH))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        h = self.linear(x).tanh()
        if self.training:
            self.scale = 0.9 * self.scale + 0.1 * h.detach().square().mean(0).sqrt()
            self.calls += 1
        return h / (self.scale + 1e-3)


class Frozen(nn.Module):
    """A frozen lower half under a trained upper half."""

    def __init__(self) -> None:
        super().__init__()
        self.lower, self.upper = Residual(_mlp, depth=4), nn.Sequential(nn.Linear(5, WIDTH))
        self.blocks, self.out = nn.ModuleList(_mlp() for _ in range(6)), nn.Linear(WIDTH, 5)
        self.lower.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.upper(self.lower(x))
        for block in self.blocks:
            x = x + block(x)
        return self.out(x)


class WeightNormed(nn.Module):
    """Weights computed from other parameters at every call."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.utils.parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH))
        self.spectral = nn.utils.parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.spectral(self.linear(x).relu())


class Complex(nn.Module):
    """Filters in the frequency domain: complex tensors inside a block."""

    def __init__(self) -> None:
        super().__init__()
        self.filter = nn.Parameter(torch.randn(WIDTH // 2 + 1, 2) / 4)
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(torch.fft.irfft(torch.fft.rfft(x) * torch.view_as_complex(self.filter), n=WIDTH).relu())


class InPlace(nn.Module):
    """Writes into its activations: views, masks and in-place arithmetic."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h = self.linear(x)
        h[:, : WIDTH // 2] += 0.5 * x[:, WIDTH // 2 :]
        h.mul_(0.5).masked_fill_(x > 2, 0.0)
        return h.relu_()


class Branching(nn.Module):
    """Python control flow on a value: nothing a graph can hold."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h = self.linear(x)
        return h.relu() if h.sum() > 0 else h.tanh()


def _of(model: Callable[[], nn.Module]) -> Callable[[], Made]:
    return lambda: (model(), (torch.randn(BATCH, FEATURES),))


ENTRIES = (
    Entry("custom-op", "operators of its own", _of(lambda: Residual(CustomOp))),
    Entry("autograd-function", "operators of its own", _of(lambda: Residual(AutogradFunction)), expect="chain",
          why=FUNCTION),
    Entry("tied-blocks", "sharing", _of(TiedBlocks)),
    Entry("checkpointed", "recomputation", _of(lambda: Residual(Checkpointed))),
    Entry("buffers", "state", _of(lambda: Residual(Running)), expect="chain",
          why="a statistic of the batch is applied to it: every sample's value depends on the others"),
    Entry("frozen-half", "state", _of(Frozen)),
    Entry("parametrized", "sharing", _of(lambda: Residual(WeightNormed))),
    Entry("spectral", "operators of its own", _of(lambda: Residual(Complex))),
    Entry("in-place", "state", _of(lambda: Residual(InPlace))),
    Entry("branching", "control flow", _of(lambda: Residual(Branching)), expect="chain",
          why="no graph holds a Python branch on the value of a tensor: cut between child modules"),
)  # fmt: skip
