"""Judging a change by training the model: what a gradient flow at the start cannot show."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn

from isograd.graph.preserve import copied
from isograd.graph.traced import Loss

Train = Callable[..., float]
"""train(model, seed) -> score, higher is better; `isograd.prove` passes what else it takes, such as lr_scale."""
TRAININGS = 8
"""Changed models that a search trains at most."""
BETTER = 0.1
"""Share of the score, and of what was gained so far, that a training has to gain before a change is said to help.

Trainings of one network from ten seeds differ by half of this and more: at .05 four trainings chose, on AutoTrainer's
networks, what one seed happened to like, and left 154 of 180 runs within two points of the best control, now 170, where no
training left 174 (`python -m benchmarks.replay table`)."""


class Judge:
    """Scores of copies of models after the user's training, from one seed, and from a second before it is believed."""

    def __init__(self, model: nn.Module, train: Train, trainings: int = TRAININGS) -> None:
        self.model, self.train = model, train
        self.left = trainings
        """Trainings that may still be made, those of the model as it is not counted."""
        self.failure: Exception | None = None
        """What the training of the model as it is raised: nothing is judged."""
        self._untreated: dict[int, float] = {}

    @property
    def before(self) -> float:
        """Score of the model as it is, from the first seed; NaN: its training raised, and nothing is judged."""
        return self.untreated(0)

    def untreated(self, seed: int) -> float:
        """Score of the model as it is; NaN: its training raised."""
        if seed not in self._untreated:
            self.left += 1
            try:
                self._untreated[seed] = self.score(self.model, seed)
            except Exception as error:  # the user's code: what the search finds without it is kept
                self.failure, self._untreated[seed] = error, math.nan
        return self._untreated[seed]

    def score(self, model: nn.Module, seed: int = 0) -> float:
        """Of a copy; minus infinity for a training that ended in NaN. Raises what the training raises."""
        self.left -= 1
        with torch.random.fork_rng():
            value = float(self.train(copied(model), seed))
        return value if math.isfinite(value) else -math.inf

    def prefers(self, score: float, best: float, seed: int = 0) -> bool:
        """Is this score better than the best so far, by more than the noise of one training? Both are of this seed."""
        before = self.untreated(seed)
        if not math.isfinite(before):
            return score > best
        return score > best + BETTER * max(abs(before), best - before)


def short_training(loss: Loss, *, steps: int = 40, lr: float = 1e-3) -> Train:
    """A training to judge by where there is no other: Adam on the loss's own batch; minus the loss it ends at."""

    def train(model: nn.Module, seed: int, lr_scale: float = 1.0) -> float:
        torch.manual_seed(seed)
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr * lr_scale)
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
