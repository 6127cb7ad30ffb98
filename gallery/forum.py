"""Programs from a question-and-answer site, as asked about and as fixed (the benchmark of DeepLocalize).

Most of their faults are no gradient faults. Where head and target do not fit, or inputs are far from unit
size, that is to be named. Of the others training tells: can the network learn its rows at all, beside a
sound network with the same head?
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.nn import functional

from gallery.case import Built, Case
from gallery.keras_net import ACTIVATIONS, Spec, loss_of, network
from gallery.nets import HE, initialised
from gallery.published import ABOUT_DATA, DATA, facts
from gallery.training import Setting
from gallery.trial import Verdict, evidence, judged, truth

MISFIT = frozenset({"VG102"})
LARGE = 10.0
"""Root mean square of inputs beyond which 'missing preprocessing' must be said."""
OUT_OF_REACH = 3.0
"""Targets that many times beyond a bounded output."""


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


SETTINGS = {
    "adamw": (Setting("adamw", 1e-3), Setting("adamw", 1e-2)),
    "sgd": (Setting("sgd", 0.1), Setting("sgd", 0.01)),
}
NOTHING_TO_LEARN = 0.1
"""Share of a constant answer's loss that a sound network must take off for the case to tell anything."""


def program_trained(spec: Spec, name: str) -> dict[str, Any]:
    """How much training takes off the loss of a constant answer, beside a sound network.

    The sound network has two hidden layers of 32 ReLUs and the program's own last layer and loss.
    """
    x, y = program_data(name, spec)
    constant = loss_of(spec["loss"])(*_constant(spec, y)).item()
    own = _taken_off(spec, x, y, constant, lambda: network(spec["layers"], x))
    sound = _taken_off(spec, x, y, constant, lambda: _sound(spec, x))
    return {"verdict": shown(own, sound), "constant_loss": constant, "own": own, "sound": sound}


def shown(own: dict[str, float], sound: dict[str, float]) -> Verdict:
    """Sick only if no optimizer gets half of what the sound network gets; healthy as for a trial."""
    best = max(sound.values())
    if best < NOTHING_TO_LEARN:
        return "border"
    if max(own.values()) < best / 2:
        return "sick"
    return "healthy" if judged(own, sound, 0.0) == "healthy" else "border"


def _constant(spec: Spec, y: Tensor) -> tuple[Tensor, Tensor]:
    """The best answer that ignores the input, and the targets, as the loss takes them."""
    if spec["loss"].startswith("sparse"):
        target = functional.one_hot(y.flatten().long(), _units(spec)).float()
        return target.mean(0, keepdim=True).expand_as(target), y
    middle = y.median() if "absolute" in spec["loss"] else y.mean(0, keepdim=True)
    return middle.expand_as(y), y


def _units(spec: Spec) -> int:
    return [layer["units"] for layer in spec["layers"] if "units" in layer][-1]


def _last_activation(spec: Spec) -> str:
    last = [layer for layer in spec["layers"] if layer["class"] in ("Dense", "Activation")][-1]
    return last.get("activation") or "linear"


def _sound(spec: Spec, x: Tensor) -> nn.Module:
    size = math.prod(x.shape[1:])
    body = nn.Sequential(nn.Flatten(), nn.Linear(size, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU())
    initialised(body, HE)
    body.append(nn.Linear(32, _units(spec)))
    if (activation := _last_activation(spec)) != "linear":
        body.append(ACTIVATIONS[activation]())
    return body


def _taken_off(
    spec: Spec, x: Tensor, y: Tensor, constant: float, make: Callable[[], nn.Module]
) -> dict[str, float]:
    """Share of the constant answer's loss that each family of optimizers takes off, on all rows at once."""
    loss = loss_of(spec["loss"])

    def lowest(setting: Setting) -> float:
        torch.manual_seed(0)
        model = make()
        optimizer = setting.attach(model)
        values: list[float] = []
        for _ in range(100 if x.ndim == 4 else 600):
            value = loss(model(x), y)
            if not value.isfinite():
                break
            values.append(value.item())
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
        return min(values, default=math.inf)

    return {
        name: max(0.0, 1 - min(lowest(setting) for setting in settings) / constant)
        for name, settings in SETTINGS.items()
    }


def named() -> list[tuple[str, Spec, list[str]]]:
    """Every program with its name, its facts and the labels others gave it; no labels: the fix."""
    found: list[tuple[str, Spec, list[str]]] = []
    for fact in facts("deeplocalize"):
        found.append((f"{fact['so_id']}_buggy", fact["spec"], fact["ground_truth"]))
        if "spec_fixed" in fact:
            found.append((f"{fact['so_id']}_fixed", fact["spec_fixed"], []))
    return found


FAMILY = "forum program"


def settled(name: str, spec: Spec) -> Case | None:
    """The case whose verdict follows from its facts: a head that does not fit, inputs far from unit size."""
    x, y = program_data(name, spec)

    def build() -> Built:
        return program_build(name, spec)

    head = frozenset({"head"})
    if _units(spec) == 1 and _last_activation(spec) == "softmax":
        return Case(name, FAMILY, build, "broken", head, MISFIT, truth="softmax over one unit is constant")
    bounded = _last_activation(spec) in ("sigmoid", "tanh", "softmax") and "crossentropy" not in spec["loss"]
    if bounded and float(y.abs().max()) > OUT_OF_REACH:
        said = f"output at most 1, targets to {float(y.abs().max()):g}"
        return Case(name, FAMILY, build, "broken", head, MISFIT, truth=said)
    size = float(x.square().mean().sqrt())
    if size > LARGE and spec["layers"][0]["class"] != "BatchNormalization":
        return Case(name, FAMILY, build, "sick", codes=ABOUT_DATA, truth=f"inputs with an rms of {size:g}")
    return None


def program_case(name: str, spec: Spec, labels: list[str]) -> Case | None:
    """What is known of a program by its facts or, failing that, by training it."""
    if (case := settled(name, spec)) is not None:
        return case
    record = truth().get(name)
    if record is None or record["verdict"] == "border":
        return None
    said = f"{evidence(record)}; published label {', '.join(labels) or 'fixed'}"

    def build() -> Built:
        return program_build(name, spec)

    if record["verdict"] == "sick":
        return Case(name, FAMILY, build, "sick", truth=said)
    return Case(name, FAMILY, build, "healthy", tolerated=ABOUT_DATA, truth=said)


def programs() -> tuple[Case, ...]:
    """The forum programs of which something is known."""
    return tuple(case for program in named() if (case := program_case(*program)) is not None)
