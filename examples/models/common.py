"""What the language models share: the residual stream around their blocks, a norm, and one linear recurrence."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """Division by the root mean square of the last axis, then a learned scale, `[..., D]` -> `[..., D]`.

    The scale is applied apart from the norm, so that a bfloat16 input goes with a float32 scale.

    Args:
        width: Size D of the last axis.
        eps: Added to the mean square.

    Example:
        >>> RMSNorm(4)(torch.full((1, 4), 3.0)).round(decimals=2)
        tensor([[1., 1., 1., 1.]], grad_fn=<RoundBackward1>)

    Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019.
    """

    def __init__(self, width: int, *, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], eps=self.eps) * self.weight


class Residual(nn.Module):
    """A branch around which the stream passes, `x + branch(norm(x))`, `[B, T, D]` -> `[B, T, D]`.

    Args:
        width: Width D.
        branch: Module `[B, T, D]` -> `[B, T, D]`; the projection it ends in is named ``output``.
    """

    def __init__(self, width: int, branch: nn.Module) -> None:
        super().__init__()
        self.norm = RMSNorm(width)
        self.branch = branch

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(self.norm(x))


class LanguageModel(nn.Module):
    """Embedding, blocks, norm and a head that uses the embedding's weight: tokens `[B, T]` -> logits `[B, T, V]`.

    Args:
        blocks: Modules `[B, T, D]` -> `[B, T, D]`.
        vocabulary: Number of tokens V; 256 for bytes.
        width: Width D.

    Example:
        >>> LanguageModel([Residual(8, nn.Linear(8, 8))], vocabulary=5, width=8)(torch.zeros(2, 3).long()).shape
        torch.Size([2, 3, 5])

    Matrices start with variance 2 / (5 D) (Nguyen and Salazar, "Transformers without Tears", 2019), those that end a
    branch with that over the number of branches, so that the stream does not grow with the depth.
    """

    def __init__(self, blocks: Iterable[nn.Module], *, vocabulary: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(blocks)
        self.norm = RMSNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embedding.weight
        branches = sum(isinstance(module, Residual) for module in self.modules())
        std = math.sqrt(2 / (5 * width))
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                ends_branch = name.endswith(".output")
                nn.init.normal_(module.weight, std=std / math.sqrt(branches) if ends_branch else std)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def chunked_scan(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    log_decay: Tensor,
    weight: Tensor,
    later: Tensor | None = None,
    chunk: int = 64,
) -> Tensor:
    """Solve a linear recurrence with a matrix as its state, by products of matrices within and between chunks.

    With `a_t = exp(log_decay_t)` the state obeys `h_t = a_t (h_{t-1} + later_{t-1} k_{t-1} v_{t-1}^T) + weight_t k_t
    v_t^T`, summed over ranks, and the output is `y_t = h_t^T q_t`. In closed form a pair `s <= t` counts
    `a_{s+1} ... a_t (weight_s + [s < t] later_s)`: a masked attention without a softmax. What lies in earlier chunks
    reaches a position through the state that enters its chunk, so time is linear in T but for a `[T/Q, T/Q]` factor.

    Args:
        query: `[B, T, G, M, S]`: G is 1 or the number of heads H, M the number of ranks, S the size of the state.
        key: `[B, T, G, M, S]`.
        value: `[B, T, H, M, P]`.
        log_decay: Logarithm of the decay at each step, not positive, `[B, T, H]`.
        weight: What a position adds to the state at its own step, `[B, T, H]`.
        later: What it adds one step later, `[B, T, H]`; the last position's is never used.
        chunk: Positions Q in a chunk.

    Returns:
        `y`, `[B, T, H, M, P]`.

    Example:
        >>> one = torch.ones(1, 3, 1, 1, 1)
        >>> chunked_scan(one, one, one, log_decay=torch.zeros(1, 3, 1), weight=torch.ones(1, 3, 1)).flatten()
        tensor([1., 2., 3.])

    Dao and Gu, "Transformers are SSMs", 2024 (chunks); Lahoti et al., "Mamba-3", 2026 (two weights a position, ranks).
    """
    length, ranks = value.shape[1], value.shape[3]
    chunks = (length + chunk - 1) // chunk
    # T + (C Q - T), not T plus a remainder: torch.export proves the first divisible by Q for a T it does not know
    pad = chunks * chunk - length

    def cut(x: Tensor) -> Tensor:  # [B, T, H, ...] -> [B, C, H, Q, ...]
        x = F.pad(x, (0, 0) * (x.dim() - 2) + (0, pad))
        return x.unflatten(1, (chunks, chunk)).transpose(2, 3)

    query, key, value = (cut(x).flatten(3, 4) for x in (query, key, value))  # [B, C, H, Q M, ...]
    total, weight = cut(log_decay).cumsum(-1), cut(weight)  # [B, C, H, Q]
    weight_later = weight if later is None else weight + cut(later)

    step = torch.arange(chunk, device=value.device)
    gap = total[..., :, None] - total[..., None, :]
    inner = torch.where(step[:, None] >= step, gap, -math.inf).exp()  # [B, C, H, Q, Q]
    if later is None:
        inner = inner * weight[..., None, :]
    else:
        # a position's own weight is chosen, not corrected: a difference would let the next one show by rounding
        inner = inner * torch.where(step[:, None] > step, weight_later[..., None, :], weight[..., None, :])
    scores = query @ key.transpose(-1, -2)  # [B, C, G, Q M, Q M]
    within = (scores * _per_rank(_per_rank(inner, -1, ranks), -2, ranks)) @ value

    left = (total[..., -1:] - total).exp() * weight_later
    state = key.transpose(-1, -2) @ (value * _per_rank(left, -1, ranks)[..., None])  # [B, C, H, S, P]
    ends = total[..., -1].cumsum(1)  # [B, C, H]
    starts = ends - total[..., -1]
    number = torch.arange(chunks, device=value.device)
    gap = starts[:, :, None] - ends[:, None]
    between = torch.where((number[:, None] > number)[..., None], gap, -math.inf).exp()  # [B, C, C, H]
    entering = torch.einsum("bceh,behsp->bchsp", between, state)
    before = (query @ entering) * _per_rank(total.exp(), -1, ranks)[..., None]

    y = (within + before).unflatten(3, (chunk, ranks)).transpose(2, 3).flatten(1, 2)
    return y[:, :length]


def _per_rank(x: Tensor, axis: int, ranks: int) -> Tensor:
    return x if ranks == 1 else x.repeat_interleave(ranks, axis)
