"""What is done to a faulty model before it is trained: isograd, blind changes, random search, the learning rate.

Every arm takes a model and returns one; all are then trained alike.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor, nn

from benchmarks.twins.case import Case, train
from benchmarks.twins.faults import weighted
from gallery.nets import scaled_normal
from isograd.prescription import apply
from isograd.repair import Repair, repair

ACTIVATIONS = (
    nn.ReLU, nn.Sigmoid, nn.Tanh, nn.GELU, nn.SELU, nn.Softplus, nn.SiLU, nn.ELU, nn.LeakyReLU, nn.Identity,
)  # fmt: skip
HIDDEN = ACTIVATIONS[:-1]
RATES = (0.03, 0.1, 0.3, 3.0)
DRAWS = 4
"""Full trainings from which a search may choose: random search, the learning rate, and isograd judged by training."""
CHOOSING_SEED = 100
"""Seed of those trainings; the scores that count come from other seeds."""


@dataclass(frozen=True)
class Treated:
    """A model ready to be trained, and what was done to it."""

    model: nn.Module
    said: str
    edits: int
    seconds: float
    lr_scale: float = 1.0
    clip: float | None = None
    facts: dict[str, object] = field(default_factory=dict[str, object])


Arm = Callable[[Case, nn.Module, int], Treated]


def untreated(case: Case, model: nn.Module, seed: int) -> Treated:
    """The model as it is."""
    return Treated(model, "nothing", 0, 0.0)


def with_isograd(case: Case, model: nn.Module, seed: int) -> Treated:
    """`isograd.repair` on the first batch; the model is left alone where it finds no error."""
    started = time.perf_counter()
    found = repair(model, case.loss(seed))
    return _treated(model, found, seed, time.perf_counter() - started)


def judged(faulty: bool) -> Arm:
    """The same with as many trainings to choose by as random search has; every seed gets what was chosen."""

    def treat(case: Case, model: nn.Module, seed: int) -> Treated:
        found, seconds = _chosen(case, faulty)
        return _treated(model, found, seed, seconds)

    return treat


@lru_cache(maxsize=1)
def _chosen(case: Case, faulty: bool) -> tuple[Repair, float]:
    started = time.perf_counter()
    found = repair(
        case.build(CHOOSING_SEED, faulty=faulty).train(),
        case.loss(CHOOSING_SEED),
        train=lambda changed, again: train(case, changed, CHOOSING_SEED + again),
        trainings=DRAWS,
    )
    return found, time.perf_counter() - started


def _treated(model: nn.Module, found: Repair, seed: int, seconds: float) -> Treated:
    rx = found.prescription
    edits = 0 if rx is None else len(rx.edits)
    configuration = {} if rx is None else rx.configuration
    clip = configuration.get("clip_grad_norm")
    return Treated(
        model if rx is None else apply(model, rx, seed=seed),  # a draw of its own for every seed
        "nothing" if rx is None else rx.title,
        edits,
        seconds,
        clip=float(clip) if isinstance(clip, int | float) else None,
        facts={
            "verdict": found.before.verdict,
            "cured": found.cured,
            "configuration": dict(configuration),
        },
    )


# -- changes made without looking -----------------------------------------------------------------------


def redrawn(model: nn.Module, draw: Callable[[Tensor], object]) -> int:
    """Weights of hidden layers drawn anew, biases at 0. Returns how many."""
    layers = weighted(model)
    with torch.no_grad():
        for layer in layers:
            draw(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return len(layers)


def exchanged(model: nn.Module, new: Callable[[], nn.Module]) -> int:
    """Every hidden activation module exchanged. Returns how many."""
    count = 0
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, HIDDEN):
                setattr(parent, name, new())
                count += 1
    return count


class Normed(nn.Module):
    """A layer, then its output normalised over its features."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        channels = inner.out_channels if isinstance(inner, nn.Conv2d) else 0
        self.norm = nn.GroupNorm(1, channels) if channels else nn.LayerNorm(_features(inner))

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.inner(x))


def _features(layer: nn.Module) -> int:
    return layer.out_features if isinstance(layer, nn.Linear) else layer.nf  # transformers' Conv1D


def normalised(model: nn.Module) -> int:
    """A normalisation behind every hidden linear layer and convolution. Returns how many."""
    chosen = {id(layer) for layer in weighted(model)}
    count = 0
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if id(child) in chosen:
                setattr(parent, name, Normed(child))
                count += 1
    return count


def _blind(said: str, change: Callable[[nn.Module], int]) -> Arm:
    def arm(case: Case, model: nn.Module, seed: int) -> Treated:
        started = time.perf_counter()
        torch.manual_seed(2_000_000 + seed)
        edits = change(model)
        return Treated(model, said, edits, time.perf_counter() - started)

    return arm


LECUN, HE = scaled_normal(1.0), scaled_normal(2**0.5)

BLIND: dict[str, Arm] = {
    "selu": _blind("SELU, LeCun", lambda m: exchanged(m, nn.SELU) + redrawn(m, LECUN)),
    "he": _blind("ReLU, He", lambda m: exchanged(m, nn.ReLU) + redrawn(m, HE)),
    "layernorm": _blind("LayerNorm", normalised),
}

# -- changes drawn at random ----------------------------------------------------------------------------


def drawn(draw: int) -> Arm:
    """Random search draws one to three changes, each of a random kind and strength."""

    def arm(case: Case, model: nn.Module, seed: int) -> Treated:
        choice = random.Random(f"{case.name} {draw}")
        torch.manual_seed(2_000_000 + seed)
        said: list[str] = []
        edits, lr_scale, clip = 0, 1.0, None
        for kind in choice.sample(("activation", "weights", "norm", "lr", "clip"), choice.randint(1, 3)):
            match kind:
                case "activation":
                    new = choice.choice(HIDDEN)
                    edits += exchanged(model, new)
                    said.append(new.__name__)
                case "weights":
                    gain = 10 ** choice.uniform(-0.5, 0.7)
                    edits += redrawn(model, scaled_normal(gain))
                    said.append(f"gain {gain:.2f}")
                case "norm":
                    edits += normalised(model)
                    said.append("norm")
                case "lr":
                    lr_scale = 10 ** choice.uniform(-1.5, 1)
                    said.append(f"lr x {lr_scale:.2g}")
                case _:
                    clip = 10 ** choice.uniform(-1, 1)
                    said.append(f"clip {clip:.2g}")
        return Treated(model, ", ".join(said), edits, 0.0, lr_scale, clip)

    return arm


def at_rate(scale: float) -> Arm:
    """The learning rate alone."""
    return lambda case, model, seed: Treated(model, f"lr x {scale:g}", 0, 0.0, scale)
