"""Published training problems, translated to PyTorch: what their state before training must be called.

AutoTrainer's networks are graded per seed against what training that very initialisation shows (at their
width, five units, a label can depend on the seed); `gallery.establish --published` records it. Of the
forum programs most faults are no gradient faults: a head, a loss and data that do not fit are to be named
as such, and nothing else may be called a gradient problem. Learning rates, epochs and labels leave the
flow before training healthy.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy
import torch
from sklearn.datasets import load_digits, make_blobs, make_circles, make_classification
from sklearn.preprocessing import MinMaxScaler
from torch import Tensor, nn
from torch.nn import functional

from gallery.case import Built, Case
from gallery.keras_net import Spec, loss_of, network
from gallery.trial import truth

DATA = Path(__file__).with_name("data")
SEEDS = 3

MISFIT = frozenset({"VG102"})
ABOUT_DATA = frozenset({"UP504", "SA301", "SA302", "VG102"})
"""What may rightly be said of a network whose fault lies in its data or its head."""
LARGE = 10.0
"""Root mean square of inputs beyond which 'missing preprocessing' must be said."""
OUT_OF_REACH = 3.0
"""Targets that many times beyond a bounded output."""


def facts(name: str) -> list[Spec]:
    """The lines of one file of cases."""
    return [json.loads(line) for line in (DATA / f"{name}.jsonl").read_text().splitlines()]


# --- AutoTrainer ---------------------------------------------------------------------------------


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


EPOCHS = {"circle": 150, "blob": 150}
EVERY = 10
"""Epochs between looks at the held-out rows."""


def autotrainer_trained(fact: Spec, seed: int) -> float:
    """Held-out accuracy that Adam at 1e-3 reaches: the case's own optimizer may be its fault.

    Stops once it is as good as a sound network, or the loss is not finite.
    """
    model, found = autotrainer_build(fact, seed)
    optimizer, loss = torch.optim.Adam(model.parameters(), 1e-3, eps=1e-7), loss_of(fact["loss"])
    generator = torch.Generator().manual_seed(seed)
    best = 0.0
    for epoch in range(EPOCHS.get(fact["dataset"], 20)):
        for rows in torch.randperm(len(found.x), generator=generator).split(128 if found.x.ndim == 2 else 64):
            optimizer.zero_grad()
            value = loss(model(found.x[rows]), found.y[rows])
            if not value.isfinite():
                return best
            value.backward()
            optimizer.step()
        if epoch % EVERY == EVERY - 1:
            best = max(best, _accuracy(model, found))
            if best >= found.sound - 0.02:
                break
    return best


@torch.no_grad()
def _accuracy(model: nn.Module, found: Data) -> float:
    answer = model.eval()(found.held_x)
    model.train()
    if answer.shape[-1] == 1:
        return ((answer > 0.5).float() == found.held_y).float().mean().item()
    return (answer.argmax(-1) == found.held_y.argmax(-1)).float().mean().item()


def shows(fact: Spec, accuracy: float) -> str:
    """What a training shows: 'sick', 'healthy' or 'border'."""
    found = data(fact["dataset"])
    chance = 1 / max(2, found.y.shape[-1])
    if accuracy < (chance + found.sound) / 2:
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


# --- forum programs ------------------------------------------------------------------------------


@cache
def rows() -> dict[str, Tensor]:
    """The vendored rows of the forum programs."""
    with numpy.load(DATA / "deeplocalize.npz") as stored:
        return {name: torch.tensor(stored[name]) for name in stored.files}


def program_data(name: str, spec: Spec) -> tuple[Tensor, Tensor]:
    """Stored rows, or rows drawn in the recorded range with one class in turn."""
    if f"{name}_x" in rows():
        x, y = rows()[f"{name}_x"], rows()[f"{name}_y"]
        return (x[:, None] if x.ndim == 1 else x), y
    generator = torch.Generator().manual_seed(0)
    shape, low, high = spec["x"]["shape"][1:], spec["x"]["min"], spec["x"]["max"]
    x = low + (high - low) * torch.rand((32, *shape), generator=generator)
    units = [layer["units"] for layer in spec["layers"] if "units" in layer][-1]
    classes = torch.arange(32) % max(2, units)
    if spec["y"]["shape"][1:] == [units] and units > 1:
        return x, functional.one_hot(classes, units).float()
    scale = spec["y"]["max"] / (max(2, units) - 1)
    return x, (classes * scale)[:, None]


def program_build(name: str, spec: Spec) -> Built:
    x, y = program_data(name, spec)
    torch.manual_seed(0)
    model = network(spec["layers"], x).train()
    loss = loss_of(spec["loss"])
    return model, lambda m: loss(m(x), y)


def program_case(name: str, spec: Spec, labels: list[str]) -> Case:
    """What must be said of a program follows from its facts, in this order."""
    x, y = program_data(name, spec)
    last = [layer for layer in spec["layers"] if layer["class"] in ("Dense", "Activation")]
    units = [layer["units"] for layer in last if "units" in layer][-1]
    bounded = (last[-1].get("activation") or "linear") in ("sigmoid", "tanh", "softmax")
    family = "forum program"

    def build() -> Built:
        return program_build(name, spec)

    head = frozenset({"head"})
    if units == 1 and last[-1].get("activation") == "softmax":
        return Case(name, family, build, "broken", head, MISFIT, truth="softmax over one unit is constant")
    if bounded and "crossentropy" not in spec["loss"] and float(y.abs().max()) > OUT_OF_REACH:
        truth_of_it = f"output at most 1, targets to {float(y.abs().max()):g}"
        return Case(name, family, build, "broken", head, MISFIT, truth=truth_of_it)
    size = float(x.square().mean().sqrt())
    normalised = spec["layers"][0]["class"] == "BatchNormalization"
    if size > LARGE and not normalised:
        return Case(name, family, build, "sick", codes=ABOUT_DATA, truth=f"inputs with an rms of {size:g}")
    said = f"no gradient fault: {', '.join(labels)}" if labels else "the published fix"
    return Case(name, family, build, "healthy", tolerated=ABOUT_DATA, truth=said)


def programs() -> tuple[Case, ...]:
    """The forum programs, as asked about and as fixed."""
    found: list[Case] = []
    for fact in facts("deeplocalize"):
        found.append(program_case(f"{fact['so_id']}_buggy", fact["spec"], fact["ground_truth"]))
        if "spec_fixed" in fact:
            found.append(program_case(f"{fact['so_id']}_fixed", fact["spec_fixed"], []))
    return tuple(found)


# --- training-failure-atlas ----------------------------------------------------------------------

ATLAS: dict[str, tuple[str, frozenset[str], frozenset[str]]] = {
    "unnormalized_inputs": ("sick", frozenset({"unnormalised-input"}), frozenset({"UP504"})),
    "dead_relus": ("vanishing", frozenset({"dead-units"}), frozenset({"SA302", "VG101"})),
    "vanishing_gradients": ("vanishing", frozenset({"activation", "initialisation"}), frozenset({"VG101"})),
    "exploding_init": ("exploding", frozenset({"initialisation"}), frozenset({"EG201", "EG202"})),
}
"""The scenarios that show before training; all others leave the flow healthy."""


def atlas_build(config: Spec, seed: int) -> Built:
    """nn.Linear's initialisation times `init_gain`, hidden biases at `hidden_bias`; 1,300 training rows."""
    raw, labels = load_digits(return_X_y=True)
    x = torch.tensor(raw[:1300], dtype=torch.float32)
    if config["standardize"]:
        x = (x - x.mean(0)) / x.std(0).clamp(min=1e-6)
    x, y = x[:64] * config["input_scale"], torch.tensor(labels[:64])
    torch.manual_seed(seed)
    activation: Callable[[], nn.Module] = {"relu": nn.ReLU, "sigmoid": nn.Sigmoid}[config["activation"]]
    sizes = [64, *config["hidden"]]
    model = nn.Sequential()
    for fan_in, fan_out in itertools.pairwise(sizes):
        hidden = nn.Linear(fan_in, fan_out)
        nn.init.constant_(hidden.bias, config["hidden_bias"])
        model.append(hidden).append(activation())
    model.append(nn.Linear(sizes[-1], 10))
    with torch.no_grad():
        for layer in model:
            if isinstance(layer, nn.Linear):
                layer.weight *= config["init_gain"]
    return model, lambda m: functional.cross_entropy(m(x), y)


def atlas() -> tuple[Case, ...]:
    """The scenarios of training-failure-atlas, three seeds each."""

    def one(fact: Spec, seed: int) -> Case:
        label = fact["ground_truth"]
        verdict, causes, codes = ATLAS.get(label, ("healthy", frozenset[str](), frozenset[str]()))
        said = f"published: {label}, accuracies {min(fact['val_acc']):.2f} to {max(fact['val_acc']):.2f} of ten seeds"

        def build() -> Built:
            return atlas_build(fact["config"], seed)

        return Case(f"atlas {label} #{seed}", "atlas", build, verdict, causes, codes, truth=said)

    return tuple(one(fact, seed) for fact in facts("training_failure_atlas") for seed in range(SEEDS))


def published() -> tuple[Case, ...]:
    """Every published case."""
    return (*autotrainer(), *programs(), *atlas())
