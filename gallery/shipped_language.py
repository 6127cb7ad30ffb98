"""Language models as transformers ships them; the residual additions are counted from each architecture."""

from __future__ import annotations

import transformers as hf
from torch import nn

from gallery.case import Case
from gallery.shipped import VOCABULARY, Make, case, decoder, encoder, ids, tokens


def gpt2(layers: int = 8) -> nn.Module:
    return hf.GPT2LMHeadModel(
        hf.GPT2Config(vocab_size=VOCABULARY, n_embd=128, n_layer=layers, n_head=4, n_positions=64, **ids())
    )


def llama(layers: int = 8) -> nn.Module:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**decoder(layers), **ids()))


def bert(layers: int = 12) -> nn.Module:
    return hf.BertForMaskedLM(hf.BertConfig(**encoder(layers)))


def _decoders() -> tuple[Case, ...]:
    def one(name: str, model: Make, residuals: int) -> Case:
        return case(name, "decoder", model, tokens, residuals)

    experts = {"num_local_experts": 8, "num_experts_per_tok": 2}
    return (
        one("gpt2", gpt2, 16),
        one("llama", llama, 16),
        one("qwen3", lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**decoder(8), head_dim=32)), 16),
        one("gemma2", lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**decoder(8), head_dim=32, **ids())), 16),
        one(
            "gemma3",
            lambda: hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**decoder(12), head_dim=32, **ids())),
            24,
        ),
        one("olmo2", lambda: hf.Olmo2ForCausalLM(hf.Olmo2Config(**decoder(8), **ids())), 16),
        one("granite", lambda: hf.GraniteForCausalLM(hf.GraniteConfig(**decoder(8), **ids())), 16),
        one("cohere (parallel)", lambda: hf.CohereForCausalLM(hf.CohereConfig(**decoder(8), **ids())), 8),
        one("phi (parallel)", lambda: hf.PhiForCausalLM(hf.PhiConfig(**decoder(8), **ids())), 8),
        one("gpt_neox (parallel)", lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**encoder(8), **ids())), 8),
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
                hf.BloomConfig(vocab_size=VOCABULARY, hidden_size=128, n_layer=8, n_head=4, **ids())
            ),
            16,
        ),
        one("mixtral", lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**decoder(6), **experts, **ids())), 12),
        one(
            "gpt_oss",
            lambda: hf.GptOssForCausalLM(hf.GptOssConfig(**decoder(6), **experts, head_dim=32, **ids())),
            12,
        ),
        one(
            "deepseek_v3",
            lambda: hf.DeepseekV3ForCausalLM(
                hf.DeepseekV3Config(
                    **(decoder(6) | {"num_key_value_heads": 4}),
                    **ids(),
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
    def one(name: str, model: Make, residuals: int) -> Case:
        return case(name, "state space", model, tokens, residuals)

    small = {"vocab_size": VOCABULARY, "hidden_size": 64, "state_size": 8, **ids()}
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
                    vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=12, context_length=64, **ids()
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
                    **ids(),
                )
            ),
            12,
        ),
    )


def _encoders() -> tuple[Case, ...]:
    def one(name: str, model: Make, residuals: int) -> Case:
        return case(name, "encoder", model, tokens, residuals)

    return (
        one("bert", bert, 24),
        one(
            "roberta-prelayernorm",
            lambda: hf.RobertaPreLayerNormForMaskedLM(hf.RobertaPreLayerNormConfig(**encoder(12))),
            24,
        ),
        one("electra", lambda: hf.ElectraForMaskedLM(hf.ElectraConfig(**encoder(12), embedding_size=64)), 24),
        one(
            "albert (shared)",
            lambda: hf.AlbertForMaskedLM(hf.AlbertConfig(**encoder(12), embedding_size=64)),
            24,
        ),
        one(
            "deberta-v2",
            lambda: hf.DebertaV2ForMaskedLM(
                hf.DebertaV2Config(
                    **encoder(12), relative_attention=True, position_buckets=16, pos_att_type=["p2c", "c2p"]
                )
            ),
            24,
        ),
        one(
            "modernbert",
            lambda: hf.ModernBertForMaskedLM(
                hf.ModernBertConfig(**encoder(12), **ids(), cls_token_id=1, sep_token_id=2)
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
        one(  # its Fourier transforms pass complex numbers
            "fnet",
            lambda: hf.FNetForMaskedLM(
                hf.FNetConfig(
                    vocab_size=VOCABULARY,
                    hidden_size=128,
                    num_hidden_layers=12,
                    intermediate_size=512,
                    max_position_embeddings=64,
                )
            ),
            24,
        ),
        one(  # every layer reads a table of positions
            "xlnet",
            lambda: hf.XLNetLMHeadModel(
                hf.XLNetConfig(vocab_size=VOCABULARY, d_model=128, n_layer=8, n_head=4, d_inner=512)
            ),
            16,
        ),
    )


def language_models() -> tuple[Case, ...]:
    """Decoders, state-space models and encoders."""
    return (*_decoders(), *_recurrent(), *_encoders())
