"""Architectures as transformers ships them, built from their configurations with random weights.

Widths are small so that a forward and a backward take about a second; what makes the architecture -
the kinds of blocks, their number, norms, skips, initialisation, dropout, tied weights - is kept.
The number of residual additions on the backbone is counted from each architecture. In an
encoder-decoder every decoder layer reads the encoder, so all gradient to the encoder's input passes
through the encoder's additions and, of the decoder, only through the last feed-forward block's: the
last cross-attention adds two ways to the encoder of which neither is a skip. In a model of two towers
the gradient to an input passes through one of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

from gallery.case import Built, Case

VOCABULARY = 500
Batch = Callable[[], dict[str, Tensor]]

TRUTH = (
    "a published architecture with its own initialisation; it fits its batch (python -m gallery.establish)"
)


def tokens() -> dict[str, Tensor]:
    """Two sequences of 32 tokens, each its own label."""
    ids = torch.randint(5, VOCABULARY, (2, 32))
    return {"input_ids": ids, "labels": ids}


def pairs() -> dict[str, Tensor]:
    """A source and a target of 24 tokens for an encoder-decoder."""
    return {
        "input_ids": torch.randint(5, VOCABULARY, (2, 24)),
        "labels": torch.randint(5, VOCABULARY, (2, 24)),
    }


def images(size: int = 64) -> Batch:
    """Four images of ten classes."""
    return lambda: {"pixel_values": torch.randn(4, 3, size, size), "labels": torch.randint(10, (4,))}


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


def built(model: Callable[[], nn.Module], batch: Batch, seed: int = 0) -> Built:
    """A model in training mode with its own loss on one fixed batch."""
    torch.manual_seed(seed)
    made = model().train()
    inputs = batch()

    def loss(m: nn.Module) -> Tensor:
        return m(**inputs).loss

    return made, loss


def contrastive(model: Callable[[], nn.Module], batch: Batch) -> Built:
    """CLIP's loss has to be asked for."""
    torch.manual_seed(0)
    made = model().train()
    inputs = batch()

    def loss(m: nn.Module) -> Tensor:
        return m(**inputs, return_loss=True).loss

    return made, loss


def _case(
    name: str, family: str, model: Callable[[], nn.Module], batch: Batch, residuals: int | None
) -> Case:
    return Case(name, family, lambda: built(model, batch), "healthy", truth=TRUTH, residuals=residuals)


Config = Any  # transformers' configurations take their fields as keywords that no stub describes


def _decoder(layers: int) -> dict[str, int]:
    """The shape that most decoder configurations share."""
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }


def _ids() -> dict[str, int]:
    return {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def _encoder(layers: int) -> dict[str, int]:
    """The shape that BERT and its relatives share."""
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
    }


def _vision(layers: int) -> dict[str, int]:
    """The shape that plain vision transformers share."""
    return {
        "hidden_size": 128,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "intermediate_size": 512,
        "image_size": 64,
        "patch_size": 16,
        "num_labels": 10,
    }


def gpt2(layers: int = 8) -> nn.Module:
    return hf.GPT2LMHeadModel(
        hf.GPT2Config(vocab_size=VOCABULARY, n_embd=128, n_layer=layers, n_head=4, n_positions=64, **_ids())
    )


def llama(layers: int = 8) -> nn.Module:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**_decoder(layers), **_ids()))


def bert(layers: int = 12) -> nn.Module:
    return hf.BertForMaskedLM(hf.BertConfig(**_encoder(layers)))


def vit(layers: int = 12) -> nn.Module:
    return hf.ViTForImageClassification(hf.ViTConfig(**_vision(layers)))


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
    text = _encoder(6) | {"max_position_embeddings": 16, "bos_token_id": 1, "eos_token_id": VOCABULARY - 1}
    return hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config=_vision(12), projection_dim=64))


def siglip() -> nn.Module:
    text = _encoder(6) | {"max_position_embeddings": 16, "projection_size": 128}
    return hf.SiglipModel(hf.SiglipConfig(text_config=text, vision_config=_vision(12)))


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


