"""AutoTrainer's networks (ICSE 2021), graded per seed against what training that very initialisation shows.

At their width, five units, a label can depend on the seed; `gallery.establish` trains each network with
each seed, and one that gives no clear answer is left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy
import torch
from sklearn.datasets import load_digits, make_blobs, make_circles, make_classification
from sklearn.preprocessing import MinMaxScaler
from torch import Tensor, nn
from torch.nn import functional

from gallery.case import Built, Case
from gallery.keras_net import Spec, loss_of, network
from gallery.published import ABOUT_DATA, SEEDS, facts
from gallery.trial import truth


@dataclass(frozen=True)
class Data:
    """Inputs and targets as Keras sees them: training rows and held-out rows."""

    x: Tensor
    y: Tensor
    held_x: Tensor
    held_y: Tensor
    sound: float
    """Accuracy of a sound network of the benchmark."""


@cache
def data(name: str) -> Data:
    """The data of an AutoTrainer case; digits stand in for MNIST and CIFAR-10, enlarged to their shape."""
    if name == "circle":
        raw, labels = make_circles(1000, noise=0.1, random_state=1)
        return _split(MinMaxScaler((-1, 1)).fit_transform(raw), labels[:, None], 700, 0.84)
    if name == "blob":
        raw, labels = make_blobs(1000, centers=3, n_features=2, cluster_std=2, random_state=2)  # type: ignore[misc]
        return _split(raw, numpy.eye(3)[labels], 700, 0.83)
    if name == "higgs_kaggle_4000":
        raw, labels = make_classification(4000, 31, n_informative=10, random_state=1)
        return _split(raw, numpy.eye(2)[labels], 3000, 0.9)
    raw, labels = load_digits(return_X_y=True)
    pictures = functional.interpolate(torch.tensor(raw).view(-1, 1, 8, 8) / 16, 28 if name == "mnist" else 32)
    pixels = pictures.permute(0, 2, 3, 1).expand(-1, -1, -1, 1 if name == "mnist" else 3)
    return _split(pixels.numpy(), numpy.eye(10)[labels], 1300, 0.9)


def _split(x: Any, y: Any, rows: int, sound: float) -> Data:
    inputs, targets = torch.tensor(x, dtype=torch.float32), torch.tensor(y, dtype=torch.float32)
    return Data(inputs[:rows], targets[:rows], inputs[rows:], targets[rows:], sound)


def autotrainer_build(fact: Spec, seed: int) -> tuple[nn.Sequential, Data]:
    """A network of the benchmark, drawn with one seed, and its data."""
    found = data(fact["dataset"])
    if fact["input_shape"] == [784]:
        found = Data(found.x.flatten(1), found.y, found.held_x.flatten(1), found.held_y, found.sound)
    torch.manual_seed(seed)
    return network(fact["layers"], found.x[:2]), found


EPOCHS = {"circle": 300, "blob": 300}
"""As AutoTrainer trains them; 40 where digits stand in for pictures."""
EVERY = 10
"""Epochs between looks at the held-out rows."""
BEGUN = 0.05
"""Lead over chance without which a training is given up half-way."""


def autotrainer_trained(fact: Spec, seed: int) -> float:
    """Held-out accuracy that Adam at 1e-3 reaches: the case's own optimizer may be its fault.

    Stops once it is as good as a sound network or the loss is not finite, and half-way if it has learned
    nothing at all by then.
    """
    model, found = autotrainer_build(fact, seed)
    optimizer, loss = torch.optim.Adam(model.parameters(), 1e-3, eps=1e-7), loss_of(fact["loss"])
    generator = torch.Generator().manual_seed(seed)
    best = 0.0
    epochs = EPOCHS.get(fact["dataset"], 40)
    for epoch in range(epochs):
        for rows in torch.randperm(len(found.x), generator=generator).split(128 if found.x.ndim == 2 else 64):
            optimizer.zero_grad()
            value = loss(model(found.x[rows]), found.y[rows])
            if not value.isfinite():
                return best
            value.backward()
            optimizer.step()
        if epoch % EVERY == EVERY - 1:
            best = max(best, _accuracy(model, found))
            idle = epoch >= epochs // 2 and best < chance(found) + BEGUN
            if idle or best >= found.sound - 0.02:
                break
    return best


@torch.no_grad()
def _accuracy(model: nn.Module, found: Data) -> float:
    answer = model.eval()(found.held_x)
    model.train()
    if answer.shape[-1] == 1:
        return ((answer > 0.5).float() == found.held_y).float().mean().item()
    return (answer.argmax(-1) == found.held_y.argmax(-1)).float().mean().item()


def chance(found: Data) -> float:
    """Accuracy of guessing."""
    return 1 / max(2, found.y.shape[-1])


def shows(fact: Spec, accuracy: float) -> str:
    """What a training shows: 'sick', 'healthy' or 'border'."""
    found = data(fact["dataset"])
    if accuracy < (chance(found) + found.sound) / 2:
        return "sick"
    return "healthy" if accuracy > found.sound - 0.1 else "border"


def autotrainer_facts() -> list[Spec]:
    """All cases but the recurrent one, whose fault lies along time."""
    return [fact for fact in facts("autotrainer") if fact["input_shape"] is not None]


def key(fact: Spec, seed: int) -> str:
    """Name of a case and of its record."""
    return f"{fact['case_id'].removeprefix('autotrainer_')} #{seed}"


def autotrainer() -> tuple[Case, ...]:
    """One case for each network and seed whose training gave a clear answer."""
    return tuple(
        case
        for fact in autotrainer_facts()
        for seed in range(SEEDS)
        if (case := _autotrainer_case(fact, seed)) is not None
    )


def _autotrainer_case(fact: Spec, seed: int) -> Case | None:
    def build() -> Built:
        model, found = autotrainer_build(fact, seed)
        rows = slice(128)
        loss = loss_of(fact["loss"])
        return model.train(), lambda m: loss(m(found.x[rows]), found.y[rows])

    family = f"autotrainer {fact['dataset']}"
    labels = set(fact["ground_truth"])
    record = truth().get(key(fact, seed))
    if record is None or record["verdict"] == "border":
        return None
    said = f"trained: accuracy {record['accuracy']:.2f}, published label {sorted(labels) or 'none'}"
    if record["verdict"] == "healthy":
        return Case(key(fact, seed), family, build, "healthy", tolerated=ABOUT_DATA, truth=said)
    return Case(
        key(fact, seed), family, build, "vanishing" if "vanishing_gradient" in labels else "sick", truth=said
    )
