"""Models of pictures, sound, series and pairs as transformers ships them.

The residual additions on the backbone are counted from each architecture. In an encoder-decoder every
decoder layer reads the encoder, so all gradient to the encoder's input passes through the encoder's
additions and, of the decoder, only through the last feed-forward block's: the last cross-attention adds
two ways to the encoder of which neither is a skip. In a model of two towers the gradient to an input
passes through one of them.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

from gallery.case import Built, Case
from gallery.shipped import TRUTH, VOCABULARY, Batch, Make, case, encoder, images, vision

Config = Any  # transformers' configurations take their fields as keywords that no stub describes


def pairs() -> dict[str, Tensor]:
    """A source and a target of 24 tokens for an encoder-decoder."""
    return {
        "input_ids": torch.randint(5, VOCABULARY, (2, 24)),
        "labels": torch.randint(5, VOCABULARY, (2, 24)),
    }


def waves() -> dict[str, Tensor]:
    """Two waves of half a second with transcripts of eight characters."""
    return {"input_values": torch.randn(2, 8000), "labels": torch.randint(1, 32, (2, 8))}


def spectrograms() -> dict[str, Tensor]:
    return {"input_features": torch.randn(2, 80, 200), "labels": torch.randint(5, VOCABULARY, (2, 16))}


def captions(size: int) -> Batch:
    """Four images and their captions."""
    return lambda: {
        "pixel_values": torch.randn(4, 3, size, size),
        "input_ids": torch.randint(5, VOCABULARY, (4, 16)),
    }


def series() -> dict[str, Tensor]:
    return {"past_values": torch.randn(4, 96, 7), "future_values": torch.randn(4, 24, 7)}


def contrastive(model: Make, batch: Batch) -> Built:
    """CLIP's loss has to be asked for."""
    torch.manual_seed(0)
    made = model().train()
    inputs = batch()

    def loss(m: nn.Module) -> Tensor:
        return m(**inputs, return_loss=True).loss

    return made, loss


def vit(layers: int = 12) -> nn.Module:
    return hf.ViTForImageClassification(hf.ViTConfig(**vision(layers)))


def resnet(depths: tuple[int, ...] = (3, 4, 6, 3)) -> nn.Module:
    return hf.ResNetForImageClassification(
        hf.ResNetConfig(
            depths=list(depths), embedding_size=32, hidden_sizes=[64, 128, 256, 512], num_labels=10
        )
    )


def t5() -> nn.Module:
    return hf.T5ForConditionalGeneration(
        hf.T5Config(
            vocab_size=VOCABULARY,
            d_model=128,
            d_kv=32,
            d_ff=256,
            num_layers=6,
            num_heads=4,
            decoder_start_token_id=0,
        )
    )


def bart() -> nn.Module:
    return hf.BartForConditionalGeneration(
        hf.BartConfig(
            vocab_size=VOCABULARY,
            d_model=128,
            encoder_layers=6,
            decoder_layers=6,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=256,
            decoder_ffn_dim=256,
            max_position_embeddings=64,
            pad_token_id=1,
            decoder_start_token_id=2,
        )
    )


def whisper() -> nn.Module:
    return hf.WhisperForConditionalGeneration(
        hf.WhisperConfig(
            vocab_size=VOCABULARY,
            d_model=128,
            encoder_layers=4,
            decoder_layers=4,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=256,
            decoder_ffn_dim=256,
            max_source_positions=100,
            max_target_positions=32,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=1,
        )
    )


def _speech(config: Config) -> Any:
    return config(
        vocab_size=32,
        hidden_size=128,
        num_hidden_layers=12,
        num_attention_heads=4,
        intermediate_size=256,
        conv_dim=(64,) * 7,
        num_conv_pos_embeddings=32,
        num_conv_pos_embedding_groups=4,
        layerdrop=0.0,
        ctc_loss_reduction="mean",
        ctc_zero_infinity=True,
    )


def clip() -> nn.Module:
    text = encoder(6) | {"max_position_embeddings": 16, "bos_token_id": 1, "eos_token_id": VOCABULARY - 1}
    return hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config=vision(12), projection_dim=64))


