"""Faults of plain chains: activation and initialisation against depth, dead units, inputs, missing norms."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from gallery.nets import (
    HE,
    Initialise,
    initialised,
    mlp,
    orthogonal,
    plain_cnn,
    scaled_normal,
    vgg,
    without_head,
)
from gallery.training import Task, digits
from gallery.trial import Trial, Twin

ACTIVATION = frozenset({"activation"})
INITIALISATION = frozenset({"initialisation"})
EITHER = ACTIVATION | INITIALISATION
"""Where both do it: the defaults of nn.Linear under a sigmoid, whose slope is at most 1/4."""


def xavier(gain: float) -> Initialise:
    return lambda w: nn.init.xavier_uniform_(w, gain)


XAVIER = xavier(1.0)
LECUN = scaled_normal(1.0)


def twin(depth: int, width: int = 64) -> Twin:
    """ReLU with He's initialisation at the same depth; orthogonal beyond 30 layers, where He's spreads."""
    if depth <= 30:
        return Twin(f"relu He, {depth} x {width}", lambda: mlp(nn.ReLU, depth, width, HE))
    return Twin(f"tanh orthogonal, {depth} x {width}", lambda: mlp(nn.Tanh, depth, width, orthogonal(1.05)))


def chain(
    name: str,
    activation: Callable[[], nn.Module],
    depth: int,
    weights: Initialise | None,
    verdict: str,
    causes: frozenset[str],
) -> Trial:
    """An MLP on the digits, 64 wide; beyond 50 layers the exact product stands for training."""
    return Trial(
        f"{name}, {depth} layers",
        "mlp",
        lambda: mlp(activation, depth, 64, weights),
        twin(depth),
        digits,
        verdict,
        causes,
        grids="exact" if depth > 50 else "full",
    )


def chains() -> tuple[Trial, ...]:
    """Activation x initialisation x depth."""
    down, up = "vanishing", "exploding"
    return (
        chain("sigmoid default", nn.Sigmoid, 6, None, down, EITHER),
        chain("sigmoid default", nn.Sigmoid, 20, None, down, EITHER),
        chain("sigmoid Xavier", nn.Sigmoid, 6, XAVIER, down, ACTIVATION),
        chain("sigmoid Xavier", nn.Sigmoid, 10, XAVIER, down, ACTIVATION),
        chain("sigmoid Xavier", nn.Sigmoid, 30, XAVIER, down, ACTIVATION),
        chain("sigmoid Xavier", nn.Sigmoid, 100, XAVIER, down, ACTIVATION),
        chain("sigmoid Xavier", nn.Sigmoid, 400, XAVIER, down, ACTIVATION),
        chain("sigmoid, gain 4", nn.Sigmoid, 30, scaled_normal(4), down, EITHER),
        chain("sigmoid, gain 60", nn.Sigmoid, 12, scaled_normal(60), up, EITHER),
        chain("hard sigmoid default", nn.Hardsigmoid, 10, None, down, EITHER),
        chain("softsign default", nn.Softsign, 20, None, down, EITHER),
        chain("tanh default", nn.Tanh, 6, None, down, INITIALISATION),
        chain("tanh default", nn.Tanh, 20, None, down, INITIALISATION),
        chain("tanh default", nn.Tanh, 50, None, down, INITIALISATION),
        chain("tanh default", nn.Tanh, 200, None, down, INITIALISATION),
        chain("tanh, gain 0.5", nn.Tanh, 20, scaled_normal(0.5), down, INITIALISATION),
        chain("tanh, gain 3", nn.Tanh, 20, scaled_normal(3), up, EITHER),
        chain("tanh, gain 3", nn.Tanh, 50, scaled_normal(3), up, EITHER),
        chain("tanh, gain 5/3 (calculate_gain)", nn.Tanh, 50, scaled_normal(5 / 3), up, INITIALISATION),
        chain("tanh, gain 5/3 (calculate_gain)", nn.Tanh, 200, scaled_normal(5 / 3), up, INITIALISATION),
        chain("relu default", nn.ReLU, 6, None, down, INITIALISATION),
        chain("relu default", nn.ReLU, 12, None, down, INITIALISATION),
        chain("relu default", nn.ReLU, 20, None, down, INITIALISATION),
        chain("relu default", nn.ReLU, 50, None, down, INITIALISATION),
        chain("relu default", nn.ReLU, 200, None, down, INITIALISATION),
        chain("relu Xavier", nn.ReLU, 30, XAVIER, down, INITIALISATION),
        chain("relu, half of He", nn.ReLU, 20, scaled_normal(math.sqrt(0.5)), down, INITIALISATION),
        chain("relu, 1.5 x He", nn.ReLU, 30, scaled_normal(1.5 * math.sqrt(2)), up, INITIALISATION),
        chain("relu, 2 x He", nn.ReLU, 20, scaled_normal(2 * math.sqrt(2)), up, INITIALISATION),
        chain("relu, 2.5 x He", nn.ReLU, 12, scaled_normal(2.5 * math.sqrt(2)), up, INITIALISATION),
        chain("relu, 3 x He", nn.ReLU, 20, scaled_normal(3 * math.sqrt(2)), up, INITIALISATION),
        chain("relu, 1.3 x He", nn.ReLU, 200, scaled_normal(1.3 * math.sqrt(2)), up, INITIALISATION),
        chain("leaky relu default", nn.LeakyReLU, 20, None, down, INITIALISATION),
        chain("gelu default", nn.GELU, 6, None, down, EITHER),
        chain("gelu default", nn.GELU, 20, None, down, EITHER),
        chain("gelu default", nn.GELU, 50, None, down, EITHER),
        chain("gelu Xavier", nn.GELU, 30, XAVIER, down, EITHER),
        chain("gelu, gain 4", nn.GELU, 20, scaled_normal(4), up, INITIALISATION),
        chain("elu default", nn.ELU, 20, None, down, INITIALISATION),
        chain("elu default", nn.ELU, 50, None, down, INITIALISATION),
        chain("elu, gain 4", nn.ELU, 20, scaled_normal(4), up, INITIALISATION),
        chain("silu default", nn.SiLU, 12, None, down, EITHER),
        chain("silu default", nn.SiLU, 30, None, down, EITHER),
        chain("silu, gain 4", nn.SiLU, 20, scaled_normal(4), up, INITIALISATION),
        chain("selu, gain 2.5", nn.SELU, 30, scaled_normal(2.5), up, INITIALISATION),
        chain("softplus default", nn.Softplus, 12, None, down, EITHER),
        chain("softplus Xavier", nn.Softplus, 30, XAVIER, down, EITHER),
        chain("softplus, gain 3", nn.Softplus, 30, scaled_normal(3), up, INITIALISATION),
        chain("linear, gain 0.7", nn.Identity, 20, scaled_normal(0.7), down, INITIALISATION),
        chain("linear, gain 1.5", nn.Identity, 30, scaled_normal(1.5), up, INITIALISATION),
    )


def shifted(model: nn.Sequential, bias: float, layers: slice = slice(None)) -> nn.Sequential:
    """Set the hidden biases to a constant."""
    for layer in [m for m in without_head(model) if isinstance(m, nn.Linear)][layers]:
        nn.init.constant_(layer.bias, bias)
    return model


def negative(depth: int) -> nn.Sequential:
    """Weights below zero everywhere behind the first ReLU: each later unit is silent."""
    model = mlp(nn.ReLU, depth, 64, HE)
    with torch.no_grad():
        for layer in [m for m in without_head(model) if isinstance(m, nn.Linear)][1:]:
            layer.weight.copy_(-layer.weight.abs())
    return model


def dead_units() -> tuple[Trial, ...]:
    """ReLUs that no sample opens."""
    dead = frozenset({"dead-units"})

    def one(name: str, make: Callable[[], nn.Module], depth: int) -> Trial:
        return Trial(name, "dead units", make, twin(depth), digits, "vanishing", dead)

    return (
        one("relu, all biases -10", lambda: shifted(mlp(nn.ReLU, 4, 64, HE), -10.0), 4),
        one("relu, first bias -20", lambda: shifted(mlp(nn.ReLU, 4, 64, HE), -20.0, slice(1)), 4),
        one("relu, last bias -20", lambda: shifted(mlp(nn.ReLU, 4, 64, HE), -20.0, slice(-1, None)), 4),
        one("relu, negative weights", lambda: negative(4), 4),
        one("relu, biases -1", lambda: shifted(mlp(nn.ReLU, 8, 64, HE), -1.0), 8),
    )


def moved(shift: float, scale: float) -> Callable[[], Task]:
    """The digits in another unit: x * scale + shift."""

    def task() -> Task:
        plain = digits()

        def sample(generator: torch.Generator) -> tuple[Tensor, Tensor]:
            x, y = plain.batch(generator)
            return x * scale + shift, y

        x, y = plain.held_out
        return Task(plain.name, plain.chance, sample, (x * scale + shift, y))

    return task


def inputs() -> tuple[Trial, ...]:
    """Inputs that nobody normalised."""
    causes = frozenset({"unnormalised-input"})

    def one(
        name: str, activation: Callable[[], nn.Module], task: Callable[[], Task], weights: Initialise | None
    ) -> Trial:
        return Trial(
            name,
            "inputs",
            lambda: mlp(activation, 4, 64, weights),
            Twin(f"{activation.__name__} {'default' if weights is None else 'scaled'}, normalised",
                 lambda: mlp(activation, 4, 64, weights)),
            digits,
            "sick",
            causes,
            frozenset({"UP504", "SA301"}),
            faulty_task=task,
        )  # fmt: skip

    return (
        one("relu, inputs x 10000", nn.ReLU, moved(0, 1e4), HE),
        one("relu, inputs around 10000", nn.ReLU, moved(1e4, 1), HE),
        one("tanh, inputs x 1000", nn.Tanh, moved(0, 1e3), LECUN),
        one("tanh, inputs around 1000", nn.Tanh, moved(1e3, 1), LECUN),
        one("tanh, inputs x 1e-6", nn.Tanh, moved(0, 1e-6), LECUN),
    )


def batch_normalised(depth: int, width: int = 64) -> nn.Module:
    """Linear, BatchNorm, ReLU, again and again, no skip: gradients grow by about 1.2 a layer (arXiv 1902.08129)."""
    layers: list[nn.Module] = []
    for fan_in in [64] + [width] * (depth - 1):
        layers += [nn.Linear(fan_in, width, bias=False), nn.BatchNorm1d(width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, 10))


def small_digits() -> Task:
    return digits(batch=32, image=True)


def convolutions() -> tuple[Trial, ...]:
    """Deep convolutional chains without skips."""
    down, up = "vanishing", "exploding"
    without_skips = frozenset({"batchnorm-without-skips"})

    def cnn(
        name: str, make: Callable[[], nn.Module], depth: int, verdict: str, causes: frozenset[str]
    ) -> Trial:
        he = Twin(f"cnn He, {depth} layers", lambda: initialised(plain_cnn(depth, 12, False), HE))
        return Trial(name, "cnn", make, he, small_digits, verdict, causes, grids="quick")

    def vgg_case(name: str, make: Callable[[], nn.Module], verdict: str, causes: frozenset[str]) -> Trial:
        normed = Twin("vgg with batch norm, 12 layers", lambda: vgg((4, 4, 4), 8, inputs=1))
        return Trial(name, "cnn", make, normed, small_digits, verdict, causes, grids="quick")

    missing = frozenset({"missing-normalisation"})

    def doubled() -> nn.Module:
        return initialised(vgg((4, 4, 4), 8, inputs=1, normalised=False), scaled_normal(3 * math.sqrt(2)))

    def shifted(shift: float) -> nn.Module:
        """ReLUs that few positions wake."""
        model = vgg((4, 4, 4), 8, inputs=1)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.constant_(module.bias, shift)
        return model

    def drawn(init: Initialise) -> nn.Module:
        """Weights whose size or mean the normalisations hide."""
        return initialised(vgg((4, 4, 4), 8, inputs=1), init)

    def normed_twin(depth: int) -> Twin:
        return twin(min(depth, 30))

    return (
        cnn("cnn default, 20 layers", lambda: plain_cnn(20, 12, False), 20, down, INITIALISATION),
        cnn("cnn default, 12 layers", lambda: plain_cnn(12, 12, False), 12, down, INITIALISATION),
        cnn("cnn 2 x He, 20 layers", lambda: initialised(plain_cnn(20, 12, False), scaled_normal(2 * math.sqrt(2))),
            20, up, INITIALISATION),
        Trial("cnn with batch norm, 100 layers", "cnn", lambda: plain_cnn(100, 8, True),
              Twin("cnn with batch norm, 10 layers", lambda: plain_cnn(10, 8, True)), small_digits,
              up, without_skips, steps=80, grids="quick"),
        vgg_case("vgg without batch norm, 12 layers", lambda: vgg((4, 4, 4), 8, inputs=1, normalised=False),
                 down, missing | INITIALISATION),
        vgg_case("vgg without batch norm, 3 x He", doubled, up, missing | INITIALISATION),
        vgg_case("vgg with batch norm, shifts of -1", lambda: shifted(-1.0), down, frozenset({"dead-units"})),
        vgg_case("vgg with batch norm, shifts of -2", lambda: shifted(-2.0), down, frozenset({"dead-units"})),
        vgg_case("vgg with batch norm, weights of N(0, 1)", lambda: drawn(nn.init.normal_), down, INITIALISATION),
        vgg_case("vgg with batch norm, weights of U(0, 1)", lambda: drawn(nn.init.uniform_), down, INITIALISATION),
        vgg_case("vgg with batch norm, weights of U(0, 0.05)", lambda: drawn(lambda w: nn.init.uniform_(w, 0.0, 0.05)),
                 down, INITIALISATION),
        Trial("mlp with batch norm, 20 layers", "batch norm", lambda: batch_normalised(20), normed_twin(20), digits,
              up, without_skips),
        Trial("mlp with batch norm, 60 layers", "batch norm", lambda: batch_normalised(60), normed_twin(60), digits,
              up, without_skips),
        Trial("mlp with batch norm, 100 layers", "batch norm", lambda: batch_normalised(100), normed_twin(100), digits,
              up, without_skips, grids="quick"),
    )  # fmt: skip


def layer_trials() -> tuple[Trial, ...]:
    """Every fault of this file."""
    return (*chains(), *dead_units(), *inputs(), *convolutions())
