"""What a case is, and how both of its twins are trained."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.twins.data import Task

Make = Callable[[], nn.Module]
Plant = Callable[[nn.Module], nn.Module | None]
"""Changes a model in place, or returns what takes its place."""


@dataclass(frozen=True)
class Case:
    """A healthy model, a fault to plant in it, and the training that both get."""

    name: str
    """'<model> / <fault>'."""
    family: str
    make: Make
    plant: Plant
    task: Callable[[], Task]
    kind: str
    """What the fault does to the gradient: 'vanishing' or 'exploding'; 'decoy' for what only looks like a fault."""
    optimizer: str = "adamw"
    lr: float = 2e-3
    steps: int = 120
    clip: float | None = None
    """Norm at which the gradient is clipped, in both twins."""

    def build(self, seed: int, *, faulty: bool) -> nn.Module:
        """Both twins of a seed draw the same weights; the fault is planted afterwards."""
        torch.manual_seed(seed)
        model = self.make()
        if not faulty:
            return model
        torch.manual_seed(1_000_000 + seed)
        with torch.no_grad():
            return self.plant(model) or model

    def loss(self, seed: int) -> Callable[[nn.Module], Tensor]:
        """The loss on the first batch of a training, as `isograd.check` takes it."""
        x, y = self.task().batch(torch.Generator().manual_seed(seed))
        return lambda m: cross_entropy(m, x, y)


def output(model: nn.Module, x: Tensor) -> Tensor:
    """Logits, also of a transformers model."""
    answer = model(x)
    return answer if isinstance(answer, Tensor) else answer.logits


def cross_entropy(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return functional.cross_entropy(output(model, x).flatten(0, -2), y.flatten())


def train(
    case: Case, model: nn.Module, seed: int, *, lr_scale: float = 1.0, clip: float | None = None
) -> float:
    """Held-out accuracy after the case's training; the order of the batches depends on the seed alone.

    A loss that is not finite ends the training with the score of guessing.
    """
    task = case.task()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = (
        torch.optim.AdamW(parameters, lr=case.lr * lr_scale)
        if case.optimizer == "adamw"
        else torch.optim.SGD(parameters, lr=case.lr * lr_scale, momentum=0.9)
    )
    limit = clip if clip is not None else case.clip
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model.train()
    for _ in range(case.steps):
        value = cross_entropy(model, *task.batch(generator))
        if not math.isfinite(value.item()):
            return task.chance
        optimizer.zero_grad()
        value.backward()
        if limit is not None:
            nn.utils.clip_grad_norm_(parameters, limit)
        optimizer.step()
    model.eval()
    x, y = task.held_out
    with torch.no_grad():
        answer = output(model, x)
    return (answer.argmax(-1) == y).float().mean().item() if answer.isfinite().all() else task.chance