def shipped() -> tuple[Case, ...]:
    """Every architecture of the healthy zoo that transformers ships."""
    return (*_decoders(), *_recurrent(), *_encoders(), *_encoder_decoders(), *_images())


def _decoders() -> tuple[Case, ...]:
    def one(name: str, model: Callable[[], nn.Module], residuals: int) -> Case:
        return _case(name, "decoder", model, tokens, residuals)

    experts = {"num_local_experts": 8, "num_experts_per_tok": 2}
    return (
        one("gpt2", gpt2, 16),
        one("llama", llama, 16),
        one("qwen3", lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**_decoder(8), head_dim=32)), 16),
        one(
            "gemma2", lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**_decoder(8), head_dim=32, **_ids())), 16
        ),
        one(
            "gemma3",
            lambda: hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**_decoder(12), head_dim=32, **_ids())),
            24,
        ),
        one("olmo2", lambda: hf.Olmo2ForCausalLM(hf.Olmo2Config(**_decoder(8), **_ids())), 16),
        one("granite", lambda: hf.GraniteForCausalLM(hf.GraniteConfig(**_decoder(8), **_ids())), 16),
        one("cohere (parallel)", lambda: hf.CohereForCausalLM(hf.CohereConfig(**_decoder(8), **_ids())), 8),
        one("phi (parallel)", lambda: hf.PhiForCausalLM(hf.PhiConfig(**_decoder(8), **_ids())), 8),
        one(
            "gpt_neox (parallel)", lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**_encoder(8), **_ids())), 8
        ),
        one(
            "opt",
            lambda: hf.OPTForCausalLM(
                hf.OPTConfig(
                    vocab_size=VOCABULARY,
                    hidden_size=128,
                    ffn_dim=512,
                    num_hidden_layers=12,
                    num_attention_heads=4,
                    max_position_embeddings=64,
                    word_embed_proj_dim=128,
                )
            ),
            24,
        ),
        one(
            "bloom",
            lambda: hf.BloomForCausalLM(
                hf.BloomConfig(vocab_size=VOCABULARY, hidden_size=128, n_layer=8, n_head=4, **_ids())
            ),
            16,
        ),
        one(
            "mixtral", lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**_decoder(6), **experts, **_ids())), 12
        ),
        one(
            "gpt_oss",
            lambda: hf.GptOssForCausalLM(hf.GptOssConfig(**_decoder(6), **experts, head_dim=32, **_ids())),
            12,
        ),
        one(
            "deepseek_v3",
            lambda: hf.DeepseekV3ForCausalLM(
                hf.DeepseekV3Config(
                    **(_decoder(6) | {"num_key_value_heads": 4}),
                    **_ids(),
                    moe_intermediate_size=64,
                    n_routed_experts=8,
                    n_group=2,
                    topk_group=1,
                    num_experts_per_tok=2,
                    first_k_dense_replace=1,
                    q_lora_rank=32,
                    kv_lora_rank=32,
                    qk_rope_head_dim=16,
                    qk_nope_head_dim=16,
                    v_head_dim=32,
                )
            ),
            12,
        ),
    )


def _recurrent() -> tuple[Case, ...]:
    def one(name: str, model: Callable[[], nn.Module], residuals: int) -> Case:
        return _case(name, "state space", model, tokens, residuals)

    small = {"vocab_size": VOCABULARY, "hidden_size": 64, "state_size": 8, **_ids()}
    return (
        one("mamba", lambda: hf.MambaForCausalLM(hf.MambaConfig(**small, num_hidden_layers=16)), 16),
        one(
            "mamba2",
            lambda: hf.Mamba2ForCausalLM(
                hf.Mamba2Config(
                    **small, num_hidden_layers=12, num_heads=8, head_dim=16, n_groups=1, chunk_size=16
                )
            ),
            12,
        ),
        one(
            "rwkv",
            lambda: hf.RwkvForCausalLM(
                hf.RwkvConfig(
                    vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=12, context_length=64, **_ids()
                )
            ),
            24,
        ),
        one(
            "recurrent_gemma",
            lambda: hf.RecurrentGemmaForCausalLM(
                hf.RecurrentGemmaConfig(
                    vocab_size=VOCABULARY,
                    hidden_size=64,
                    intermediate_size=192,
                    num_hidden_layers=6,
                    num_attention_heads=4,
                    num_key_value_heads=1,
                    head_dim=16,
                    lru_width=64,
                    attention_window_size=16,
                    **_ids(),
                )
            ),
            12,
        ),
    )


