"""The healthy zoo: architectures that train, with everything that looks like a fault and is none.

LayerScale at 1e-6, experts that saw no token, CLIP's logit scale, zero-initialised heads and adapters,
tied weights, frozen parts and losses in odd units all belong here: a check that calls one of them sick
raises a false alarm.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from gallery.case import Built, Case
from gallery.handmade import (
    Checkpointed,
    ClampedRoot,
    Data,
    Equilibrium,
    LastOf,
    Make,
    PostNorm,
    Recurrent,
    Siamese,
    actor_critic,
    adapted,
    autoencoder,
    deeply_supervised,
    differential_equation,
    digit_batch,
    frozen_backbone,
    half,
    in_bfloat16,
    on,
    pictures,
    regression,
    rescaled,
    segmentation,
    token_batch,
    variational,
    zero_branches,
    zero_gamma,
    zero_head,
)
from gallery.nets import (
    HE,
    Shape,
    Transformer,
    densenet,
    mixer,
    mlp,
    orthogonal,
    residual_mlp,
    scaled_normal,
    vgg,
)
from gallery.shipped import TRUTH, built, images, tokens
from gallery.shipped_language import gpt2, language_models
from gallery.shipped_senses import sensing_models, vit


def handmade() -> tuple[Case, ...]:
    """Networks of torch's own parts, their truth established by training them."""

    def case(
        name: str, model: Make, data: Data, residuals: int | None = None, *, family: str = "plain"
    ) -> Case:
        truth = "fits its batch or its task (python -m gallery.establish)"
        return Case(name, family, lambda: on(model, data), "healthy", truth=truth, residuals=residuals)

    lecun = scaled_normal(1.0)
    ones = torch.ones(64)
    return (
        case("lstm, 6 layers", lambda: Recurrent(nn.LSTM(64, 64, 6, batch_first=True)), token_batch, 0),
        case("gru, 2 layers", lambda: Recurrent(nn.GRU(64, 64, 2, batch_first=True)), token_batch, 0),
        case("lstm over rows", lambda: LastOf(nn.LSTM(8, 64, 2, batch_first=True)), digit_batch, 0),
        case("torch encoder, post-norm, 24 layers", PostNorm, token_batch, 48, family="transformer"),
        case("pre-norm, 12 layers", lambda: Transformer(Shape(12)), token_batch, 24, family="transformer"),
        case("pre-norm, 48 layers", lambda: Transformer(Shape(48)), token_batch, 96, family="transformer"),
        case(
            "post-norm, 6 layers",
            lambda: Transformer(Shape(6, norm="post")),
            token_batch,
            12,
            family="transformer",
        ),
        case(
            "deepnorm, 48 layers",
            lambda: Transformer(Shape(48, norm="deep")),
            token_batch,
            96,
            family="transformer",
        ),
        case(
            "checkpointed", lambda: Checkpointed(Transformer(Shape(8))), token_batch, 16, family="transformer"
        ),
        case("rezero, 50 blocks", lambda: residual_mlp(50, 64, torch.zeros(1), nn.ReLU), digit_batch, 50),
        case(
            "layerscale 1e-6, 24 blocks", lambda: residual_mlp(24, 64, 1e-6 * ones, nn.GELU), digit_batch, 24
        ),
        case("zero-initialised branches", zero_branches, digit_batch, 16),
        case("zero-initialised gammas", zero_gamma, pictures(), 9),
        case("zero-initialised head", zero_head, digit_batch, 0),
        case("low-rank adapters", adapted, digit_batch),
        case("frozen body", frozen_backbone, digit_batch, 0),
        case("vgg with batch norm", lambda: vgg((2, 2, 3, 3), 16), pictures(64), 0),
        case("densenet-121", lambda: densenet((6, 12, 24, 16), 16), pictures(64), 0),
        case(
            "mlp-mixer",
            lambda: mixer(8, 16, 64),
            lambda: (torch.randn(4, 16, 48), torch.randint(10, (4,))),
            16,
        ),
        case("tanh orthogonal, 50 layers", lambda: mlp(nn.Tanh, 50, 128, orthogonal(1.05)), digit_batch, 0),
        case("relu He, 30 layers", lambda: mlp(nn.ReLU, 30, 256, HE), digit_batch, 0),
        case("selu LeCun, 20 layers", lambda: mlp(nn.SELU, 20, 128, lecun), digit_batch, 0),
        case("relu He, 8 layers", lambda: mlp(nn.ReLU, 8, 128, HE), digit_batch, 0),
        case(
            "relu He, 8 layers, bfloat16", half(lambda: mlp(nn.ReLU, 8, 128, HE)), in_bfloat16(digit_batch), 0
        ),
        case("relu He, rescaled by 30 and 1/30", rescaled, digit_batch, 0),
        case("relu default, 5 layers", lambda: mlp(nn.ReLU, 5, 128, None), digit_batch, 0),
        case("sigmoid default, 2 layers", lambda: mlp(nn.Sigmoid, 2, 128, None), digit_batch, 0),
        case("tanh default, 5 layers", lambda: mlp(nn.Tanh, 5, 128, None), digit_batch, 0),
        case("logistic regression", lambda: nn.Sequential(nn.Linear(64, 10)), digit_batch, 0),
        case("siamese", Siamese, lambda: (digit_batch()[0], torch.arange(64).roll(-1)), 0),
        case("root of a clamped value", ClampedRoot, digit_batch, 0),
        Case("autoencoder", "plain", autoencoder, "healthy", truth=TRUTH, residuals=0),
        Case("tanh regression", "plain", regression, "healthy", truth=TRUTH, residuals=0),
        Case("deep supervision", "plain", deeply_supervised, "healthy", truth=TRUTH, residuals=0),
        case("equilibrium, 60 steps", Equilibrium, digit_batch),
        Case(
            "actor and critic, returns in thousands",
            "plain",
            actor_critic,
            "healthy",
            truth=TRUTH,
            residuals=0,
        ),
        Case("variational autoencoder", "plain", variational, "healthy", truth=TRUTH, residuals=0),
        Case("differential equation", "plain", differential_equation, "healthy", truth=TRUTH, residuals=0),
        Case("u-net", "vision", segmentation, "healthy", truth=TRUTH, residuals=0),
    )


def units() -> tuple[Case, ...]:
    """Healthy models whose loss is in another unit: an AMP scale is such a factor."""

    def scaled(name: str, build: Callable[[], Built], factor: float) -> Case:
        def scale() -> Built:
            model, loss = build()
            return model, lambda m: loss(m) * factor

        return Case(f"{name}, loss x {factor:g}", "unit", scale, "healthy", truth="a change of unit")

    relu = lambda: on(lambda: mlp(nn.ReLU, 8, 128, HE), digit_batch)  # noqa: E731
    factors = (1e-8, 65536.0)
    return (
        *(scaled("relu He, 8 layers", relu, factor) for factor in factors),
        *(scaled("gpt2", lambda: built(gpt2, tokens), factor) for factor in factors),
        *(scaled("vit", lambda: built(vit, images()), factor) for factor in factors),
    )


def healthy() -> tuple[Case, ...]:
    """Every case of the healthy zoo."""
    return (*language_models(), *sensing_models(), *handmade(), *units())
