"""Faults injected into residual networks and transformers, hand-made and as transformers ships them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import transformers as hf
from torch import Tensor, nn

from gallery.nets import HE, GatedConvolution, Shape, Transformer, WaveNet, initialised, residual_mlp
from gallery.shipped import VOCABULARY
from gallery.shipped_language import bert, gpt2, llama
from gallery.shipped_senses import resnet
from gallery.training import Task, copying, digits, memorising
from gallery.trial import Make, Trial, Twin

VOCABULARY_OF_COPYING = 16
Change = Callable[[nn.Module], None]


def decoder(norm: str, layers: int) -> Shape:
    return Shape(layers, norm=norm, vocabulary=VOCABULARY_OF_COPYING)


def _transformer(name: str, shape: Shape, verdict: str, causes: set[str], norm: str = "pre") -> Trial:
    sound = decoder(norm, shape.layers)
    twin = Twin(f"{norm}-norm, {shape.layers} layers", lambda: Transformer(sound))
    return Trial(
        name,
        "transformer",
        lambda: Transformer(shape),
        twin,
        copying,
        verdict,
        frozenset(causes),
        steps=200,
        grids="quick",
    )


def transformers() -> tuple[Trial, ...]:
    """A decoder language model with one thing wrong."""
    pre, post, bare = decoder("pre", 12), decoder("post", 12), decoder("none", 12)
    down, up = "vanishing", "exploding"
    grown = {"residual-branch-growth", "missing-normalisation"}
    return (
        _transformer("no norm, 12 layers", bare, up, grown),
        _transformer(
            "no norm, initialisation x 2, 12 layers", replace(bare, gain=2.0), up, grown | {"initialisation"}
        ),
        _transformer("no norm, branch x 2, 12 layers", replace(bare, branch=2.0), up, grown),
        _transformer("no norm, initialisation x 0.2, 12 layers", replace(bare, gain=0.2), up, grown),
        _transformer(
            "pre-norm, initialisation x 3, 12 layers", replace(pre, gain=3.0), up, {"initialisation"}
        ),
        _transformer(
            "pre-norm, initialisation x 0.2, 12 layers", replace(pre, gain=0.2), down, {"initialisation"}
        ),
        _transformer(
            "pre-norm, branch x 2, 12 layers", replace(pre, branch=2.0), up, {"residual-branch-growth"}
        ),
        _transformer(
            "pre-norm, no skips, 12 layers", replace(pre, residual=False), down, {"missing-residual"}
        ),
        _transformer(
            "pre-norm, no skips, 6 layers", replace(pre, layers=6, residual=False), down, {"missing-residual"}
        ),
        _transformer(
            "post-norm, no skips, 12 layers",
            replace(post, residual=False),
            down,
            {"missing-residual"},
            "post",
        ),
        _transformer(
            "post-norm, branch x 2, 12 layers",
            replace(post, branch=2.0),
            up,
            {"residual-branch-growth"},
            "post",
        ),
        _transformer(
            "post-norm, initialisation x 3, 12 layers",
            replace(post, gain=3.0),
            down,
            {"initialisation"},
            "post",
        ),
        _transformer(
            "post-norm, epsilon 100, 12 layers", replace(post, eps=100.0), down, {"norm-epsilon"}, "post"
        ),
        _transformer(
            "post-norm, epsilon 1e4, 12 layers", replace(post, eps=1e4), down, {"norm-epsilon"}, "post"
        ),
        _transformer("pre-norm, epsilon 1e4, 12 layers", replace(pre, eps=1e4), down, {"norm-epsilon"}),
    )


def scaled_gammas(shape: Shape, gamma: float) -> nn.Module:
    """All norm gains set to one number."""
    model = Transformer(shape)
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            nn.init.constant_(module.weight, gamma)
    return model


def residuals() -> tuple[Trial, ...]:
    """Residual MLPs and the gains of norms."""
    grown = frozenset({"residual-branch-growth", "missing-normalisation"})
    sound = Twin("rezero, 40 blocks", lambda: residual_mlp(40, 64, torch.zeros(1), nn.ReLU))
    post = decoder("post", 12)

    def loud(scale: float, blocks: int) -> nn.Module:
        return initialised(residual_mlp(blocks, 64, torch.full((1,), scale), nn.ReLU), HE)

    def gain(name: str, gamma: float) -> Trial:
        return Trial(
            name, "transformer", lambda: scaled_gammas(post, gamma), Twin("post-norm, 12 layers", lambda: Transformer(post)),
            copying, "vanishing", frozenset({"norm-gain"}), steps=200, grids="quick",
        )  # fmt: skip

    def residual(name: str, make: Make) -> Trial:
        return Trial(name, "residual", make, sound, digits, "exploding", grown)

    return (
        residual("residual mlp, branch x 1, He, 40 blocks", lambda: loud(1.0, 40)),
        residual("residual mlp, branch x 2, He, 20 blocks", lambda: loud(2.0, 20)),
        residual("residual mlp, branch x 0.5, He, 40 blocks", lambda: loud(0.5, 40)),
        gain("post-norm, gains 0.02, 12 layers", 0.02),
        gain("post-norm, gains 0.2, 12 layers", 0.2),
    )


def in_branches() -> tuple[Trial, ...]:
    """Faults inside of branches, which the skips lead by."""

    def wavenet(factor: float) -> nn.Module:
        model = WaveNet(8, vocabulary=VOCABULARY_OF_COPYING)
        for module in model.modules():
            if isinstance(module, GatedConvolution):
                with torch.no_grad():
                    module.filter.weight.mul_(factor)
                    module.gate.weight.mul_(factor)
        return model

    def gated(factor: float) -> Trial:
        return Trial(
            f"wavenet, filters and gates x {factor:g}", "wavenet", lambda: wavenet(factor),
            Twin("wavenet, 8 blocks", lambda: wavenet(1.0)), copying, "sick", frozenset({"initialisation"}),
            frozenset({"SA301"}), steps=150, grids="quick",
        )  # fmt: skip

    muted = replace(decoder("pre", 6), branch=1e-4)
    return (
        gated(16.0),
        gated(200.0),
        _transformer("pre-norm, branches times a constant 1e-4, 6 layers", muted, "vanishing", {"factor"}),
    )


# --- what transformers ships, with one thing changed -------------------------------------------------


def memorise_tokens() -> Task:
    """Two sequences of 24 tokens, each token's answer the next."""
    x = torch.randint(5, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(3))
    return memorising(x, x.roll(-1, 1), VOCABULARY)


