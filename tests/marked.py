"""Small models with hand-set boundary markers, and the comparison of their gradients with plain autograd's."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import lbi_compile.kernels.ops  # noqa: F401  registers the operators

EXACT = 1e-12


def mark(m: Tensor, k: int, chain: int = 0) -> Tensor:
    return torch.ops.lbi.boundary(m, k, chain)


class MlpRegion(nn.Module):
    """``m [B, R], x [B, D] -> [B, R]``: a residual MLP between decoder and encoder."""

    def __init__(self, d: int, r: int, p: float) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(r, d), nn.Linear(d, r), nn.LayerNorm(d)
        self.mlp = nn.Sequential(nn.LayerNorm(d), nn.Linear(d, 2 * d), nn.GELU(), nn.Dropout(p), nn.Linear(2 * d, d))

    def forward(self, m: Tensor, x: Tensor) -> Tensor:
        h = self.up(m) + x
        h = h + self.mlp(h)
        return m + self.down(self.norm(h))


class AttentionRegion(nn.Module):
    """``m [B, R], x [B, T, D] -> [B, R]``: a causal transformer block, mean-pooled."""

    def __init__(self, d: int, r: int, p: float, *, heads: int = 2, masked: bool = False) -> None:
        super().__init__()
        self.heads, self.p, self.masked = heads, p, masked
        self.up, self.down = nn.Linear(r, d), nn.Linear(d, r)
        self.norm, self.qkv, self.out = nn.LayerNorm(d), nn.Linear(d, 3 * d), nn.Linear(d, d)

    def forward(self, m: Tensor, x: Tensor) -> Tensor:
        b, t, d = x.shape
        h = x + self.up(m)[:, None]
        q, k, v = self.qkv(self.norm(h)).view(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        p = self.p if self.training else 0.0
        if self.masked:
            keep = (x[:, :, 0] > 0)[:, None, None, :] | torch.eye(t, dtype=torch.bool)
            a = F.scaled_dot_product_attention(q, k, v, attn_mask=keep, dropout_p=p)
        else:
            a = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=p)
        h = h + self.out(a.transpose(1, 2).reshape(b, t, d))
        return m + self.down(h.mean(1))


class Pooled(nn.Module):
    """K regions with a latent per sample, K + 1 markers.

    Args:
        regions: The regions.
        d: Width D.
        r: Latent width R.
        aux: Boundaries whose latents enter the output a second time.
        checkpoint: Recompute each region in the backward.
        chain: Number of the chain.
    """

    def __init__(
        self,
        regions: Sequence[nn.Module],
        *,
        d: int = 8,
        r: int = 4,
        aux: Sequence[int] = (),
        checkpoint: bool = False,
        chain: int = 0,
    ) -> None:
        super().__init__()
        self.regions = nn.ModuleList(regions)
        self.stem, self.enter, self.head = nn.Linear(6, d), nn.Linear(d, r), nn.Linear(r, 5)
        self.aux, self.checkpoint, self.chain = tuple(aux), checkpoint, chain

    def forward(self, inputs: Tensor) -> Tensor:
        x = self.stem(inputs)
        m = self.enter(x if x.dim() == 2 else x.mean(1))
        extra = torch.zeros((), dtype=x.dtype)
        for k, region in enumerate(self.regions):
            m = mark(m, k, self.chain)
            if k in self.aux:
                extra = extra + (m**2).sum(-1, keepdim=True)
            if self.checkpoint:
                m = torch.utils.checkpoint.checkpoint(region, m, x, use_reentrant=False)
            else:
                m = region(m, x)
        return self.head(mark(m, len(self.regions), self.chain)) + extra


class Token(nn.Module):
    """K parallel regions with a latent per position, carried by a GRU or a linear cell; markers 1 to K - 1."""

    def __init__(self, cell: str, *, K: int = 4, d: int = 8, r: int = 4) -> None:
        super().__init__()
        self.r = r
        self.stem, self.head = nn.Linear(6, d), nn.Linear(d, 7)
        self.finish = nn.ModuleList([nn.Sequential(nn.LayerNorm(d), nn.Linear(d, d), nn.GELU()) for _ in range(K)])
        self.encode = nn.ModuleList([nn.Linear(d, r) for _ in range(K - 1)])
        self.decode = nn.ModuleList([nn.Linear(r, d) for _ in range(K - 1)])
        cells = [nn.GRUCell(r, r) if cell == "gru" else nn.Linear(r, r, bias=False) for _ in range(K - 2)]
        self.cells = nn.ModuleList(cells)

    def forward(self, inputs: Tensor) -> Tensor:
        x = self.stem(inputs)
        total, m = x, None
        for k, finish in enumerate(self.finish):
            a = x + x.cumsum(1) * 0.1 * (k + 1)
            h = a if m is None else a + self.decode[k - 1](m)
            total = total + h + finish(h) - x
            if k < len(self.encode):
                z = torch.tanh(self.encode[k](a))
                m = mark(z if m is None else self.step(k - 1, z, m), k + 1)
        return self.head(total)

    def step(self, k: int, z: Tensor, m: Tensor) -> Tensor:
        cell = self.cells[k]
        if isinstance(cell, nn.GRUCell):
            return cell(z.reshape(-1, self.r), m.reshape(-1, self.r)).view_as(m)
        return cell(m) + z


def pooled_mlp(K: int = 4, *, d: int = 8, r: int = 4, p: float = 0.1, **options: Any) -> Pooled:
    return Pooled([MlpRegion(d, r, p) for _ in range(K)], d=d, r=r, **options)


def pooled_attention(K: int = 3, *, d: int = 8, r: int = 4, p: float = 0.0, masked: bool = False) -> Pooled:
    return Pooled([AttentionRegion(d, r, p, masked=masked) for _ in range(K)], d=d, r=r)


@dataclass
class Step:
    """One training step: output, random state after the forward, and the gradients of input and parameters."""

    output: Tensor
    random: Tensor
    gradients: list[Tensor | None]

    def error(self, reference: Step) -> float:
        """Largest ``|dg| / (|g| + 1e-6 |g|_all)`` over input and parameters."""
        missing = [g is None for g in self.gradients]
        assert missing == [g is None for g in reference.gradients]
        pairs = [
            (a, b) for a, b in zip(self.gradients, reference.gradients, strict=True) if a is not None and b is not None
        ]
        total = torch.cat([b.double().flatten() for _, b in pairs]).norm()
        return max(float((a.double() - b.double()).norm() / (b.double().norm() + 1e-6 * total)) for a, b in pairs)


def square(y: Tensor) -> Tensor:
    return y.double().square().sum()


def step(
    call: Callable[[Tensor], Tensor],
    module: nn.Module,
    inputs: Tensor,
    *,
    loss: Callable[[Tensor], Tensor] = square,
    leaf: bool = True,
    watch: TorchDispatchMode | None = None,
) -> Step:
    """Forward and backward of ``call``, which runs ``module``, from a fixed random state; ``watch`` is on backward."""
    module.zero_grad()
    inputs = inputs.clone().requires_grad_(leaf)
    torch.manual_seed(3)
    output = call(inputs)
    random = torch.get_rng_state()
    with watch or contextlib.nullcontext():
        loss(output).backward()
    gradients = [None if p.grad is None else p.grad.clone() for p in module.parameters()]
    return Step(output.detach(), random, [inputs.grad, *gradients] if leaf else gradients)


class Scans(TorchDispatchMode):
    """Counts calls of ``lbi::suffix_scan`` and keeps their Jacobians; ``zeros`` makes the scan return zeros.

    Attributes:
        jacobians: The first argument of each call.
    """

    supports_higher_order_operators = True

    def __init__(self, *, zeros: bool = False) -> None:
        super().__init__()
        self.zeros = zeros
        self.jacobians: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.lbi.suffix_scan.default:
            self.jacobians.append(args[0])
            return torch.zeros_like(result) if self.zeros else result
        return result
