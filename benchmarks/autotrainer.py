"""AutoTrainer's rules and order of repairs, written anew from its papers (ICSE 2021, TDSC 2023).

Watched every third epoch, on the kernels' gradients of the epoch's first batch:

    vanishing    ||first|| / ||last|| < 1e-3 and ||first|| < 1e-4, with accuracy below 0.6 on both parts
    exploding    ||first|| / ||last|| > 70, with the same gate; or a value that is not finite
    dying ReLU   at least 70% of all gradient entries exactly zero, with the same gate
    slow         no epoch gains a point of accuracy, after 30% of the epochs
    oscillating  accuracy falls by 3 points from a peak in 20% of the epochs, after 30% of them

Each problem has its repairs in order, each judged by a full training; a repair is kept when the detector falls
silent, whatever the accuracy. At most `TRIES` trainings.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from gallery.autotrainer import Data
from gallery.keras_net import Spec, loss_of, network

RATIO_DOWN, NORM_DOWN, RATIO_UP, ZEROS = 1e-3, 1e-4, 70.0, 0.7
GATE, SLOW, FALL, FALLS, SETTLED = 0.6, 0.01, 0.03, 0.2, 0.3
EVERY = 3
TRIES = 10


@dataclass(frozen=True)
class Recipe:
    """A network in Keras terms, and how it is trained."""

    layers: list[Spec]
    loss: str
    lr: float = 1e-3
    clip: float | None = None
    """Largest absolute value of a gradient entry."""
    batch: int = 128
    optimizer: str = "adam"
    momentum: float = 0.0


@dataclass
class Watched:
    """What one training showed."""

    problem: str = ""
    at: int = -1
    """Epoch of the first alarm."""
    train: list[float] = field(default_factory=list[float])
    held_out: list[float] = field(default_factory=list[float])

    @property
    def final(self) -> float:
        return self.held_out[-1] if self.held_out else 0.0


def optimizer_of(recipe: Recipe, model: nn.Module) -> torch.optim.Optimizer:
    """With Keras's epsilon."""
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(model.parameters(), recipe.lr, momentum=recipe.momentum)
    return torch.optim.Adam(model.parameters(), recipe.lr, eps=1e-7)


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        answer = model.eval()(x)
    model.train()
    right = (answer > 0.5).float() == y if answer.shape[-1] == 1 else answer.argmax(-1) == y.argmax(-1)
    return right.float().mean().item()


def trained(recipe: Recipe, data: Data, seed: int, epochs: int, model: nn.Module | None = None) -> Watched:
    """Train for all epochs, or until a value is not finite, and watch. `model`: instead of the recipe's own."""
    torch.manual_seed(seed)
    model = (model if model is not None else network(recipe.layers, data.x[:2])).train()
    optimizer, loss = optimizer_of(recipe, model), loss_of(recipe.loss)
    generator = torch.Generator().manual_seed(seed)
    seen = Watched()
    for epoch in range(epochs):
        for number, rows in enumerate(torch.randperm(len(data.x), generator=generator).split(recipe.batch)):
            optimizer.zero_grad()
            value = loss(model(data.x[rows]), data.y[rows])
            value.backward()
            if number == 0 and epoch % EVERY == 0 and not seen.problem:
                seen.problem = _look(model, seen, epoch / epochs)
                seen.at = epoch if seen.problem else -1
            if not math.isfinite(value.item()):
                seen.problem, seen.at = "exploding", epoch
                seen.held_out.append(0.0)
                return seen
            if recipe.clip is not None:
                nn.utils.clip_grad_value_(model.parameters(), recipe.clip)
            optimizer.step()
        seen.train.append(accuracy(model, data.x, data.y))
        seen.held_out.append(accuracy(model, data.held_x, data.held_y))
    seen.problem = seen.problem or _curve(seen)
    return seen


def _look(model: nn.Module, seen: Watched, progress: float) -> str:
    """The gradient rules, once accuracy has had 30% of the epochs to show that all is well."""
    kernels = [p.grad for p in model.parameters() if p.ndim > 1 and p.grad is not None]
    if any(not g.isfinite().all() for g in kernels):
        return "exploding"
    best = max((*seen.train, *seen.held_out), default=0.0)
    if progress < SETTLED or best >= GATE:
        return ""
    first, last = kernels[0].norm().item(), kernels[-1].norm().item()
    ratio = first / last if last else 0.0
    if ratio < RATIO_DOWN and first < NORM_DOWN:
        return "vanishing"
    if ratio > RATIO_UP:
        return "exploding"
    zeros = sum((g == 0).sum().item() for g in kernels) / sum(g.numel() for g in kernels)
    return "dying" if zeros >= ZEROS else ""


