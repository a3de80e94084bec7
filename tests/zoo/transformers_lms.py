"""Language models of transformers at small random configurations: attention, experts, state spaces, recurrences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers

from tests.zoo.entry import FUNCTION, Entry, Made

# Four layers of two residual branches are still eight regions: enough where the fast tests are to stay fast.
LAYERS, FEW, WIDTH, VOCABULARY = 8, 4, 32, 128
# No two sizes of a model are equal by chance: batch 3, 12 positions, width 32.
BATCH, LENGTH = 3, 12
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
# what most configurations of the last years call their sizes
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    **SPECIAL,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}
HYBRID = ["linear_attention", "full_attention"] * 2


def tokens(length: int = LENGTH) -> torch.Tensor:
    """Random ids `[B, T]` without padding, which models treat in ways of their own."""
    return torch.randint(3, VOCABULARY, (BATCH, length))


def from_config(model: str, config: str, **sizes: Any) -> torch.nn.Module:
    """A model of transformers, by class names, at random weights."""
    settings = getattr(transformers, config)(**sizes)
    return getattr(transformers, model)(settings).train()


def lm(model: str, config: str, **sizes: Any) -> Callable[[], Made]:
    """Makes a decoder language model."""
    return lambda: (from_config(model, config, **sizes), {"input_ids": tokens()})


def _decoders() -> list[Entry]:
    made = {
        "gpt2": lm("GPT2LMHeadModel", "GPT2Config", vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=FEW, n_head=4,
                   n_positions=64, **SPECIAL),
        "opt": lm("OPTForCausalLM", "OPTConfig", **{**SIZES, "ffn_dim": 64, "word_embed_proj_dim": WIDTH}),
        "gpt-neox": lm("GPTNeoXForCausalLM", "GPTNeoXConfig", **SIZES),
        "gptj": lm("GPTJForCausalLM", "GPTJConfig", vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=LAYERS, n_head=4,
                   n_positions=64, rotary_dim=4, **SPECIAL),
        "bloom": lm("BloomForCausalLM", "BloomConfig", vocab_size=VOCABULARY, hidden_size=WIDTH, n_layer=LAYERS,
                    n_head=4, hidden_dropout=0.1, **SPECIAL),
        "mpt": lm("MptForCausalLM", "MptConfig", vocab_size=VOCABULARY, d_model=WIDTH, n_layers=LAYERS, n_heads=4,
                  max_seq_len=64, **SPECIAL),
        "llama": lm("LlamaForCausalLM", "LlamaConfig", **{**GROUPED, "num_hidden_layers": FEW}),
        "mistral": lm("MistralForCausalLM", "MistralConfig", sliding_window=8, **GROUPED),
        "qwen2": lm("Qwen2ForCausalLM", "Qwen2Config", **GROUPED),
        "qwen3": lm("Qwen3ForCausalLM", "Qwen3Config", head_dim=8, **GROUPED),
        "gemma": lm("GemmaForCausalLM", "GemmaConfig", head_dim=8, **GROUPED),
        "gemma2": lm("Gemma2ForCausalLM", "Gemma2Config", head_dim=8, query_pre_attn_scalar=8, sliding_window=8,
                     **GROUPED),
        "gemma3": lm("Gemma3ForCausalLM", "Gemma3TextConfig", head_dim=8, query_pre_attn_scalar=8, sliding_window=8,
                     **GROUPED),
        "phi": lm("PhiForCausalLM", "PhiConfig", **SIZES),
        "phi3": lm("Phi3ForCausalLM", "Phi3Config", resid_pdrop=0.1, **GROUPED),
        "falcon": lm("FalconForCausalLM", "FalconConfig", **SIZES),
        "olmo2": lm("Olmo2ForCausalLM", "Olmo2Config", **GROUPED),
        "smollm3": lm("SmolLM3ForCausalLM", "SmolLM3Config", **GROUPED),
        "stablelm": lm("StableLmForCausalLM", "StableLmConfig", **GROUPED),
        "cohere2": lm("Cohere2ForCausalLM", "Cohere2Config", head_dim=8, sliding_window=8, **GROUPED),
        "granite": lm("GraniteForCausalLM", "GraniteConfig", residual_multiplier=0.5, **GROUPED),
        "glm4": lm("Glm4ForCausalLM", "Glm4Config", head_dim=8, **GROUPED),
    }  # fmt: skip
    return [
        Entry(name, "decoder LM", make, ci=name in ("gpt2", "llama"), **_opaque(name == "bloom"))
        for name, make in made.items()
    ]


def _opaque(applies: bool) -> dict[str, str]:
    """What the zoo expects of a model that applies an ``autograd.Function``."""
    return {"expect": "chain", "why": FUNCTION} if applies else {}


def _experts() -> list[Entry]:
    routed = {"num_experts": 4, "num_experts_per_tok": 2}
    made = {
        "mixtral": lm("MixtralForCausalLM", "MixtralConfig", num_local_experts=4, **GROUPED),
        "olmoe": lm("OlmoeForCausalLM", "OlmoeConfig", **routed, **GROUPED),
        "qwen2-moe": lm("Qwen2MoeForCausalLM", "Qwen2MoeConfig", moe_intermediate_size=24,
                        shared_expert_intermediate_size=48, **routed, **GROUPED),
        "qwen3-moe": lm("Qwen3MoeForCausalLM", "Qwen3MoeConfig", moe_intermediate_size=24, head_dim=8,
                        num_local_experts=4, num_experts_per_tok=2, **GROUPED),
        "gpt-oss": lm("GptOssForCausalLM", "GptOssConfig", num_local_experts=4, num_experts_per_tok=2, head_dim=8,
                      sliding_window=8, **GROUPED),
        "deepseek-v3": lm("DeepseekV3ForCausalLM", "DeepseekV3Config", moe_intermediate_size=24, n_routed_experts=4,
                          num_experts_per_tok=2, n_group=2, topk_group=1, first_k_dense_replace=1, kv_lora_rank=8,
                          q_lora_rank=12, qk_rope_head_dim=4, qk_nope_head_dim=6, v_head_dim=8,
                          num_key_value_heads=4, **SIZES),
    }  # fmt: skip
    return [Entry(name, "mixture of experts", make) for name, make in made.items()]


def _state_spaces() -> list[Entry]:
    sizes = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "state_size": 8, **SPECIAL}
    made = {
        # loops over positions or chunks in Python: few layers are graph enough
        "mamba": lm("MambaForCausalLM", "MambaConfig", **{**sizes, "num_hidden_layers": FEW}),
        "falcon-mamba": lm("FalconMambaForCausalLM", "FalconMambaConfig", **{**sizes, "num_hidden_layers": FEW}),
        "mamba2": lm("Mamba2ForCausalLM", "Mamba2Config", num_heads=8, head_dim=8, n_groups=2, chunk_size=8,
                     **{**sizes, "num_hidden_layers": FEW}),
    }  # fmt: skip
    return [Entry(name, "state space", make, ci=name == "mamba2") for name, make in made.items()]


def _hybrids() -> list[Entry]:
    linear = {"linear_key_head_dim": 8, "linear_value_head_dim": 6, "linear_num_key_heads": 2,
              "linear_num_value_heads": 4, "head_dim": 16}  # fmt: skip
    mamba = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 5, "mamba_chunk_size": 8}
    made = {
        "jamba": lm("JambaForCausalLM", "JambaConfig", **{**GROUPED, "num_hidden_layers": FEW}, num_experts=4,
                    num_experts_per_tok=2, attn_layer_period=2, attn_layer_offset=1, mamba_d_state=5, mamba_dt_rank=4,
                    use_mamba_kernels=False),
        "zamba2": lm("Zamba2ForCausalLM", "Zamba2Config", **{**SIZES, "num_key_value_heads": 4}, mamba_d_state=5,
                     n_mamba_heads=8, mamba_headdim=8, chunk_size=8, num_mem_blocks=1, adapter_rank=4,
                     hybrid_layer_ids=[1, 3, 5, 7], layers_block_type=["mamba", "hybrid"] * 4, use_mem_rope=True,
                     attention_head_dim=16),
        "bamba": lm("BambaForCausalLM", "BambaConfig", attn_layer_indices=[1, 5], **mamba, **GROUPED),
        "nemotron-h": lm("NemotronHForCausalLM", "NemotronHConfig", mamba_num_heads=8, mamba_head_dim=8, n_groups=2,
                         ssm_state_size=5, chunk_size=8, head_dim=8,
                         layers_block_type=["mamba", "attention", "mamba", "mlp"] * 2, **GROUPED),
        "qwen3.5": lm("Qwen3_5ForCausalLM", "Qwen3_5TextConfig", **linear,
                      **{**GROUPED, "num_hidden_layers": FEW}, layer_types=HYBRID),
        "qwen3-next": lm("Qwen3NextForCausalLM", "Qwen3NextConfig", moe_intermediate_size=24, num_experts=4,
                         num_experts_per_tok=2, shared_expert_intermediate_size=24, **linear,
                         **{**GROUPED, "num_hidden_layers": FEW}, layer_types=HYBRID),
        "falcon-h1": lm("FalconH1ForCausalLM", "FalconH1Config", mamba_d_ssm=64, head_dim=8, **mamba,
                        **{**GROUPED, "num_hidden_layers": FEW}),
        "lfm2": lm("Lfm2ForCausalLM", "Lfm2Config", block_multiple_of=8, layer_types=["conv", "full_attention"] * 4,
                   **GROUPED),
    }  # fmt: skip
    return [Entry(name, "hybrid", make) for name, make in made.items()]


def _recurrent() -> list[Entry]:
    made = {
        "rwkv": lm("RwkvForCausalLM", "RwkvConfig", vocab_size=VOCABULARY, hidden_size=WIDTH,
                   attention_hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=FEW, context_length=64,
                   **SPECIAL),
        "xlstm": lm("xLSTMForCausalLM", "xLSTMConfig", vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=FEW,
                    num_heads=2, chunk_size=4, mode="train", ffn_round_up_to_multiple_of=8, use_cache=False,
                    **SPECIAL),
        "recurrent-gemma": lm("RecurrentGemmaForCausalLM", "RecurrentGemmaConfig", lru_width=WIDTH, head_dim=8,
                              attention_window_size=8, **{**GROUPED, "num_hidden_layers": 6}),
    }  # fmt: skip
    return [Entry(name, "recurrent", make, **_opaque(name == "recurrent-gemma")) for name, make in made.items()]


ENTRIES = (*_decoders(), *_experts(), *_state_spaces(), *_hybrids(), *_recurrent())
