"""Remedies that change the training and not the model: what they ask for, and that it does what they say."""

from __future__ import annotations

import math
from collections.abc import Callable
from importlib import import_module

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from isograd.diagnosis import diagnose
from isograd.edit import Value
from isograd.measure import measure
from isograd.prescription import Patient, Prescription, Safety, apply
from isograd.rates import adam, critical_rate, gradient_descent
from tests.families import FAMILIES, Recurrent, _sequence
from tests.models import HE, Built, classified, mlp, times

CONFIGURATION = (
    "adam_epsilon", "clip_gradients", "loss_scale", "lower_learning_rate", "truncate_backpropagation", "warm_up",
)  # fmt: skip


def prescribed(name: str, built: Built) -> list[Prescription]:
    model, loss = built
    patient = Patient(model, diagnose(measure(model, loss)), loss)
    return list(import_module(f"isograd.remedies.{name}").prescribe(patient))


def asked(name: str, built: Built) -> dict[str, Value]:
    """What the first prescription asks of the training."""
    return prescribed(name, built)[0].configuration


@pytest.mark.parametrize("family", FAMILIES)
def test_every_remedy_asks_for_something_or_says_why_not(family: str) -> None:
    torch.manual_seed(0)
    model, loss = FAMILIES[family]()
    before, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    patient = Patient(model, diagnose(measure(model, loss)), loss)
    for name in CONFIGURATION:
        found = list(import_module(f"isograd.remedies.{name}").prescribe(patient))
        assert found
        for rx in found:
            if rx.why_not:
                assert len(rx.why_not) > 20
                continue
            assert rx.safety is Safety.SAFE
            assert rx.configuration
            assert rx.advice, "a configuration is told as a line to write"
            changed = apply(model, rx)
            assert changed is not model
            assert all(torch.equal(v, changed.state_dict()[k]) for k, v in before.items())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())


# -- learning rates --------------------------------------------------------------------------------


class Bowl(nn.Module):
    """Half of sum(curvature * w^2)."""

    def __init__(self, curvature: Tensor) -> None:
        super().__init__()
        self.curvature = curvature
        self.w = nn.Parameter(torch.ones(len(curvature), dtype=torch.float64))

    def forward(self) -> Tensor:
        return (self.curvature * self.w.square()).sum() / 2


@pytest.mark.parametrize("curvature", [1e-3, 1.0, 250.0])
def test_in_a_round_bowl_the_critical_rate_is_two_over_the_curvature(curvature: float) -> None:
    found = critical_rate(Bowl(torch.full((5,), curvature, dtype=torch.float64)), lambda m: m())
    assert found.rate == pytest.approx(2 / curvature, rel=0.05)
    assert found.sharpness == pytest.approx(curvature, rel=0.05)
    assert found.forwards < 25


def test_along_a_direction_it_is_two_over_the_curvature_of_that_direction() -> None:
    curvature = torch.tensor([1.0, 10.0, 100.0], dtype=torch.float64)
    gradient = curvature  # at w = 1
    along = float((gradient.square() * curvature).sum() / gradient.square().sum())
    assert critical_rate(Bowl(curvature), lambda m: m()).rate == pytest.approx(2 / along, rel=0.05)
    # the sign's step is (1, 1, 1): it is back where it started at w = -1
    assert critical_rate(Bowl(curvature), lambda m: m(), adam).rate == pytest.approx(2.0, rel=0.05)


def test_the_unit_of_the_loss_divides_the_rate_of_sgd_and_leaves_that_of_adam() -> None:
    torch.manual_seed(0)
    built = classified(mlp(nn.ReLU, 3, HE))
    for factor in (1e-4, 1e4):
        model, loss = times(built, factor)
        for direction, power in ((gradient_descent, 1), (adam, 0)):
            plain = critical_rate(*built, direction).rate
            assert critical_rate(model, loss, direction).rate == pytest.approx(plain / factor**power, rel=0.1)


def test_a_learning_rate_found_trains_and_one_far_above_it_does_not() -> None:
    torch.manual_seed(0)
    model, loss = classified(mlp(nn.ReLU, 3, HE))
    (sgd, _) = prescribed("lower_learning_rate", (model, loss))
    rate = sgd.configuration["lr"]
    assert isinstance(rate, float)
    start = float(loss(model).detach())
    assert descended(model, loss, rate) < start / 3
    far = descended(model, loss, 30 * rate)
    assert math.isnan(far) or far > start / 2


def descended(model: nn.Module, loss: Callable[[nn.Module], Tensor], rate: float) -> float:
    import copy

    model = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    for _ in range(60):
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()
    return float(loss(model).detach())


