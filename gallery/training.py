"""Short trainings that tell whether a network learns: the source of every ground truth here."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class Task:
    """A supervised task that is small enough to train on a few hundred times."""

    name: str
    chance: float
    """Score of a model that ignores its input."""
    batch: Callable[[torch.Generator], tuple[Tensor, Tensor]]
    """A fresh training batch: inputs and integer targets."""
    held_out: tuple[Tensor, Tensor]


Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]
Score = Callable[[nn.Module, Tensor, Tensor], float]


@dataclass(frozen=True)
class Setting:
    """One point of the grid of optimizers."""

    optimizer: str
    lr: float

    def attach(self, model: nn.Module) -> torch.optim.Optimizer:
        parameters = [p for p in model.parameters() if p.requires_grad]
        if self.optimizer == "adamw":
            return torch.optim.AdamW(parameters, lr=self.lr)
        return torch.optim.SGD(parameters, lr=self.lr, momentum=0.9)

    def __str__(self) -> str:
        return f"{self.optimizer} {self.lr:g}"


ADAMW = tuple(Setting("adamw", lr) for lr in (1e-3, 3e-3, 3e-4, 1e-2, 1e-4))
SGD = tuple(Setting("sgd", lr) for lr in (0.01, 0.1, 0.001, 1.0))
SMALL_SGD = tuple(Setting("sgd", lr) for lr in (1e-4, 1e-5))
"""What an exploding gradient may ask for."""


def output(model: nn.Module, x: Tensor) -> Tensor:
    """What a model answers: its tensor, or the logits of a transformers model."""
    answer = model(x)
    return answer if isinstance(answer, Tensor) else answer.logits


def cross_entropy(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of a classifier that returns logits, the classes in the last dimension."""
    logits = output(model, x)
    return functional.cross_entropy(logits.flatten(0, -2).float(), y.flatten())


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Share of right answers."""
    return (output(model, x).argmax(-1) == y).float().mean().item()


def explained(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """R^2 of a regression, 0 where it is worse than the mean."""
    return max(0.0, 1 - ((output(model, x) - y).square().mean() / y.var()).item())


def digits(batch: int = 64, image: bool = False) -> Task:
    """scikit-learn's 1,797 digits, standardised; every fourth is held out."""
    raw, labels = load_digits(return_X_y=True)
    x = torch.tensor((raw - raw.mean()) / raw.std(), dtype=torch.float32)
    x = x.view(-1, 1, 8, 8) if image else x
    y = torch.tensor(labels.astype(numpy.int64))
    kept = torch.arange(len(x)) % 4 != 3

    def sample(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        rows = torch.randint(int(kept.sum()), (batch,), generator=generator)
        return x[kept][rows], y[kept][rows]

    return Task("digits", 0.1, sample, (x[~kept], y[~kept]))


def copying(batch: int = 16, time: int = 12, vocabulary: int = 16) -> Task:
    """Name the previous token: attention must look back by one. Nothing tells what stands before the first."""

    def sample(generator: torch.Generator, rows: int = batch) -> tuple[Tensor, Tensor]:
        x = torch.randint(vocabulary, (rows, time), generator=generator)
        return x, x.roll(1, 1)

    return Task("copying", 1 / vocabulary, sample, sample(torch.Generator().manual_seed(9), 128))


def memorising(x: Tensor, y: Tensor, classes: int) -> Task:
    """Fit one batch: the least that a network must be able to do."""
    return Task("one batch", 1 / classes, lambda _: (x, y), (x, y))


def train(
    build: Callable[[], nn.Module],
    task: Task,
    setting: Setting,
    *,
    seed: int,
    steps: int,
    enough: float,
    loss: Loss = cross_entropy,
    score: Score = accuracy,
    every: int = 50,
) -> float:
    """Best held-out score that one training reaches; stops once `enough` is reached or the loss is lost.

    The model stays in training mode throughout: the question is what the gradient can teach it, not
    whether running statistics of a short training are ready for use.
    """
    torch.manual_seed(seed)
    model = build().train()
    optimizer = setting.attach(model)
    generator = torch.Generator().manual_seed(1000 + seed)
    best = 0.0
    for step in range(1, steps + 1):
        value = loss(model, *task.batch(generator))
        if not math.isfinite(value.item()):
            break
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        if step % every == 0:
            with torch.no_grad():
                best = max(best, score(model, *task.held_out))
            if best >= enough:
                break
    return best


@dataclass(frozen=True)
class Outcome:
    """The best of a grid of settings."""

    score: float
    """Mean over seeds of the best setting."""
    setting: str
    seeds: list[float]
    tried: int


def best_of(
    run: Callable[[Setting, int], float], grid: tuple[Setting, ...], *, seeds: int, enough: float
) -> Outcome:
    """Search a grid on seed 0, stop at the first setting that is good enough, confirm on the other seeds."""

    def attempts() -> Iterator[tuple[float, Setting]]:
        for setting in grid:
            reached = run(setting, 0)
            yield reached, setting
            if reached >= enough:
                return

    tried = list(attempts())
    first, setting = max(tried, key=lambda pair: pair[0])
    scores = [first] + [run(setting, seed) for seed in range(1, seeds)]
    return Outcome(sum(scores) / len(scores), str(setting), [round(s, 4) for s in scores], len(tried))
