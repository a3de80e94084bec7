"""The four models the exactness tests share, and how their gradients are taken."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from lbi_compile import BoundedModule
from tests.models import CausalTransformer, ResidualMLP, VisionTransformer

Inputs = Tensor | dict[str, Tensor]


def mlp(depth: int = 9) -> tuple[nn.Module, Inputs]:
    return ResidualMLP(10, width=12, depth=depth, classes=5, dropout=0.1), torch.randn(3, 10)


def transformer(depth: int = 5) -> tuple[nn.Module, Inputs]:
    model = CausalTransformer(vocabulary=32, length=16, width=16, depth=depth, heads=2, dropout=0.1)
    return model, torch.randint(0, 32, (3, 9))


def vit(depth: int = 4) -> tuple[nn.Module, Inputs]:
    """On real digits of scikit-learn."""
    images = torch.from_numpy(load_digits().images[:3] / 16.0).float().unsqueeze(1)
    return VisionTransformer(width=16, depth=depth, heads=2, dropout=0.1), images


def gpt2(depth: int = 4) -> tuple[nn.Module, Inputs]:
    """From a config, head tied to the embedding, dropout 0.1."""
    config = GPT2Config(
        n_layer=depth, n_embd=16, n_head=2, vocab_size=32, n_positions=16, bos_token_id=0, eos_token_id=0
    )
    return GPT2LMHeadModel(config), {"input_ids": torch.randint(0, 32, (3, 9))}


MODELS: dict[str, Callable[..., tuple[nn.Module, Inputs]]] = {
    "mlp": mlp,
    "transformer": transformer,
    "vit": vit,
    "gpt2": gpt2,
}


def in_float64(name: str, **options: Any) -> tuple[nn.Module, Inputs]:
    """A model of ``MODELS`` in training mode and its inputs, in float64."""
    torch.manual_seed(0)
    model, inputs = MODELS[name](**options)
    if isinstance(inputs, Tensor) and inputs.is_floating_point():
        inputs = inputs.double()
    return model.double().train(), inputs


def with_batch(inputs: Inputs, size: int) -> Inputs:
    """The same samples, repeated to another batch size."""
    if isinstance(inputs, dict):
        return {name: with_batch(value, size) for name, value in inputs.items()}
    return inputs.repeat(-(-size // inputs.shape[0]), *[1] * (inputs.dim() - 1))[:size].clone()


def call(model: nn.Module, inputs: Inputs) -> Tensor:
    """The model's logits."""
    out = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    return out if isinstance(out, Tensor) else out.logits


def project(value: Tensor, seed: int = 3) -> Tensor:
    """A scalar that weighs every element differently."""
    weight = torch.randn(value.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (value.double() * weight).sum()


def gradients(
    bounded: BoundedModule,
    inputs: Inputs,
    engine: str,
    loss: Callable[[BoundedModule, Inputs], Tensor] | None = None,
) -> dict[str, Tensor | None]:
    """Gradient of every parameter under one engine; all engines draw the same dropout masks."""
    bounded.zero_grad()
    with bounded.with_engine(engine):
        torch.manual_seed(7)
        value = project(call(bounded, inputs)) if loss is None else loss(bounded, inputs)
        assert bounded.engine.name == engine
    value.backward()
    return {name: None if p.grad is None else p.grad.clone() for name, p in bounded.named_parameters()}
