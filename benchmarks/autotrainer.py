"""AutoTrainer's rules and order of repairs, written anew from its papers (ICSE 2021, TDSC 2023).

Watched every third epoch, on the kernels' gradients of the epoch's first batch:

    vanishing    ||first|| / ||last|| < 1e-3 and ||first|| < 1e-4, with accuracy below 0.6 on both parts
    exploding    ||first|| / ||last|| > 70, with the same gate; or a value that is not finite
    dying ReLU   at least 70% of all gradient entries exactly zero, with the same gate
    slow         no epoch gains a point of accuracy, after 30% of the epochs
    oscillating  accuracy falls by 3 points from a peak in 20% of the epochs, after 30% of them

Each problem has its repairs in order, each judged by a full training; a repair is kept when the detector falls
silent, whatever the accuracy. At most `TRIES` problems are treated, one after the other. Where AutoTrainer draws an
initialiser or an optimizer at random, the common ones are taken in turn; left out are its schedule for the learning
rate, momentum and noise against oscillation.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from torch import Tensor

from benchmarks.population import Member, Recipe, Run, member, trained
from gallery.autotrainer import Data
from gallery.keras_net import Spec

RATIO_DOWN, NORM_DOWN, RATIO_UP, ZEROS = 1e-3, 1e-4, 70.0, 0.7
GATE, SLOW, FALL, FALLS, SETTLED = 0.6, 0.01, 0.03, 0.2, 0.3
EVERY = 3
TRIES = 10


@dataclass
class Watched:
    """One training, and what the rules make of it."""

    run: Run
    problem: str = ""
    at: int = -1
    """Epoch of the first alarm."""


class Trainer:
    """Trains recipes on one data set and watches them; the same recipe with the same seed only once."""

    def __init__(self, data: Data, epochs: int) -> None:
        self.data, self.epochs = data, epochs
        self.known: dict[tuple[str, int], Watched] = {}

    def watched(self, asked: Sequence[tuple[Recipe, int]]) -> list[Watched]:
        """Of each recipe with its seed, in this order; what is not known yet is trained together."""
        keys = [(repr(recipe), seed) for recipe, seed in asked]
        new = {key: pair for key, pair in zip(keys, asked, strict=True) if key not in self.known}
        members = [member(recipe, self.data, seed) for recipe, seed in new.values()]
        self.known |= dict(zip(new, self._watched(members), strict=True))
        return [self.known[key] for key in keys]

    def _watched(self, members: Sequence[Member]) -> list[Watched]:
        alarms: dict[int, tuple[str, int]] = {}

        def look(number: int, run: Run, epoch: int, kernels: list[Tensor]) -> None:
            if epoch % EVERY or number in alarms:  # an alarm stays
                return
            if problem := _gradients(kernels, run, epoch / self.epochs):
                alarms[number] = problem, epoch

        runs = trained(members, self.data, self.epochs, look)
        seen = [Watched(run, *alarms.get(number, ("", -1))) for number, run in enumerate(runs)]
        for one in seen:
            if one.run.lost is not None:
                one.problem, one.at = "exploding", one.run.lost
            one.problem = one.problem or curve(one.run)
        return seen


def _gradients(kernels: list[Tensor], run: Run, progress: float) -> str:
    """The gradient rules, once accuracy has had 30% of the epochs to show that all is well."""
    if any(not g.isfinite().all() for g in kernels):
        return "exploding"
    best = max((*run.train, *run.held_out), default=0.0)
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


def curve(seen: Run) -> str:
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


def rate(factor: float) -> Callable[[Recipe], Recipe]:
    return lambda recipe: replace(recipe, lr=recipe.lr * factor)


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
    "dying": (SELU, batch_normalisation, *INITIALISERS, activation("elu", "he_uniform")),
    "oscillating": (
        setting(optimizer="adam", lr=1e-3),
        rate(0.1),
        rate(0.01),
        *(setting(batch=32 * 2**k) for k in range(4)),
        *INITIALISERS,
    ),
    "slow": (
        setting(optimizer="sgd", momentum=0.9, lr=0.01),
        *(rate(10.0**k) for k in (1, 2, 3)),
        *INITIALISERS,
    ),
}


def repairs(recipe: Recipe) -> Generator[Recipe, Watched, None]:
    """AutoTrainer's search as a dialogue: asks for a recipe to be trained, is sent what that showed.

    The first is the unrepaired one, the last what AutoTrainer answers with.
    """
    seen = yield recipe
    for _ in range(TRIES):
        if not (problem := seen.problem):
            return
        for change in ORDER[problem]:
            attempt = change(recipe)
            seen = yield attempt
            if seen.problem != problem:  # silent about this problem; another one has its own repairs
                recipe = attempt
                break
        else:
            return


def repaired(recipe: Recipe, trainer: Trainer, seeds: Sequence[int]) -> list[list[tuple[Recipe, Watched]]]:
    """For each seed, what its search had trained, in order. Seeds go each their own way and are trained together."""
    searches = [repairs(recipe) for _ in seeds]
    tries: list[list[tuple[Recipe, Watched]]] = [[] for _ in seeds]
    asked = {i: next(search) for i, search in enumerate(searches)}
    while asked:
        seen = trainer.watched([(wanted, seeds[i]) for i, wanted in asked.items()])
        for (i, wanted), shown in zip(list(asked.items()), seen, strict=True):
            tries[i].append((wanted, shown))
            try:
                asked[i] = searches[i].send(shown)
            except StopIteration:
                del asked[i]
    return tries
