"""Keras 3 on torch: its layers are torch modules, its kernels (in, out), its paths those of its variables."""

from __future__ import annotations

import copy
import os
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import isograd
from isograd.diagnosis import diagnose
from isograd.measure import measure
from isograd.prescription import Patient, Prescription, apply
from tests.models import Loss, plain_gradients

os.environ.setdefault("KERAS_BACKEND", "torch")  # Keras looks for TensorFlow otherwise
keras: Any = pytest.importorskip("keras")
if keras.backend.backend() != "torch":
    pytest.skip("Keras runs on another backend here", allow_module_level=True)

X = torch.randn(32, 16, generator=torch.Generator().manual_seed(1))
Y = torch.arange(32) % 4


def chain(activation: str, layers: int, initialiser: Any = "glorot_uniform") -> nn.Module:
    """A Keras functional model: dense layers and four logits."""
    keras.utils.set_random_seed(0)
    start = h = keras.Input((16,))
    for _ in range(layers):
        h = keras.layers.Dense(16, activation=activation, kernel_initializer=initialiser)(h)
    return keras.Model(start, keras.layers.Dense(4)(h))


def convolutions() -> nn.Module:
    keras.utils.set_random_seed(0)
    start = h = keras.Input((8, 8, 3))
    for _ in range(4):
        h = keras.layers.Conv2D(8, 3, padding="same", activation="relu")(h)
    return keras.Model(start, keras.layers.Dense(4)(keras.layers.GlobalAveragePooling2D()(h)))


def loss(model: nn.Module) -> Tensor:
    return functional.cross_entropy(model(X), Y)


def prescribed(name: str, model: nn.Module, of: Loss = loss) -> list[Prescription]:
    patient = Patient(model, diagnose(measure(model, of)), of)
    return list(import_module(f"isograd.remedies.{name}").prescribe(patient))


def test_the_gradient_of_every_variable_is_measured_and_fan_in_is_read_from_the_kernels_first_dimension() -> (
    None
):
    model = chain("tanh", 4)
    flow = measure(model, loss)
    plain = plain_gradients(model, loss)
    found = {p.name: p.grad_norm_log10 for p in flow.parameters}
    assert found == pytest.approx(plain, abs=1e-4)
    assert {p.fan_in for p in flow.parameters if p.name.endswith("kernel")} == {16}
    assert flow.layers == 5


def test_a_sequential_model_of_sigmoids_vanishes_and_its_cause_is_found() -> None:
    keras.utils.set_random_seed(0)
    layers = [keras.layers.Dense(16, activation="sigmoid") for _ in range(12)]
    model = keras.Sequential([keras.Input((16,)), *layers, keras.layers.Dense(4)])
    state = {name: value.clone() for name, value in model.state_dict().items()}
    diagnosis = isograd.check(model, loss)
    assert diagnosis.verdict == "vanishing"
    assert "activation" in str(diagnosis.errors[0].evidence["causes"])
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in state.items())


def test_a_functional_model_is_healthy_where_it_is() -> None:
    assert isograd.check(chain("relu", 8, "he_normal"), loss).verdict == "healthy"


@pytest.mark.parametrize("remedy", ["critical_initialisation", "orthogonal_initialisation"])
def test_an_initialisation_reaches_the_variables_of_a_copy(remedy: str) -> None:
    small = keras.initializers.RandomNormal(stddev=0.1)
    model = chain("relu", 12, small)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    (rx,) = prescribed(remedy, model)
    changed = apply(model, rx)
    assert measure(model, loss).lost < -4
    assert abs(measure(changed, loss).lost) < 1.5
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    names: dict[str, Any] = {}
    exec(rx.to_code(), names)
    printed = names["repair"](copy.deepcopy(model)).state_dict()
    assert all(torch.equal(value, printed[name]) for name, value in changed.state_dict().items())


def test_it_reaches_a_sequential_model_in_place() -> None:
    keras.utils.set_random_seed(0)
    layers = [keras.layers.Dense(16, activation="relu", kernel_initializer="random_normal") for _ in range(8)]
    model = keras.Sequential([keras.Input((16,)), *layers, keras.layers.Dense(4)])
    assert measure(model, loss).lost < -4
    (rx,) = prescribed("critical_initialisation", model)
    assert apply(model, rx, in_place=True) is model
    assert abs(measure(model, loss).lost) < 1.5
    assert abs(float(model.layers[0].kernel.value.detach().std()) - (2 / 16) ** 0.5) < 0.05


def test_what_to_do_by_hand_is_done_where_the_layers_are_made() -> None:
    """All of them call from one line of Keras' own, which is not the user's to change."""
    found = isograd.repair(chain("sigmoid", 12), loss)
    assert found.cured
    assert found.prescription is not None
    assert found.prescription.advice == ("where the layers are made: activation='tanh' in place of sigmoid",)
    start = keras.Input((16,))
    twice = keras.Model(start, keras.layers.Dense(4, activation="softmax", bias_initializer="zeros")(start))
    (ended,) = prescribed("pass_logits", twice)
    assert ended.advice == ("where the layers are made: return what goes into the softmax",)


def test_the_training_is_configured_from_its_gradients() -> None:
    model = chain("tanh", 4)
    (clip,) = prescribed("clip_gradients", model)
    norms = torch.autograd.grad(loss(model), list(model.parameters()))
    total = float(torch.stack([g.norm() for g in norms]).norm())
    c = clip.configuration["clip_grad_norm"]
    assert isinstance(c, float)
    assert 0.3 * total < c <= 1.01 * total
    rates = [rx.configuration.get("lr") for rx in prescribed("lower_learning_rate", model)]
    assert all(isinstance(rate, float) and rate > 0 for rate in rates)


def test_structure_is_not_exchanged_behind_the_back_of_keras() -> None:
    """The layers' calls go by Keras' own graph: what a torch module could be put around is not called."""
    images = torch.randn(4, 8, 8, 3)
    cases: tuple[tuple[nn.Module, Loss], ...] = (
        (chain("relu", 4), loss),
        (convolutions(), lambda m: functional.cross_entropy(m(images), Y[:4])),
    )
    for model, of in cases:
        for name in (
            "insert_normalisation",
            "insert_residual",
            "pre_norm",
            "gated_recurrence",
            "query_key_norm",
        ):
            for rx in prescribed(name, model, of):
                assert rx.why_not, f"{rx.title} would have no effect"