def memorise_images() -> Task:
    """Eight images of ten classes, all different."""
    generator = torch.Generator().manual_seed(3)
    return memorising(torch.randn(8, 3, 32, 32, generator=generator), torch.arange(8), 10)


def changed(make: Make, *changes: Change) -> Make:
    """Build a model, then do something to every module of it."""

    def build() -> nn.Module:
        model = make()
        for change in changes:
            for module in list(model.modules()):
                change(module)
        return model

    return build


NORMS = (nn.LayerNorm, nn.BatchNorm2d)


def without_norms(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, NORMS) or type(child).__name__.endswith("RMSNorm"):
            setattr(module, name, nn.Identity())


def gammas(gain: float) -> Change:
    """Norm gains drawn around 0, as the EfficientNet of transformers 5.23 draws them."""

    def change(module: nn.Module) -> None:
        if isinstance(module, NORMS):
            nn.init.normal_(module.weight, std=gain)

    return change


def epsilon(value: float) -> Change:
    def change(module: nn.Module) -> None:
        if isinstance(module, NORMS):
            module.eps = value
        elif hasattr(module, "variance_epsilon"):
            module.variance_epsilon = value

    return change


def times(factor: float) -> Change:
    """Every linear and convolution weight times a factor."""

    def change(module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Conv2d | hf.pytorch_utils.Conv1D):
            with torch.no_grad():
                module.weight *= factor

    return change


class WithoutSkip(nn.Module):
    """BERT's output block without its addition."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden: Tensor, _: Tensor) -> Tensor:
        return self.inner(hidden, torch.zeros(()))


def without_skips(module: nn.Module) -> None:
    for name, child in module.named_children():
        if type(child).__name__ in ("BertSelfOutput", "BertOutput") and not isinstance(module, WithoutSkip):
            setattr(module, name, WithoutSkip(child))


def efficientnet() -> nn.Module:
    """EfficientNet-B0's blocks from its configuration, half as wide."""
    return hf.EfficientNetForImageClassification(
        hf.EfficientNetConfig(
            image_size=32, width_coefficient=0.5, depth_coefficient=1.0, hidden_dim=640, num_labels=10
        )
    )