def test_dropout_does_not_hide_the_rate_and_the_users_random_numbers_go_on() -> None:
    torch.manual_seed(0)
    model, loss = classified(nn.Sequential(nn.Linear(64, 64), nn.Dropout(0.5), nn.ReLU(), nn.Linear(64, 10)))
    state = torch.get_rng_state()
    first, second = critical_rate(model, loss), critical_rate(model, loss)
    assert first == second
    assert torch.equal(state, torch.get_rng_state())


def test_a_rate_needs_a_slope() -> None:
    model, loss = classified(mlp(nn.ReLU, 2, HE))
    with pytest.raises(ValueError, match="exactly zero"):
        critical_rate(model, lambda m: 0 * loss(m))
    with pytest.raises(ValueError, match="not finite"):
        critical_rate(model, lambda m: loss(m) * math.nan)


# -- the others ------------------------------------------------------------------------------------


def test_a_clip_of_an_even_network_is_its_norm_and_of_an_exploding_one_far_below() -> None:
    torch.manual_seed(0)
    for gain, share in ((HE, (0.4, 1.01)), (3 * HE, (0.0, 0.2))):
        model, loss = classified(mlp(nn.ReLU, 12, gain))
        norms = torch.autograd.grad(loss(model), list(model.parameters()))
        total = float(torch.stack([g.norm() for g in norms]).norm())
        c = asked("clip_gradients", (model, loss))["clip_grad_norm"]
        assert isinstance(c, float)
        assert share[0] < c / total <= share[1]


def test_a_clip_is_in_the_unit_of_the_loss() -> None:
    torch.manual_seed(0)
    built = classified(mlp(nn.ReLU, 12, 2 * HE))
    c, scaled = (asked("clip_gradients", b)["clip_grad_norm"] for b in (built, times(built, 1e4)))
    assert isinstance(c, float)
    assert isinstance(scaled, float)
    assert scaled == pytest.approx(1e4 * c, rel=0.01)


def test_a_gradient_that_explodes_by_itself_is_no_measure_for_a_clip() -> None:
    """A sine holds the signal: only the gradient grows, and with it every norm."""

    class Sine(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.sin(30 * x)  # holds the signal, and multiplies the gradient

    torch.manual_seed(0)
    built = classified(mlp(Sine, 8, 1.0))
    assert asked("clip_gradients", built)["clip_grad_norm"] == 1.0


def test_an_epsilon_is_asked_for_where_the_default_would_hold_a_layer_still() -> None:
    torch.manual_seed(0)
    model, loss = classified(mlp(nn.ReLU, 3, HE))
    assert prescribed("adam_epsilon", (model, loss))[0].why_not.startswith("the smallest rms gradient is")
    eps = asked("adam_epsilon", times((model, loss), 1e-8))["eps"]
    assert isinstance(eps, float)
    gradients = torch.autograd.grad(loss(model) * 1e-8, list(model.parameters()))
    smallest = min(float(g.square().mean().sqrt()) for g in gradients)
    assert 1e-3 <= eps / smallest <= 1e-2
    assert "no number of float32" in prescribed("adam_epsilon", times((model, loss), 1e-20))[0].why_not


def test_a_loss_scale_lifts_half_precision_to_its_range_and_is_no_matter_elsewhere() -> None:
    torch.manual_seed(0)
    built = classified(mlp(nn.ReLU, 3, HE))
    assert "float16" in prescribed("loss_scale", built)[0].why_not
    model = built[0].half()
    x, y = torch.randn(16, 64).half(), torch.randint(10, (16,))
    half = (model, lambda m: functional.cross_entropy(m(x).float(), y))
    scale = asked("loss_scale", half)["loss_scale"]
    assert isinstance(scale, float)
    assert math.log2(scale).is_integer()
    gradients = torch.autograd.grad(half[1](model) * scale, list(model.parameters()))
    assert all(g.isfinite().all() for g in gradients)
    assert any(g.abs().max() > 1 for g in gradients)


def test_a_warm_up_is_asked_for_by_norms_behind_residual_sums() -> None:
    torch.manual_seed(0)
    assert asked("warm_up", FAMILIES["post-norm written by hand"]()) == {"warmup": 2000}
    assert prescribed("warm_up", classified(mlp(nn.ReLU, 3, HE)))[0].why_not


@pytest.mark.parametrize(("radius", "steps"), [(0.5, 7), (2.0, 7), (0.99, None)])
def test_back_propagation_is_cut_where_a_hundredth_is_left(radius: float, steps: int | None) -> None:
    torch.manual_seed(0)
    model, loss = _sequence(Recurrent(nn.RNN))
    with torch.no_grad():
        model.rnn.weight_hh_l0.copy_(radius * torch.eye(8))
    (rx,) = prescribed("truncate_backpropagation", (model, loss))
    assert rx.configuration == ({} if steps is None else {"truncate": steps})
    assert bool(rx.why_not) == (steps is None)
