"""Encoders, encoder-decoders, vision and audio models of transformers at small random configurations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.zoo.entry import BATCH_NORM, Entry, Made
from tests.zoo.transformers_lms import (
    BATCH,
    FEW,
    LAYERS,
    LENGTH,
    SIZES,
    SPECIAL,
    VOCABULARY,
    WIDTH,
    from_config,
    tokens,
)

# 9 patches and a class token, or 64 x 64 where stages halve the image five times
IMAGE, PATCH, LARGE = 24, 8, 64


def image(size: int = IMAGE) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(BATCH, 3, size, size)}


def text() -> dict[str, Tensor]:
    return {"input_ids": tokens(), "attention_mask": torch.ones(BATCH, LENGTH, dtype=torch.long)}


def pair() -> dict[str, Tensor]:
    return {"input_ids": tokens(), "decoder_input_ids": tokens(LENGTH - 2)}


def made(model: str, config: str, inputs: Callable[[], dict[str, Any]], **sizes: Any) -> Callable[[], Made]:
    """Makes a model of transformers and its inputs."""
    return lambda: (from_config(model, config, **sizes), inputs())


def _encoders() -> list[Entry]:
    bert = {**SIZES, "hidden_dropout_prob": 0.1}
    found = {
        "bert": made("BertForSequenceClassification", "BertConfig", text, **{**bert, "num_hidden_layers": FEW}),
        "bert-mlm": made("BertForMaskedLM", "BertConfig", text, **bert),
        "roberta": made("RobertaForMaskedLM", "RobertaConfig", text, **{**bert, "type_vocab_size": 1}),
        "electra": made("ElectraForPreTraining", "ElectraConfig", text, **bert, embedding_size=16),
        "albert": made("AlbertForMaskedLM", "AlbertConfig", text, **bert, embedding_size=16),
        "deberta-v2": made("DebertaV2ForMaskedLM", "DebertaV2Config", text, **bert, relative_attention=True,
                           pos_att_type=["p2c", "c2p"], position_biased_input=False, position_buckets=8,
                           share_att_key=True, norm_rel_ebd="layer_norm"),
        "modernbert": made("ModernBertForMaskedLM", "ModernBertConfig", text, local_attention=8, **SIZES),
    }  # fmt: skip
    return [Entry(name, "encoder", make, ci=name == "bert") for name, make in found.items()]


def _encoder_decoders() -> list[Entry]:
    bart = {"vocab_size": VOCABULARY, "d_model": WIDTH, "encoder_layers": 4, "decoder_layers": 4,
            "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
            "decoder_start_token_id": 1, **SPECIAL}  # fmt: skip
    length = {"max_position_embeddings": 64}

    def speech() -> dict[str, Tensor]:
        return {"input_features": torch.randn(BATCH, 10, 40), "decoder_input_ids": tokens()}

    found = {
        "t5": made("T5ForConditionalGeneration", "T5Config", pair, vocab_size=VOCABULARY, d_model=WIDTH, d_kv=8,
                   d_ff=64, num_layers=4, num_decoder_layers=4, num_heads=4, decoder_start_token_id=0),
        "bart": made("BartForConditionalGeneration", "BartConfig", pair, **bart, **length),
        "marian": made("MarianMTModel", "MarianConfig", pair, **bart, **length),
        "pegasus": made("PegasusForConditionalGeneration", "PegasusConfig", pair, **bart, **length),
        "whisper": made("WhisperForConditionalGeneration", "WhisperConfig", speech, **bart, num_mel_bins=10,
                        max_source_positions=20, max_target_positions=64, dropout=0.1),
    }  # fmt: skip
    return [Entry(name, "encoder-decoder", make, ci=name == "t5") for name, make in found.items()]


def _vision() -> list[Entry]:
    vit = {"hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
           "image_size": IMAGE, "patch_size": PATCH}  # fmt: skip

    def large() -> dict[str, Tensor]:
        return image(LARGE)

    def image_and_text() -> dict[str, Tensor]:
        return {**text(), **image()}

    tower = {"hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
    found = {
        "vit": made("ViTForImageClassification", "ViTConfig", image, **vit, hidden_dropout_prob=0.1),
        "deit": made("DeiTForImageClassification", "DeiTConfig", image, **vit),
        "dinov2": made("Dinov2ForImageClassification", "Dinov2Config", image, **vit, mlp_ratio=2, drop_path_rate=0.1),
        "swin": made("SwinForImageClassification", "SwinConfig", large, image_size=LARGE, patch_size=2, window_size=4,
                     embed_dim=16, depths=[2, 2, 4, 2], num_heads=[2, 2, 4, 4]),
        "convnext": made("ConvNextForImageClassification", "ConvNextConfig", large, hidden_sizes=[8, 16, 24, 32],
                         depths=[2, 2, 4, 2], drop_path_rate=0.1),
        "resnet": made("ResNetForImageClassification", "ResNetConfig", large, embedding_size=8,
                       hidden_sizes=[16, 24, 32, 40], depths=[2, 2, 4, 2], layer_type="basic"),
        "regnet": made("RegNetForImageClassification", "RegNetConfig", large, embedding_size=8,
                       hidden_sizes=[16, 24, 32, 40], depths=[2, 2, 4, 2], groups_width=8),
        "mobilenet-v2": made("MobileNetV2ForImageClassification", "MobileNetV2Config", large, image_size=LARGE,
                             depth_multiplier=0.25),
        "segformer": made("SegformerForSemanticSegmentation", "SegformerConfig", large, depths=[2, 2, 2, 2],
                          hidden_sizes=[8, 16, 24, 32], decoder_hidden_size=20, num_labels=5),
        "clip": made("CLIPModel", "CLIPConfig", image_and_text, projection_dim=20,
                     text_config={**tower, **SPECIAL, "vocab_size": VOCABULARY, "max_position_embeddings": 64},
                     vision_config={**tower, "image_size": IMAGE, "patch_size": PATCH}),
    }  # fmt: skip
    families = {"clip": "vision and text"}
    unscanned = dict.fromkeys(("resnet", "regnet", "mobilenet-v2"), BATCH_NORM)
    return [
        Entry(
            name,
            families.get(name, "vision"),
            make,
            expect="chain" if name in unscanned else "scan",
            why=unscanned.get(name, ""),
            ci=name == "vit",
        )
        for name, make in found.items()
    ]


def _audio() -> list[Entry]:
    def wave() -> dict[str, Tensor]:
        return {"input_values": torch.randn(BATCH, 800)}

    def spectrogram() -> dict[str, Tensor]:
        return {"input_values": torch.randn(BATCH, 40, 16)}

    # Two training options draw in Python, on the host: LayerDrop skips layers, SpecAugment masks with numpy.
    wav2vec = {**SIZES, "layerdrop": 0.0, "apply_spec_augment": False, "conv_dim": [16, 16, 16],
               "conv_stride": [5, 4, 2], "conv_kernel": [10, 8, 4], "num_feat_extract_layers": 3,
               "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 4}  # fmt: skip
    found = {
        "wav2vec2": made("Wav2Vec2ForCTC", "Wav2Vec2Config", wave, **wav2vec),
        "hubert": made("HubertForCTC", "HubertConfig", wave, **wav2vec, do_stable_layer_norm=True),
        "ast": made("ASTForAudioClassification", "ASTConfig", spectrogram, hidden_size=WIDTH, intermediate_size=64,
                    num_hidden_layers=LAYERS, num_attention_heads=4, patch_size=8, frequency_stride=4, time_stride=4,
                    max_length=40, num_mel_bins=16),
    }  # fmt: skip
    return [Entry(name, "audio", make) for name, make in found.items()]


ENTRIES = (*_encoders(), *_encoder_decoders(), *_vision(), *_audio())
