"""The demo's model is what its docstrings say."""

from __future__ import annotations

import pytest
import torch

from lbi_compile.demo_model import Attention, CausalTransformer


@pytest.mark.parametrize("training", [True, False])
def test_causal(training: bool):
    model = CausalTransformer(depth=2, length=24, dropout=0.1 if training else 0.0).train(training)
    tokens = torch.randint(256, (2, 24))

    def logits(tokens: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(1)
        return model(tokens)

    before = logits(tokens)
    for t in (1, 7, 23):
        changed = tokens.clone()
        changed[:, t:] = (changed[:, t:] + 1) % 256
        assert torch.equal(logits(changed)[:, :t], before[:, :t])
        assert not torch.equal(logits(changed)[:, t:], before[:, t:])


def test_attention_without_mask_sees_all():
    attention = Attention(16, heads=2, causal=False)
    x = torch.randn(1, 5, 16)
    changed = x.clone()
    changed[:, -1] += 1
    assert (attention(changed) != attention(x)).any(-1).all()


def test_dropout_only_in_training():
    model = CausalTransformer(depth=1, dropout=0.5)
    tokens = torch.randint(256, (2, 8))
    assert not torch.equal(model(tokens), model(tokens))
    model.eval()
    assert torch.equal(model(tokens), model(tokens))


@pytest.mark.parametrize("tied", [True, False])
def test_tied_head(tied: bool):
    model = CausalTransformer(depth=1, tied=tied)
    assert (model.head.weight is model.token.weight) == tied
    model(torch.randint(256, (2, 8))).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


def test_stream_does_not_grow_with_depth():
    tokens = torch.randint(256, (4, 64))
    spread = [CausalTransformer(depth=depth)(tokens).std().item() for depth in (2, 32)]
    assert spread[1] / spread[0] < 1.5
