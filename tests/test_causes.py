"""A fault is planted; the intervention that undoes it must be the first that is blamed."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from isograd import check
from isograd.diagnosis import Diagnosis, Effect, Finding
from isograd.prescription import Patient
from isograd.remedies import exchange_activation, lsuv, standardise_input
from isograd.repair import repair
from tests.models import HE, Built, Loss, classified, mlp, relu_he, relu_large, sigmoid_xavier

Norm = Callable[[int], nn.Module]


def normed(norm: Norm, layers: int, *, batch: int = 32) -> Built:
    """Linear, normalisation and ReLU in a row, He's weights."""
    body = [part for i in range(layers) for part in (nn.Linear(32 if i else 64, 32), norm(32), nn.ReLU())]
    model = nn.Sequential(*body, nn.Linear(32, 10))
    for layer in model:
        if isinstance(layer, nn.Linear):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)
    return classified(model, batch=batch)


def with_gain(norm: Norm, gain: float) -> Norm:
    def make(width: int) -> nn.Module:
        made = norm(width)
        nn.init.constant_(made.weight, gain)  # pyright: ignore[reportArgumentType]
        return made

    return make


class Branching(nn.Module):
    """x + factor * f(x) with nothing that normalises."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.f, self.factor = mlp(nn.ReLU, 1, HE, width=32, inputs=32, classes=32), factor

    def forward(self, x: Tensor) -> Tensor:
        return x + self.factor * self.f(x)


def branching(blocks: int, factor: float) -> Built:
    return classified(
        nn.Sequential(nn.Linear(64, 32), *(Branching(factor) for _ in range(blocks)), nn.Linear(32, 10))
    )


def shifted(bias: float) -> Built:
    """Every bias far below zero: ReLU lets nothing through."""
    model = mlp(nn.ReLU, 8, HE)
    for layer in model:
        if isinstance(layer, nn.Linear):
            nn.init.constant_(layer.bias, bias)
    return classified(model)


def fed(factor: float) -> Built:
    """A tanh network that gets its data in another unit."""
    x, y = torch.randn(32, 64) * factor, torch.randint(10, (32,))
    return mlp(nn.Tanh, 6, 1.0), lambda m: functional.cross_entropy(m(x), y)


class Square(nn.Module):
    """Homogeneous of degree two: no scale of the weights keeps the signal where it is."""

    def forward(self, x: Tensor) -> Tensor:
        return x * x


def squares() -> Built:
    body = [part for _ in range(10) for part in (nn.Linear(32, 32), Square())]
    return classified(nn.Sequential(nn.Linear(64, 32), *body, nn.Linear(32, 10)))


def lengths(size: float, normalised: Any = nn.utils.parametrizations.weight_norm) -> Built:
    """ReLU layers whose weights are a length and a direction."""
    model = mlp(nn.ReLU, 12, HE)
    for layer in list(model)[:-1]:
        if isinstance(layer, nn.Linear):
            normalised(layer)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("original0", "weight_g")):
                parameter.fill_(size)
    return classified(model)


def past() -> Built:
    """Batch normalisation in eval mode, of a signal that it does not know."""
    model, loss = normed(nn.BatchNorm1d, 12)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            assert module.running_var is not None
            module.running_var.fill_(100.0)
    return model.eval(), loss


PLANTED: dict[str, tuple[Callable[[], Built], str, str]] = {
    "sigmoid layers": (lambda: sigmoid_xavier(10), "VG101", "activation"),
    "ReLU, half of He": (lambda: classified(mlp(nn.ReLU, 16, 0.5 * HE)), "VG101", "initialisation"),
    "tanh, gain 0.4": (lambda: classified(mlp(nn.Tanh, 20, 0.4)), "VG101", "initialisation"),
    "ReLU, 2.5 of He": (relu_large, "EG201", "initialisation"),
    "the same, forward": (relu_large, "EG202", "initialisation"),
    "tanh, gain 3": (lambda: classified(mlp(nn.Tanh, 40, 3.0)), "EG201", "initialisation"),
    "biases of -3": (lambda: shifted(-3.0), "VG101", "dead-units"),
    "60 batch norms": (lambda: normed(nn.BatchNorm1d, 60, batch=64), "EG201", "batchnorm-without-skips"),
    "batch norm, gamma 1e-4": (lambda: normed(with_gain(nn.BatchNorm1d, 1e-4), 12), "VG101", "norm-gain"),
    "layer norm, gamma 1e-4": (lambda: normed(with_gain(nn.LayerNorm, 1e-4), 12), "VG101", "norm-gain"),
    "weight norm, length 0.05": (lambda: lengths(0.05), "VG101", "norm-gain"),
    "weight norm of old, length 20": (lambda: lengths(20.0, nn.utils.weight_norm), "EG201", "norm-gain"),
    "batch norm by the past": (past, "VG101", "norm-statistics"),
    "layer norm, eps 100": (
        lambda: normed(lambda w: nn.LayerNorm(w, eps=100.0), 12),
        "VG101",
        "norm-epsilon",
    ),
    "inputs of a million": (lambda: fed(1e6), "VG101", "unnormalised-input"),
    "30 branches": (lambda: branching(30, 1.0), "EG201", "residual-branch-growth"),
    "20 branches, twice": (lambda: branching(20, 2.0), "EG202", "residual-branch-growth"),
    "squares": (squares, "VG101", "missing-normalisation"),
}
"""What is planted -> the net, the finding, and the cause to be named first."""


def found(diagnosis: Diagnosis, code: str) -> Finding:
    (finding,) = [f for f in diagnosis.errors if f.code == code]
    return finding


@pytest.mark.parametrize("case", PLANTED)
@pytest.mark.parametrize("seed", [0, 1])
def test_the_planted_fault_is_the_first_cause(case: str, seed: int) -> None:
    build, code, cause = PLANTED[case]
    torch.manual_seed(seed)
    finding = found(check(*build()), code)

    assert finding.evidence["cause"] == cause
    assert str(finding.evidence["causes"]).split(",")[0] == cause
    assert "measured by exchange" in finding.cause
    assert finding.remedies
    (effect,) = [e for e in finding.effects if e.cause == cause]
    assert effect.given_back > effect.decades_before / 2
    assert effect.note or effect.given_back == pytest.approx(effect.decades_before - effect.decades_after)


@pytest.mark.parametrize(
    "case", ["ReLU, half of He", "60 batch norms", "layer norm, eps 100", "inputs of a million"]
)
def test_undoing_the_fault_by_hand_cures(case: str) -> None:
    """What the intervention promises, checked against the net without the fault."""
    cured: dict[str, Callable[[], Built]] = {
        "ReLU, half of He": lambda: classified(mlp(nn.ReLU, 16, HE)),
        "60 batch norms": lambda: classified(mlp(nn.ReLU, 60, HE, width=32)),
        "layer norm, eps 100": lambda: normed(nn.LayerNorm, 12),
        "inputs of a million": lambda: fed(1.0),
    }
    torch.manual_seed(0)
    assert check(*PLANTED[case][0]()).verdict != "healthy"
    torch.manual_seed(0)
    assert check(*cured[case]()).verdict == "healthy"


def test_what_two_changes_give_back_only_together_is_said() -> None:
    """ReLU in place of the sigmoid cures at the gain that ReLU needs: with the sigmoid's weights it does not."""
    torch.manual_seed(0)
    finding = found(check(*sigmoid_xavier(10)), "VG101")
    alone = {e.cause: e for e in finding.effects}
    activation, weights = alone["activation"], alone["initialisation"]
    assert activation.given_back > activation.decades_before / 2
    assert "both give back together" in activation.note
    assert activation.given_back + weights.given_back <= activation.decades_before + 1e-9


