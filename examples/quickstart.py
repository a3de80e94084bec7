"""Bound a model of your own and train it, then do the same to a GPT-2: ``python examples/quickstart.py``."""

from __future__ import annotations

import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import lbi_compile


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.net(x)


# 1. a model of your own: eight residual blocks, cut into four regions
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(20, 32), *(Residual(32) for _ in range(8)), nn.Linear(32, 3))
x = torch.randn(64, 20)
y = x[:, :3].argmax(1)

bounded = lbi_compile.transform(model, x, regions=4, r=8, backward="scan")
optimizer = torch.optim.AdamW(bounded.parameters(), lr=1e-3)
for step in range(30):
    loss = nn.functional.cross_entropy(bounded(x), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 10 == 9:
        print(f"step {step + 1}: loss {loss.item():.3f}")
print(f"engine: {bounded.engine}\n")

# 2. a transformers model: where would it be cut, and are the gradients of the bounded model right?
config = GPT2Config(n_layer=3, n_embd=32, n_head=4, n_positions=64, vocab_size=256, bos_token_id=0, eos_token_id=0)
gpt2 = GPT2LMHeadModel(config)
tokens = {"input_ids": torch.randint(256, (2, 64))}

print(lbi_compile.plan(gpt2, tokens, regions=3, r=8), "\n")
print(lbi_compile.verify(lbi_compile.transform(gpt2, tokens, regions=3, r=8, backward="scan"), tokens))
