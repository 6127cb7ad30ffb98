"""Judging a change by training the model: what a gradient flow at the start cannot show."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property

import torch
from torch import nn

from isograd.graph.preserve import copied
from isograd.graph.traced import Loss

Train = Callable[[nn.Module, int], float]
"""train(model, seed) -> score, higher is better; as `isograd.prove` takes it."""
TRAININGS = 8
"""Changed models that a search trains at most."""
BETTER = 0.05
"""Share of the score's distance that training has to gain before a change is said to help."""


class Judge:
    """Scores of copies of models after the user's training, from one seed. A training that raises judges nothing."""

    def __init__(self, model: nn.Module, train: Train, trainings: int = TRAININGS) -> None:
        self.model, self.train = model, train
        self.left = trainings
        """Trainings that may still be made, that of the model as it is not counted."""
        self.failure: Exception | None = None
        """What the training raised: nothing is judged any more."""

    @cached_property
    def before(self) -> float:
        """Score of the model as it is; NaN: it could not be trained."""
        self.left += 1
        return self.score(self.model)

    def score(self, model: nn.Module) -> float:
        """Of a copy; minus infinity for a training that ended in NaN, NaN where none could be had."""
        if self.failure is not None:
            return math.nan
        self.left -= 1
        try:
            with torch.random.fork_rng():
                value = float(self.train(copied(model), 0))
        except Exception as error:  # the user's code: what the search has found is kept
            self.failure = error
            return math.nan
        return value if math.isfinite(value) else -math.inf

    def prefers(self, score: float, best: float) -> bool:
        """Is this score better than the best so far, by more than the noise of one training?"""
        margin = BETTER * abs(self.before) if math.isfinite(self.before) else 0.0
        return score > best + margin


def short_training(loss: Loss, *, steps: int = 40, lr: float = 1e-3) -> Train:
    """A training to judge by where there is no other: Adam on the loss's own batch; minus the loss it ends at."""

    def train(model: nn.Module, seed: int) -> float:
        torch.manual_seed(seed)
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr)
        last: list[float] = []
        for _ in range(steps):
            optimizer.zero_grad()
            value = loss(model)
            value.backward()
            optimizer.step()
            last.append(float(value.detach()))
        tail = last[-max(steps // 10, 1) :]
        return -sum(tail) / len(tail)

    return train