def test_of_two_faults_the_smaller_is_not_blamed_for_being_tried_first() -> None:
    torch.manual_seed(0)
    model = mlp(nn.ReLU, 16, 0.5 * HE)
    for layer in (model[6], model[10], model[14]):
        assert isinstance(layer, nn.Linear)
        nn.init.constant_(layer.bias[:40], -10.0)  # 40 of their 64 units are dead
    finding = found(check(*classified(model)), "VG101")
    given = {e.cause: e.given_back for e in finding.effects}
    assert next(iter(given)) == "dead-units"
    assert 0.2 * finding.effects[0].decades_before < given["dead-units"] < given["initialisation"]
    assert finding.evidence["cause"] == "initialisation"


def test_a_healthy_model_has_no_intervention_tried_on_it() -> None:
    torch.manual_seed(0)
    assert all(f.effects == () for f in check(*relu_he()).findings)


def test_every_finding_about_depth_carries_all_effects() -> None:
    torch.manual_seed(0)
    forward, backward = (found(check(*relu_large()), code) for code in ("EG202", "EG201"))
    assert [e.cause for e in forward.effects] == [e.cause for e in backward.effects]
    assert {e.decades_before for e in backward.effects} == {backward.effects[0].decades_before}


def effects_of(model: nn.Module, loss: Loss) -> tuple[Effect, ...]:
    return found(check(model, loss), "VG101").effects