def mobilenet() -> nn.Module:
    return hf.MobileNetV2ForImageClassification(hf.MobileNetV2Config(depth_multiplier=0.5, num_labels=10))


def ones(module: nn.Module) -> None:
    if isinstance(module, NORMS):
        nn.init.ones_(module.weight)


def _shipped(
    name: str,
    sound: Make,
    changes: tuple[Change, ...],
    task: Callable[[], Task],
    verdict: str,
    causes: set[str],
) -> Trial:
    twin = Twin(f"{name.split(',')[0]} as shipped", sound)
    return Trial(
        name,
        "shipped",
        changed(sound, *changes),
        twin,
        task,
        verdict,
        frozenset(causes),
        steps=60,
        grids="quick",
    )


def shipped_faults() -> tuple[Trial, ...]:
    """One change to an architecture that transformers ships."""
    down, up = "vanishing", "exploding"
    text, images = memorise_tokens, memorise_images
    grown = {"missing-normalisation", "residual-branch-growth"}
    deep_resnet = lambda: resnet((3, 8, 36, 3))  # noqa: E731
    small_vit = lambda: hf.ViTForImageClassification(  # noqa: E731
        hf.ViTConfig(hidden_size=128, num_hidden_layers=12, num_attention_heads=4, intermediate_size=512,
                     image_size=32, patch_size=8, num_labels=10)
    )  # fmt: skip
    broken = Trial(
        "efficientnet, as shipped in 5.23.0",
        "shipped",
        efficientnet,
        Twin("efficientnet, gammas 1", changed(efficientnet, ones)),
        images,
        down,
        frozenset({"norm-gain"}),
        steps=60,
        grids="quick",
    )
    return (
        broken,
        _shipped("gpt2, weights x 3", gpt2, (times(3.0),), text, up, {"initialisation"}),
        _shipped("gpt2, weights x 0.2", gpt2, (times(0.2),), text, down, {"initialisation"}),
        _shipped("gpt2, no norms, weights x 10", gpt2, (without_norms, times(10.0)), text, up, grown | {"initialisation"}),
        _shipped("llama, no norms, weights x 6", llama, (without_norms, times(6.0)), text, up,
                 grown | {"initialisation"}),
        _shipped("llama, epsilon 1e6", llama, (epsilon(1e6),), text, down, {"norm-epsilon"}),
        _shipped("bert, epsilon 1e4", bert, (epsilon(1e4),), text, down, {"norm-epsilon"}),
        _shipped("bert, gammas around 0", bert, (gammas(0.02),), text, down, {"norm-gain"}),
        _shipped("bert, no skips", bert, (without_skips,), text, down, {"missing-residual"}),
        _shipped("bert, weights x 3", bert, (times(3.0),), text, up, {"initialisation"}),
        _shipped("vit, no norms, weights x 5", small_vit, (without_norms, times(5.0)), images, up,
                 grown | {"initialisation"}),
        _shipped("vit, weights x 3", small_vit, (times(3.0),), images, up, {"initialisation"}),
        _shipped("resnet50, no norms", resnet, (without_norms,), images, up, grown),
        _shipped("resnet152, no norms", deep_resnet, (without_norms,), images, up, grown),
        _shipped("resnet50, weights x 3", resnet, (times(3.0),), images, up, {"initialisation"}),
        _shipped("resnet50, gammas around 0", resnet, (gammas(0.02),), images, down, {"norm-gain"}),
        _shipped("resnet50, epsilon 1e6", resnet, (epsilon(1e6),), images, down, {"norm-epsilon"}),
        _shipped("mobilenet_v2, gammas around 0", mobilenet, (gammas(0.02),), images, down, {"norm-gain"}),
        _shipped("mobilenet_v2, no norms", mobilenet, (without_norms,), images, down,
                 {"missing-normalisation", "initialisation"}),
    )  # fmt: skip


def block_trials() -> tuple[Trial, ...]:
    """Every fault of this file."""
    return (*transformers(), *residuals(), *in_branches(), *shipped_faults())
