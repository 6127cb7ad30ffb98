"""The architectures that transformers ships: their batches, their shapes and how they become cases.

Widths are small so that a forward and a backward take about a second; what makes the architecture -
the kinds of blocks, their number, norms, skips, initialisation, dropout, tied weights - is kept.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from gallery.case import Built, Case

VOCABULARY = 500
Batch = Callable[[], dict[str, Tensor]]
Make = Callable[[], nn.Module]

TRUTH = (
    "a published architecture with its own initialisation; it fits its batch (python -m gallery.establish)"
)


def tokens() -> dict[str, Tensor]:
    """Two sequences of 32 tokens, each its own label."""
    ids = torch.randint(5, VOCABULARY, (2, 32))
    return {"input_ids": ids, "labels": ids}


def images(size: int = 64) -> Batch:
    """Four images of ten classes."""
    return lambda: {"pixel_values": torch.randn(4, 3, size, size), "labels": torch.randint(10, (4,))}


def built(model: Make, batch: Batch, seed: int = 0) -> Built:
    """A model in training mode with its own loss on one fixed batch."""
    torch.manual_seed(seed)
    made = model().train()
    inputs = batch()

    def loss(m: nn.Module) -> Tensor:
        return m(**inputs).loss

    return made, loss


def case(name: str, family: str, model: Make, batch: Batch, residuals: int | None) -> Case:
    return Case(name, family, lambda: built(model, batch), "healthy", truth=TRUTH, residuals=residuals)


def decoder(layers: int) -> dict[str, int]:
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


def ids() -> dict[str, int]:
    return {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def encoder(layers: int) -> dict[str, int]:
    """The shape that BERT and its relatives share."""
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
    }


def vision(layers: int) -> dict[str, int]:
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