class Locked(nn.Sequential):
    """Holds what cannot be copied, and with `beside` a tensor in one place with it."""

    def __init__(self, *parts: nn.Module, beside: Tensor | None = None) -> None:
        super().__init__(*parts)
        self.kept = {"lock": threading.Lock(), "beside": beside}


class Logistic(torch.autograd.Function):
    """A sigmoid that torch does not know to be one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = 1 / (1 + torch.exp(-x))
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return grads[0] * y * (1 - y)


class Formula(nn.Module):
    """A module of the user's that is an activation and nothing else."""

    def forward(self, x: Tensor) -> Tensor:
        return 1 / (1 + torch.exp(-x))


class Shifted(nn.Module):
    """A module of the user's that is no function: an affine map."""

    def forward(self, x: Tensor) -> Tensor:
        return 0.1 * x + 0.2


class Written(nn.Module):
    """Layers with a function of the user's own between them."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(12))
        self.head, self.function = nn.Linear(64, 10), function
        for layer in self.layers:
            nn.init.xavier_normal_(layer.weight)  # pyright: ignore[reportArgumentType]

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = self.function(layer(x))
        return self.head(x)


OWN: dict[str, Callable[[Tensor], Tensor]] = {
    "Logistic": Logistic.apply,  # pyright: ignore[reportAssignmentType]
    "rdiv": lambda x: 1 / (1 + torch.exp(-x)),
}


@pytest.mark.parametrize("name", OWN)
def test_a_function_of_ones_own_is_blamed_for_what_it_costs(name: str) -> None:
    torch.manual_seed(0)
    model, loss = classified(Written(OWN[name]))
    found = check(model, loss)
    (finding,) = [f for f in found.errors if f.code == "VG101"]
    assert finding.evidence["cause"] == "activation"
    assert name in finding.cause
    assert "read off the backbone" in finding.cause
    sites = [site for site in found.flow.sites[found.flow.hidden] if site.kind in ("elementwise", "custom")]
    cost = -float(found.flow.column("decades")[[site.depth for site in sites]].sum())
    assert finding.effects[0].given_back == pytest.approx(cost)
    assert "expected" not in finding.evidence  # theory knows the layers and not what stands between them
    (rx,) = exchange_activation.prescribe(Patient(model, found, loss))
    assert name in rx.why_not
    assert any("test_causes.py" in line for line in rx.advice)


def test_a_module_of_ones_own_that_is_an_activation_is_exchanged() -> None:
    torch.manual_seed(0)
    model, loss = classified(Written(Formula()))
    before = check(model, loss)
    rx = next(iter(exchange_activation.prescribe(Patient(model, before, loss))))
    assert [(e.place, e.verb, e.of) for e in rx.edits] == [("function", "replace", "nn.ELU")]
    assert "in place of Formula" in rx.title
    mended = repair(model, loss)
    assert mended.cured
    assert isinstance(mended.model.function, nn.ELU)


def test_an_affine_module_is_no_activation() -> None:
    torch.manual_seed(0)
    model, loss = classified(Written(Shifted()))
    (rx,) = exchange_activation.prescribe(Patient(model, check(model, loss), loss))
    assert "no saturating activation" in rx.why_not


def test_a_model_that_cannot_be_copied_is_diagnosed_and_its_causes_are_untested() -> None:
    torch.manual_seed(0)
    model, loss = sigmoid_xavier(10)
    locked = Locked(*model.children(), beside=torch.zeros(1))
    finding = found(check(locked, loss), "VG101")
    assert all(math.isnan(e.given_back) and "could not be tested" in e.note for e in finding.effects)
    assert finding.cause == "no change could be tried on a copy"
    assert "cause" not in finding.evidence


def test_what_cannot_be_copied_is_shared_where_it_is_no_part_of_the_model() -> None:
    torch.manual_seed(0)
    model, loss = sigmoid_xavier(10)
    locked = Locked(*model.children())
    cured = repair(locked, loss)
    assert cured.cured
    assert isinstance(cured.model, Locked)
    assert cured.model.kept is locked.kept
    assert not {id(p) for p in cured.model.parameters()} & {id(p) for p in locked.parameters()}


def test_a_loss_that_closes_over_its_own_model_leaves_the_causes_untested() -> None:
    torch.manual_seed(0)
    model, loss = sigmoid_xavier(10)
    effects = effects_of(model, lambda _: loss(model))
    assert effects
    assert all(math.isnan(e.given_back) for e in effects)


class Equation(nn.Module):
    """u'' = -sin, of a network with this activation: what passes back are second derivatives."""

    def __init__(self, activation: Callable[[], nn.Module]) -> None:
        super().__init__()
        widths = [1, 32, 32, 32]
        layers = [part for a, b in pairwise(widths) for part in (nn.Linear(a, b), activation())]
        self.net = nn.Sequential(*layers, nn.Linear(32, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def residual(m: nn.Module) -> Tensor:
    x = torch.linspace(0, 1, 32)[:, None].requires_grad_()
    (slope,) = torch.autograd.grad(m(x).sum(), x, create_graph=True)
    (bend,) = torch.autograd.grad(slope.sum(), x, create_graph=True)
    return (bend + x.sin()).square().mean() + m(x[:1]).square().mean() + m(x[-1:]).square().mean()


def test_a_piecewise_linear_function_has_no_second_derivative() -> None:
    torch.manual_seed(0)
    assert not check(Equation(nn.Tanh), residual).errors
    finding = found(check(Equation(nn.ReLU), residual), "VG101")
    assert finding.evidence["cause"] == "activation"
    assert any("relu exchanged for SiLU" in e.intervention and e.given_back > 10 for e in finding.effects)


def test_a_slope_of_straight_pieces_teaches_all_weights() -> None:
    """A gradient penalty on a critic of ReLUs: the slope is the same all around a sample, and a product of weights."""

    def penalty(m: nn.Module) -> Tensor:
        x = torch.linspace(0, 1, 32)[:, None].requires_grad_()
        (slope,) = torch.autograd.grad(m(x).sum(), x, create_graph=True)
        return m(x - 1).mean() - m(x).mean() + 10 * (slope.norm(dim=1) - 1).square().mean()

    torch.manual_seed(0)
    diagnosis = check(Equation(nn.ReLU), penalty)
    assert diagnosis.verdict == "healthy"
    assert "of the input alone" in diagnosis.unexamined["VG101"]


def test_a_loss_that_differentiates_the_model_can_be_repaired() -> None:
    """Remedies that look at what the model computes let it compute with gradients."""
    torch.manual_seed(0)
    model = Equation(nn.Tanh)
    patient = Patient(model, check(model, residual), residual)
    assert [rx.applicable for rx in lsuv.prescribe(patient)] == [True]

    def far(m: nn.Module) -> Tensor:
        x = torch.linspace(0, 1000, 32)[:, None].requires_grad_()
        (slope,) = torch.autograd.grad(m(x).sum(), x, create_graph=True)
        return (slope - 1).square().mean()

    patient = Patient(model, check(model, far), far)
    assert [rx.applicable for rx in standardise_input.prescribe(patient)] == [True]


def test_a_model_that_is_run_several_times_is_repaired_as_one() -> None:
    """Three runs of one network, two of them beside the way that the gradient takes: no call of it is a gate."""
    torch.manual_seed(0)
    cured = repair(Equation(nn.ReLU), residual)
    assert cured.before.flow.calls == 3
    assert cured.cured
    assert isinstance(cured.model.get_submodule("net.1"), nn.Tanh)


def test_a_model_that_keeps_what_it_computed_can_be_copied() -> None:
    """Features for a second loss, attention maps for a picture: torch copies no tensor with a graph."""

    class Keeping(nn.Sequential):
        def forward(self, input: Tensor) -> Tensor:
            self.seen = {"features": [self[0](input)]}
            return super().forward(input)

    torch.manual_seed(0)
    model, loss = sigmoid_xavier(10)
    kept = Keeping(*model.children())
    loss(kept)
    assert not kept.seen["features"][0].is_leaf
    assert all(math.isfinite(e.given_back) for e in effects_of(kept, loss))