def _curve(seen: Watched) -> str:
    """The rules of the learning curve."""
    gains = [b - a for series in (seen.train, seen.held_out) for a, b in pairwise(series)]
    if gains and max(gains) < SLOW and max(seen.held_out) < GATE:
        return "slow"
    peaks = [
        b
        for a, b, c in zip(seen.train, seen.train[1:], seen.train[2:], strict=False)
        if (b - a) * (b - c) > 0
    ]
    falls = sum(a - b >= FALL for a, b in pairwise(peaks))  # from a local maximum to the next minimum
    return "oscillating" if falls >= FALLS * len(seen.train) else ""


# -- repairs, in the order of the paper -------------------------------------------------------------------


def _hidden(recipe: Recipe, change: Callable[[Spec], Spec]) -> Recipe:
    """Change the activation of every hidden layer; the last layer and its activation stay."""
    weighted = [i for i, layer in enumerate(recipe.layers) if layer["class"] in ("Dense", "Conv2D")]
    layers = [change(copy.deepcopy(s)) if i < weighted[-1] else s for i, s in enumerate(recipe.layers)]
    return replace(recipe, layers=layers)


def activation(name: str, kernel: str) -> Callable[[Recipe], Recipe]:
    """Every hidden activation, and the initialiser that goes with it."""

    def change(spec: Spec) -> Spec:
        if (spec.get("activation") or "linear") != "linear":
            spec["activation"] = name
        if spec["class"] in ("Dense", "Conv2D"):
            spec["kernel_initializer"] = kernel
        return spec

    return lambda recipe: _hidden(recipe, change)


def batch_normalisation(recipe: Recipe) -> Recipe:
    """Behind every hidden dense layer."""
    weighted = [i for i, layer in enumerate(recipe.layers) if layer["class"] == "Dense"]
    layers: list[Spec] = []
    for i, spec in enumerate(recipe.layers):
        layers.append(spec)
        if i in weighted[:-1]:
            layers.append({"class": "BatchNormalization"})
    return replace(recipe, layers=layers)


def setting(**changes: Any) -> Callable[[Recipe], Recipe]:
    return lambda recipe: replace(recipe, **changes)


def initialiser(name: str) -> Callable[[Recipe], Recipe]:
    def change(spec: Spec) -> Spec:
        if spec["class"] in ("Dense", "Conv2D"):
            spec["kernel_initializer"] = name
        return spec

    return lambda recipe: _hidden(recipe, change)


SELU, RELU = activation("selu", "lecun_uniform"), activation("relu", "he_uniform")
TANH = activation("tanh", "glorot_uniform")
INITIALISERS = tuple(initialiser(name) for name in ("he_uniform", "glorot_uniform", "lecun_uniform"))

ORDER: dict[str, tuple[Callable[[Recipe], Recipe], ...]] = {
    "vanishing": (SELU, RELU, batch_normalisation),
    "exploding": (SELU, RELU, setting(clip=9.0), setting(clip=10.0), TANH, batch_normalisation),
    "dying": (SELU, batch_normalisation, *INITIALISERS),
    "oscillating": (setting(optimizer="adam"), *(setting(lr=10.0**-k) for k in (4, 5)), setting(batch=64)),
    "slow": (
        setting(optimizer="sgd", momentum=0.9, lr=0.01),
        setting(lr=1e-2),
        setting(lr=0.1),
        *INITIALISERS,
    ),
}


def repaired(recipe: Recipe, data: Data, seed: int, epochs: int) -> Iterator[tuple[Recipe, Watched]]:
    """The unrepaired training first, then every attempt; the last one is what AutoTrainer answers with."""
    seen = trained(recipe, data, seed, epochs)
    yield recipe, seen
    for _ in range(TRIES):
        if not seen.problem:
            return
        queue = ORDER[seen.problem]
        problem = seen.problem
        for change in queue:
            attempt = change(recipe)
            seen = trained(attempt, data, seed, epochs)
            yield attempt, seen
            if seen.problem != problem:  # silent about this problem; another one has its own repairs
                recipe = attempt
                break
        else:
            return
