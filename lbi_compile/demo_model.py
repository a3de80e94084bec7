"""The model the demo trains: a causal transformer over bytes, in the form of GPT-2."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Multi-head self-attention, `[B, T, D]` -> `[B, T, D]`.

    Args:
        width: Width D, a multiple of ``heads``.
        heads: Number of heads.
        causal: Position t attends to positions up to t only.
        dropout: Probability of dropping an attention weight.
    """

    def __init__(self, width: int, *, heads: int, causal: bool, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads, self.causal, self.dropout = heads, causal, dropout
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1)
        )
        mixed = F.scaled_dot_product_attention(
            query, key, value, dropout_p=self.dropout if self.training else 0.0, is_causal=self.causal
        )
        return self.out(mixed.transpose(1, 2).flatten(-2))


class TransformerBlock(nn.Module):
    """Pre-norm transformer block, `[B, T, D]` -> `[B, T, D]`: attention, then a GELU MLP of four times the width.

    Args:
        width: Width D, a multiple of ``heads``.
        heads: Number of heads.
        causal: Position t attends to positions up to t only.
        dropout: Probability of dropping an attention weight, and a number of each branch before it is added.
    """

    def __init__(self, width: int, *, heads: int, causal: bool, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm_attention = nn.LayerNorm(width)
        self.attention = Attention(width, heads=heads, causal=causal, dropout=dropout)
        self.norm_mlp = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.norm_attention(x)))
        return x + self.dropout(self.mlp(self.norm_mlp(x)))


class CausalTransformer(nn.Module):
    """Causal transformer language model, tokens `[B, T]` -> logits `[B, T, vocabulary]`.

    Args:
        vocabulary: Number of tokens; 256 for bytes.
        length: Longest sequence T it has positions for.
        width: Width D, a multiple of ``heads``.
        depth: Number of blocks.
        heads: Number of attention heads.
        dropout: Probability of dropping attention weights, branches of blocks and embeddings.
        tied: The head uses the weight of the token embedding.

    Example:
        >>> CausalTransformer(depth=2)(torch.zeros(3, 32, dtype=torch.long)).shape
        torch.Size([3, 32, 256])

    Initialised as GPT-2 is: Radford et al., "Language Models are Unsupervised Multitask Learners", 2019.
    """

    def __init__(
        self,
        *,
        vocabulary: int = 256,
        length: int = 128,
        width: int = 64,
        depth: int = 8,
        heads: int = 4,
        dropout: float = 0.0,
        tied: bool = True,
    ) -> None:
        super().__init__()
        self.token = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(length, width)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            TransformerBlock(width, heads=heads, causal=True, dropout=dropout) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.head.weight = self.token.weight
        self._initialise(depth)

    def _initialise(self, depth: int) -> None:
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                # Each block adds two branches to the stream: the sum over all shall not grow with the depth.
                branch = name.endswith(("attention.out.weight", "mlp.2.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * depth) if branch else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token(tokens) + self.position(torch.arange(tokens.shape[1], device=tokens.device))
        x = self.dropout(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))