def siglip() -> nn.Module:
    text = encoder(6) | {"max_position_embeddings": 16, "projection_size": 128}
    return hf.SiglipModel(hf.SiglipConfig(text_config=text, vision_config=vision(12)))


def patchtst() -> nn.Module:
    return hf.PatchTSTForPrediction(
        hf.PatchTSTConfig(
            num_input_channels=7,
            context_length=96,
            prediction_length=24,
            patch_length=12,
            patch_stride=12,
            d_model=64,
            num_hidden_layers=4,
            num_attention_heads=4,
            ffn_dim=128,
        )
    )


def _encoder_decoders() -> tuple[Case, ...]:
    return (
        case("t5", "encoder-decoder", t5, pairs, 2 * 6 + 1),
        case("bart", "encoder-decoder", bart, pairs, 2 * 6 + 1),
        case("whisper", "encoder-decoder", whisper, spectrograms, 2 * 4 + 1),
        case("wav2vec2", "speech", lambda: hf.Wav2Vec2ForCTC(_speech(hf.Wav2Vec2Config)), waves, 2 * 12 + 1),
        case("hubert", "speech", lambda: hf.HubertForCTC(_speech(hf.HubertConfig)), waves, 2 * 12 + 1),
        Case(
            "clip",
            "two towers",
            lambda: contrastive(clip, captions(64)),
            "healthy",
            truth=TRUTH,
            residuals=24,
        ),
        # 24 of the vision tower and one of the attention that pools it
        Case(
            "siglip",
            "two towers",
            lambda: contrastive(siglip, captions(64)),
            "healthy",
            truth=TRUTH,
            residuals=25,
        ),
        case("patchtst", "time series", patchtst, series, 8),
    )


def _images() -> tuple[Case, ...]:
    def one(name: str, model: Make, residuals: int, size: int = 64) -> Case:
        return case(name, "vision", model, images(size), residuals)

    stages = {"hidden_sizes": [32, 64, 128, 256], "num_labels": 10}
    return (
        one("resnet50", resnet, 16),
        one("resnet101", lambda: resnet((3, 4, 23, 3)), 33),
        one("resnet152", lambda: resnet((3, 8, 36, 3)), 50),
        one("bit (resnet-v2)", lambda: hf.BitForImageClassification(
            hf.BitConfig(embedding_size=32, hidden_sizes=[64, 128, 256, 512], depths=[3, 4, 6, 3], num_groups=8,
                         num_labels=10)
        ), 16),
        one("regnet", lambda: hf.RegNetForImageClassification(
            hf.RegNetConfig(embedding_size=32, **(stages | {"depths": [2, 6, 12, 2]}), groups_width=16)
        ), 22),
        one("mobilenet_v2", lambda: hf.MobileNetV2ForImageClassification(
            hf.MobileNetV2Config(depth_multiplier=0.5, num_labels=10)
        ), 10),
        one("convnext", lambda: hf.ConvNextForImageClassification(
            hf.ConvNextConfig(**stages, depths=[3, 3, 9, 3])
        ), 18),
        one("convnextv2", lambda: hf.ConvNextV2ForImageClassification(
            hf.ConvNextV2Config(**stages, depths=[2, 2, 6, 2])
        ), 12),
        one("vit", vit, 24),
        one("dinov2", lambda: hf.Dinov2ForImageClassification(hf.Dinov2Config(**vision(12))), 24),
        one("beit", lambda: hf.BeitForImageClassification(hf.BeitConfig(**vision(12))), 24),
        one("swin", lambda: hf.SwinForImageClassification(
            hf.SwinConfig(image_size=128, embed_dim=32, depths=[2, 2, 6, 2], num_heads=[2, 4, 8, 16], window_size=4,
                          num_labels=10)
        ), 24, 128),
        one("segformer", lambda: hf.SegformerForImageClassification(hf.SegformerConfig(num_labels=10)), 16),
        one("poolformer", lambda: hf.PoolFormerForImageClassification(
            hf.PoolFormerConfig(hidden_sizes=[32, 64, 128, 256], depths=[2, 2, 6, 2], num_labels=10)
        ), 24),
    )  # fmt: skip


def sensing_models() -> tuple[Case, ...]:
    """Encoder-decoders, speech, two towers, series and pictures."""
    return (*_encoder_decoders(), *_images())
