"""The function at the model's end goes only where the loss, as it stands, takes what the model then returns."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from isograd import diagnose, measure
from isograd.prescription import Patient, Prescription, Safety, apply
from isograd.remedies import pass_logits
from isograd.repair import repair

X = torch.linspace(-1, 1, 16 * 8).reshape(16, 8).sin()
CLASSES, BINARY = torch.arange(16) % 4, (torch.arange(16) % 2).float().unsqueeze(1)
Of = Callable[[Tensor], Tensor]


def headed(end: nn.Module, width: int, bias: float = 0.0) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, width), end)
    nn.init.constant_(model.get_submodule("2").bias, bias)  # pyright: ignore[reportArgumentType]
    return model


def prescribed(model: nn.Module, loss: Of) -> Prescription:
    diagnosis = diagnose(measure(model, lambda m: loss(m(X))))
    (rx,) = pass_logits.prescribe(Patient(model, diagnosis))
    return rx


def logs(p: Tensor) -> Tensor:
    p = p.clamp(1e-7, 1 - 1e-7)
    return -(BINARY * p.log() + (1 - BINARY) * (1 - p).log()).mean()


LOGITS: dict[str, tuple[nn.Module, int, Of]] = {
    "cross_entropy": (nn.Softmax(-1), 4, lambda z: functional.cross_entropy(z, CLASSES)),
    "log_softmax by hand": (nn.Softmax(-1), 4, lambda z: functional.nll_loss(z.log_softmax(-1), CLASSES)),
    "with_logits": (nn.Sigmoid(), 1, lambda z: functional.binary_cross_entropy_with_logits(z, BINARY)),
    "mse, targets to 50": (nn.Sigmoid(), 1, lambda z: functional.mse_loss(z, BINARY * 50)),
}
PROBABILITIES: dict[str, tuple[nn.Module, int, Of]] = {
    "nll_loss of probabilities": (nn.Softmax(-1), 4, lambda p: functional.nll_loss(p, CLASSES)),
    "log of what underflows": (nn.Sigmoid(), 1, lambda p: functional.binary_cross_entropy(p, BINARY)),
    "clip and log": (nn.Sigmoid(), 1, logs),
    "mse": (nn.Sigmoid(), 1, lambda p: functional.mse_loss(p, BINARY)),
}


@pytest.mark.parametrize("case", LOGITS)
def test_it_goes_where_the_loss_takes_logits(case: str) -> None:
    end, width, loss = LOGITS[case]
    model = headed(end, width)
    rx = prescribed(model, loss)
    assert [edit.of for edit in rx.edits] == ["nn.Identity"]
    after = diagnose(measure(apply(model, rx), lambda m: loss(m(X))))
    assert "VG102" in after.healthy


@pytest.mark.parametrize("case", PROBABILITIES)
def test_it_stays_where_the_loss_takes_probabilities(case: str) -> None:
    end, width, loss = PROBABILITIES[case]
    rx = prescribed(headed(end, width, bias=200.0 if width == 1 else 0.0), loss)
    assert rx.safety is Safety.ADVICE
    assert rx.edits == ()
    assert "test_pass_logits.py:" in rx.advice[0]
    assert ("cross_entropy" if width > 1 else "with_logits") in rx.advice[0]


ONE_UNIT: dict[str, Of] = {
    "binary_cross_entropy": lambda p: functional.binary_cross_entropy(p, BINARY),
    "clip and log": logs,
    "mse": lambda p: functional.mse_loss(p, BINARY),
}


@pytest.mark.parametrize("case", ONE_UNIT)
def test_a_softmax_over_one_unit_becomes_a_sigmoid(case: str) -> None:
    loss = ONE_UNIT[case]
    model = headed(nn.Softmax(-1), 1)
    rx = prescribed(model, loss)
    assert [edit.of for edit in rx.edits] == ["nn.Sigmoid"]
    assert "VG102" in diagnose(measure(apply(model, rx), lambda m: loss(m(X)))).healthy


def test_a_module_that_is_shared_stays() -> None:
    relu = nn.ReLU()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), relu, nn.Linear(16, 4), relu)
    rx = prescribed(model, lambda z: functional.cross_entropy(z, CLASSES))
    assert rx.safety is Safety.ADVICE
    assert "return what goes into the relu" in rx.advice[0]


def test_a_saturated_softmax_before_a_logarithm_is_left_as_it_is() -> None:
    model = headed(nn.Softmax(-1), 4)
    with torch.no_grad():
        model.get_parameter("2.weight").mul_(300)
    found = repair(model, lambda m: functional.nll_loss((m(X) + 1e-9).log(), CLASSES))
    assert found.prescription is not None  # the head, which is far too loud
    assert [edit.place for edit in found.prescription.edits] == ["2.weight"]