def _encoders() -> tuple[Case, ...]:
    def one(name: str, model: Callable[[], nn.Module], residuals: int) -> Case:
        return _case(name, "encoder", model, tokens, residuals)

    return (
        one("bert", bert, 24),
        one(
            "roberta-prelayernorm",
            lambda: hf.RobertaPreLayerNormForMaskedLM(hf.RobertaPreLayerNormConfig(**_encoder(12))),
            24,
        ),
        one(
            "electra", lambda: hf.ElectraForMaskedLM(hf.ElectraConfig(**_encoder(12), embedding_size=64)), 24
        ),
        one(
            "albert (shared)",
            lambda: hf.AlbertForMaskedLM(hf.AlbertConfig(**_encoder(12), embedding_size=64)),
            24,
        ),
        one(
            "deberta-v2",
            lambda: hf.DebertaV2ForMaskedLM(
                hf.DebertaV2Config(
                    **_encoder(12), relative_attention=True, position_buckets=16, pos_att_type=["p2c", "c2p"]
                )
            ),
            24,
        ),
        one(
            "modernbert",
            lambda: hf.ModernBertForMaskedLM(
                hf.ModernBertConfig(**_encoder(12), **_ids(), cls_token_id=1, sep_token_id=2)
            ),
            24,
        ),
        one(
            "distilbert",
            lambda: hf.DistilBertForMaskedLM(
                hf.DistilBertConfig(
                    vocab_size=VOCABULARY,
                    dim=128,
                    hidden_dim=512,
                    n_layers=6,
                    n_heads=4,
                    max_position_embeddings=64,
                )
            ),
            12,
        ),
    )


def _encoder_decoders() -> tuple[Case, ...]:
    return (
        _case("t5", "encoder-decoder", t5, pairs, 2 * 6 + 1),
        _case("bart", "encoder-decoder", bart, pairs, 2 * 6 + 1),
        _case("whisper", "encoder-decoder", whisper, spectrograms, 2 * 4 + 1),
        _case("wav2vec2", "speech", lambda: hf.Wav2Vec2ForCTC(_speech(hf.Wav2Vec2Config)), waves, 2 * 12 + 1),
        _case("hubert", "speech", lambda: hf.HubertForCTC(_speech(hf.HubertConfig)), waves, 2 * 12 + 1),
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
        _case("patchtst", "time series", patchtst, series, 8),
    )


def _images() -> tuple[Case, ...]:
    def one(name: str, model: Callable[[], nn.Module], residuals: int, size: int = 64) -> Case:
        return _case(name, "vision", model, images(size), residuals)

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
        one("dinov2", lambda: hf.Dinov2ForImageClassification(hf.Dinov2Config(**_vision(12))), 24),
        one("beit", lambda: hf.BeitForImageClassification(hf.BeitConfig(**_vision(12))), 24),
        one("swin", lambda: hf.SwinForImageClassification(
            hf.SwinConfig(image_size=128, embed_dim=32, depths=[2, 2, 6, 2], num_heads=[2, 4, 8, 16], window_size=4,
                          num_labels=10)
        ), 24, 128),
        one("segformer", lambda: hf.SegformerForImageClassification(hf.SegformerConfig(num_labels=10)), 16),
        one("poolformer", lambda: hf.PoolFormerForImageClassification(
            hf.PoolFormerConfig(hidden_sizes=[32, 64, 128, 256], depths=[2, 2, 6, 2], num_labels=10)
        ), 24),
    )  # fmt: skip
