"""Models of published sizes and inputs of real lengths, to be made on the meta device, where they take no memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .unet import UNet

BATCH, LENGTH = 2, 1024

Made = tuple[nn.Module, dict[str, Tensor]]


@dataclass(frozen=True, slots=True)
class Wide:
    """One model of a published size.

    Attributes:
        make: Gives model and keyword inputs, on whatever device is the default.
        parameters: Trainable numbers of the published model, tied ones once.
        balance: The largest region may do this many times the FLOPs of the mean one.
    """

    make: Callable[[], Made]
    parameters: int
    balance: float = 1.15


def gpt2_xl() -> Made:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_layer=48, n_embd=1600, n_head=25)
    return GPT2LMHeadModel(config), {"input_ids": _tokens(config.vocab_size)}


def llama3_8b() -> Made:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128_256,
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=8192,
    )
    return LlamaForCausalLM(config), {"input_ids": _tokens(config.vocab_size)}


def vit_l16() -> Made:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096, num_labels=1000
    )
    return ViTForImageClassification(config), {"pixel_values": torch.randn(BATCH, 3, 224, 224)}


def resnet50() -> Made:
    from transformers import ResNetConfig, ResNetForImageClassification

    model = ResNetForImageClassification(ResNetConfig(num_labels=1000))
    return model, {"pixel_values": torch.randn(BATCH, 3, 224, 224)}


def mamba2_2_7b() -> Made:
    from transformers import Mamba2Config, Mamba2ForCausalLM

    config = Mamba2Config(
        vocab_size=50_288, hidden_size=2560, num_hidden_layers=64, state_size=128, head_dim=64, num_heads=80, n_groups=1
    )
    return Mamba2ForCausalLM(config), {"input_ids": _tokens(config.vocab_size)}


def t5_large() -> Made:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(d_model=1024, d_kv=64, d_ff=4096, num_layers=24, num_heads=16, decoder_start_token_id=0)
    vocabulary = config.vocab_size
    inputs = {"input_ids": _tokens(vocabulary, 512), "decoder_input_ids": _tokens(vocabulary, 384)}
    return T5ForConditionalGeneration(config), inputs


def unet_sd15() -> Made:
    return UNet(), {
        "latents": torch.randn(BATCH, 4, 64, 64),
        "timesteps": torch.randint(1000, (BATCH,)),
        "context": torch.randn(BATCH, 77, 768),
    }


ZOO: dict[str, Wide] = {
    "gpt2-xl": Wide(gpt2_xl, 1_557_611_200),
    "llama3-8b": Wide(llama3_8b, 8_030_261_248),
    "vit-l16": Wide(vit_l16, 304_326_632),
    "resnet50": Wide(resnet50, 25_557_032, balance=1.5),
    "mamba2-2.7b": Wide(mamba2_2_7b, 2_702_599_680),
    "t5-large": Wide(t5_large, 737_668_096),
    "unet-sd15": Wide(unet_sd15, 859_520_964, balance=1.5),
}


def on_meta(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """The model called ``name`` and its inputs on the meta device."""
    with torch.device("meta"):
        return ZOO[name].make()


def _tokens(vocabulary: int, length: int = LENGTH) -> Tensor:
    return torch.randint(vocabulary, (BATCH, length))
