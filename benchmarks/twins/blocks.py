"""Networks with skips: residual MLPs and CNNs, transformers by hand and as transformers builds them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import transformers as hf
from torch import Tensor, nn

from benchmarks.twins import faults
from benchmarks.twins.case import Case, Make, Plant
from benchmarks.twins.data import CONTEXT, VOCABULARY, Task, digits, images, text
from gallery.nets import HE, Attention, FeedForward, Shape, initialised

DOWN, UP, DECOY = "vanishing", "exploding", "decoy"


class Skip(nn.Module):
    """skip * x + scale * branch(x); with `norm`, the sum is normalised (post-norm)."""

    def __init__(
        self, branch: nn.Module, *, skip: float = 1.0, scale: float = 1.0, norm: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.branch, self.skip, self.scale = branch, skip, scale
        self.norm = norm if norm is not None else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.skip * x + self.scale * self.branch(x))


def residual_mlp(blocks: int, width: int = 48) -> nn.Module:
    """Pre-norm blocks of two layers."""

    def branch() -> nn.Module:
        inner = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))
        return nn.Sequential(nn.LayerNorm(width), initialised(inner, HE))

    body = [Skip(branch(), scale=blocks**-0.5) for _ in range(blocks)]
    return nn.Sequential(nn.Linear(64, width), *body, nn.LayerNorm(width), nn.Linear(width, 10))


def bare_residual_mlp(blocks: int, width: int = 48) -> nn.Module:
    """No norm at all; branches scaled by 1/sqrt(blocks)."""

    def branch() -> nn.Module:
        return initialised(nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width)), HE)

    body = [Skip(branch(), scale=blocks**-0.5) for _ in range(blocks)]
    return nn.Sequential(nn.Linear(64, width), *body, nn.Linear(width, 10))


def residual_cnn(blocks: int, channels: int = 8) -> nn.Module:
    """Pre-activation blocks with batch normalisation."""

    def branch() -> nn.Module:
        layers: list[nn.Module] = []
        for _ in range(2):
            layers += [nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, channels, 3, padding=1)]
        return nn.Sequential(*layers)

    body = [Skip(branch()) for _ in range(blocks)]
    tail = [nn.BatchNorm2d(channels), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(nn.Conv2d(1, channels, 3, padding=1), *body, *tail, nn.Linear(channels, 10))


class Decoder(nn.Module):
    """A small language model, its blocks pre- or post-norm."""

    def __init__(self, layers: int, norm: str, width: int = 32) -> None:
        super().__init__()
        self.token = nn.Embedding(VOCABULARY, width)
        self.position = nn.Parameter(0.1 * torch.randn(CONTEXT, width))
        shape = Shape(layers, width=width, heads=2)
        blocks: list[nn.Module] = []
        for _ in range(layers):
            for branch in (Attention(shape), FeedForward(width)):
                blocks.append(
                    Skip(nn.Sequential(nn.LayerNorm(width), branch))
                    if norm == "pre"
                    else Skip(branch, norm=nn.LayerNorm(width))
                )
        self.blocks = initialised(nn.Sequential(*blocks), nn.init.xavier_uniform_)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.token(tokens) + self.position)))


def _each(
    model: str,
    family: str,
    make: Make,
    planted: dict[str, tuple[str, Plant]],
    task: Callable[[], Task],
    **training: float,
) -> Iterator[Case]:
    for fault, (kind, plant) in planted.items():
        yield Case(f"{model} / {fault}", family, make, plant, task, kind, **training)  # type: ignore[arg-type]


NO_SKIP = faults.attribute("skip", 0.0)


def residuals() -> Iterator[Case]:
    normed: dict[str, tuple[str, Plant]] = {
        "no skips": (DOWN, NO_SKIP),
        "skips x 0.3": (DOWN, faults.attribute("skip", 0.3)),
        "gains N(0, 0.02), no skips": (DOWN, _both(faults.SMALL_GAINS, NO_SKIP)),
    }
    for blocks in (10, 20):
        yield from _each(
            f"residual mlp {blocks}", "residual", lambda b=blocks: residual_mlp(b), normed, digits
        )
    bare: dict[str, tuple[str, Plant]] = {
        "no skips": (DOWN, NO_SKIP),
        "branches x 4": (UP, faults.attribute("scale", 2.0)),
        "skips x 2": (UP, faults.attribute("skip", 2.0)),
        "weights x 4": (UP, faults.rescale(4.0)),
    }
    for blocks in (10, 20):
        yield from _each(
            f"bare residual mlp {blocks}", "residual", lambda b=blocks: bare_residual_mlp(b), bare, digits
        )
    convolutional: dict[str, tuple[str, Plant]] = {
        "no skips": (DOWN, NO_SKIP),
        "skips x 0.3": (DOWN, faults.attribute("skip", 0.3)),
        "epsilon 10000": (DOWN, faults.epsilon(1e4)),
        "nothing": (DECOY, faults.unchanged),
    }
    for blocks in (4, 6):
        make = _residual_cnn(blocks)
        yield from _each(f"residual cnn {blocks}", "residual", make, convolutional, images, lr=3e-3)
    yield from _each(
        "residual mlp 10",
        "residual",
        lambda: residual_mlp(10),
        {
            "branches that start at 0": (DECOY, faults.attribute("scale", 0.01)),
            "a small head": (DECOY, faults.small_head),
        },
        digits,
    )


def _residual_cnn(blocks: int) -> Make:
    return lambda: residual_cnn(blocks)


def _both(first: Plant, second: Plant) -> Plant:
    def plant(model: nn.Module) -> None:
        first(model)
        second(model)

    return plant


def transformers() -> Iterator[Case]:
    pre: dict[str, tuple[str, Plant]] = {
        "no skips": (DOWN, NO_SKIP),
        "skips x 0.3": (DOWN, faults.attribute("skip", 0.3)),
        "weights x 8": (UP, faults.rescale(8.0)),
        "epsilon 10000": (DOWN, faults.epsilon(1e4)),
        "gains N(0, 0.02)": (DOWN, faults.SMALL_GAINS),
    }
    post: dict[str, tuple[str, Plant]] = {
        "no skips": (DOWN, NO_SKIP),
        "skips x 0.3": (DOWN, faults.attribute("skip", 0.3)),
        "branches x 5": (UP, faults.attribute("scale", 5.0)),
        "epsilon 10000": (DOWN, faults.epsilon(1e4)),
        "gains N(0, 0.02)": (DOWN, faults.SMALL_GAINS),
    }
    for layers in (3, 6):
        for norm, planted in (("pre", pre), ("post", post)):
            lr = 3e-3 if (layers, norm) == (6, "post") else 6e-3  # at 6e-3 its twin hardly learns
            make = _decoder(layers, norm)
            yield from _each(
                f"{norm}-norm decoder {layers}", "transformer", make, planted, text, lr=lr, steps=200
            )
    none: dict[str, tuple[str, Plant]] = {"nothing": (DECOY, faults.unchanged)}
    yield from _each("pre-norm decoder 3", "transformer", _decoder(3, "pre"), none, text, lr=6e-3, steps=200)


def _decoder(layers: int, norm: str) -> Make:
    return lambda: Decoder(layers, norm)


SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}


def gpt2() -> nn.Module:
    return hf.GPT2LMHeadModel(
        hf.GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=32,
            n_layer=3,
            n_head=2,
            n_positions=CONTEXT,
            bos_token_id=0,
            eos_token_id=0,
            resid_pdrop=0.0,  # a tenth of 32 features dropped everywhere, and the twin learns next to nothing
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
    )


def llama() -> nn.Module:
    return hf.LlamaForCausalLM(
        hf.LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=CONTEXT, **SIZES)
    )


def neox() -> nn.Module:
    return hf.GPTNeoXForCausalLM(
        hf.GPTNeoXConfig(vocab_size=VOCABULARY, max_position_embeddings=CONTEXT, **SIZES)
    )


def vit() -> nn.Module:
    return hf.ViTForImageClassification(
        hf.ViTConfig(image_size=8, patch_size=2, num_channels=1, num_labels=10, **SIZES)
    )


def shipped() -> Iterator[Case]:
    planted: dict[str, tuple[str, Plant]] = {
        "gains N(0, 0.02)": (DOWN, faults.SMALL_GAINS),
        "epsilon 10000": (DOWN, faults.epsilon(1e4)),
        "weights N(0, 2)": (UP, faults.redraw(2.0)),
        "nothing": (DECOY, faults.unchanged),
    }
    for name, make, task, lr, steps in (
        ("gpt2", gpt2, text, 3e-3, 400),  # its weights of N(0, 0.02) are slow at this width
        ("llama", llama, text, 6e-3, 200),
        ("gpt-neox", neox, text, 6e-3, 200),
        ("vit", vit, images, 6e-3, 200),
    ):
        yield from _each(f"{name} of transformers", "transformers", make, planted, task, lr=lr, steps=steps)


def blocks() -> Iterator[Case]:
    yield from residuals()
    yield from transformers()
    yield from shipped()
