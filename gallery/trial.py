"""A fault, its twin without the fault, and the training that decides whether the fault does harm."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gallery.case import Built, Case
from gallery.training import ADAMW, SGD, SMALL_SGD, Loss, Score, Setting, Task, accuracy, cross_entropy

TRUTH = Path(__file__).with_name("truth.json")

Make = Callable[[], nn.Module]
Verdict = Literal["sick", "border", "healthy"]

BEYOND_TRAINING = 8.0
"""Decades beyond which no net of border.json trains, with any optimizer: they stop at about 4."""

OPTIMIZERS = {"adamw": ADAMW, "sgd": (*SGD, *SMALL_SGD)}
QUICK_OPTIMIZERS = {"adamw": ADAMW[:3], "sgd": SGD[:3]}
"""For networks whose step takes tens of milliseconds."""


@dataclass(frozen=True)
class Twin:
    """The same network without the fault; several trials may share one."""

    name: str
    make: Make
    loss: Loss = cross_entropy


@dataclass(frozen=True)
class Trial:
    """A network with one fault. Whether that makes it sick is what `gallery.establish` finds out."""

    name: str
    family: str
    make: Make
    twin: Twin
    task: Callable[[], Task]
    verdict: str
    """What to call it if it is sick: 'vanishing', 'exploding', 'broken', or 'sick' for a finding of `codes`."""
    causes: frozenset[str]
    codes: frozenset[str] = frozenset()
    loss: Loss = cross_entropy
    faulty_task: Callable[[], Task] | None = None
    """Where the fault is in the data."""
    score: Score = accuracy
    steps: int = 300
    grids: str = "full"
    """'full', 'quick', or 'exact': too deep to train, so that the gradient's exact product decides."""

    @property
    def optimizers(self) -> dict[str, tuple[Setting, ...]]:
        return QUICK_OPTIMIZERS if self.grids == "quick" else OPTIMIZERS

    def build(self) -> Built:
        """The faulty network and its loss on one batch, as the zoo checks it."""
        torch.manual_seed(0)
        model = self.make().train()
        x, y = (self.faulty_task or self.task)().batch(torch.Generator().manual_seed(0))
        return model, lambda m: self.loss(m, x, y)

    def case(self) -> Case:
        """The case that training made of it: healthy where the fault turned out to be harmless."""
        record = truth()[self.name]
        said = evidence(record)
        if record["verdict"] == "healthy":
            return Case(self.name, self.family, self.build, "healthy", truth=said)
        return Case(self.name, self.family, self.build, self.verdict, self.causes, self.codes, truth=said)


@cache
def truth() -> dict[str, dict[str, Any]]:
    """What `gallery.establish` recorded, by name."""
    return json.loads(TRUTH.read_text()) if TRUTH.exists() else {}


def evidence(record: dict[str, Any]) -> str:
    """One line that says what was found."""
    if "loss" in record:
        shown = {key: value for key, value in record.items() if key not in ("verdict", "seconds")}
        return ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in shown.items())
    if "decades" in record:
        return f"exact product in float64: {record['decades']:+.1f} decades"
    if "first_loss" in record:
        return f"fits its batch: loss {record['first_loss']:.3g} to {record['lowest_loss']:.3g} with {record['setting']}"
    if "own" in record:
        parts = [
            f"{name} {own:.2f} (sound {record['sound'][name]:.2f})" for name, own in record["own"].items()
        ]
        return f"trained: takes off a constant answer's loss {', '.join(parts)}"
    if "accuracy" in record:
        return f"trained: accuracy {record['accuracy']:.2f}"
    parts = [
        f"{name} {record[name]['score']:.2f} (twin {record['twin_scores'][name]:.2f})"
        for name in ("adamw", "sgd")
    ]
    return f"trained: {', '.join(parts)}, chance {record['chance']:.2f}"


def judged(faulty: dict[str, float], twin: dict[str, float], chance: float) -> Verdict:
    """Sick, healthy or border, from the best score each family of optimizers reaches.

    Sick: a family that trains the twin fails here (less than halfway from chance to the twin), and the
    best of all is worse than the twin's by a tenth of its lead over chance. Healthy: neither. Border:
    one of the two, as when AdamW still trains what SGD does not.
    """
    lead = max(twin.values()) - chance
    able = [name for name, score in twin.items() if score - chance >= lead / 2]
    fails = any(faulty[name] < (chance + twin[name]) / 2 for name in able)
    worse = max(faulty.values()) < max(twin.values()) - lead / 10
    return "sick" if fails and worse else "border" if fails or worse else "healthy"


def exact_decades(model: nn.Sequential, x: Tensor, y: Tensor) -> float:
    """log10 of the gradient norm after the first layer over that before the last, in float64."""
    model = model.double()
    value = x.double() if x.is_floating_point() else x
    values: list[Tensor] = []
    for layer in model:
        value = layer(value)
        values.append(value)
    loss = nn.functional.cross_entropy(value, y)
    first, last = torch.autograd.grad(loss, (values[0], values[-2]))
    return _log10_norm(first) - _log10_norm(last)


def _log10_norm(gradient: Tensor) -> float:
    """Scaled before it is squared: 1e-250 is a float64, its square is not."""
    largest = gradient.abs().max()
    return (largest.log10() + (gradient / largest).norm().log10()).item()
