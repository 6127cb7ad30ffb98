"""Structural remedies: each over every family of models applies and runs, or says why it does not."""

from __future__ import annotations

import copy
from importlib import import_module

import pytest
import torch
from torch import Tensor, nn

from isograd.diagnosis import diagnose
from isograd.measure import measure
from isograd.prescription import Patient, Prescription, Safety, apply
from isograd.remedies import Remedy
from tests.families import FAMILIES

STRUCTURAL = (
    "orthogonal_recurrence", "gated_recurrence", "insert_normalisation", "insert_residual", "pass_logits", "pre_norm",
    "query_key_norm", "safe_loss", "standardise_input", "standardise_weights",
)  # fmt: skip


def patient_of(family: str) -> tuple[Patient, nn.Module]:
    torch.manual_seed(0)
    model, loss = FAMILIES[family]()
    model.train()
    return Patient(model, diagnose(measure(model, loss)), loss), model


def remedy(name: str) -> Remedy:
    return import_module(f"isograd.remedies.{name}")  # pyright: ignore[reportReturnType]


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def runs(model: nn.Module, rx: Prescription, patient: Patient) -> None:
    """Forward and backward with a finite loss; every parameter that was reached before still is."""
    assert patient.loss is not None
    changed = apply(model, rx)
    with torch.random.fork_rng():  # dropout
        plain = copy.deepcopy(model)
        reached = {n for n, g in _gradients(plain, patient.loss(plain)).items() if g is not None}
        loss = patient.loss(changed)
        assert loss.isfinite()
        gradients = _gradients(changed, loss)
    renamed = rx.key_map(model)
    gone = {renamed.get(n, n) for n in reached} - {n for n, g in gradients.items() if g is not None}
    replaced = [e.place for e in rx.edits if e.verb == "replace"]
    lost = {n for n in gone if not any(n.startswith(f"{place}.") for place in replaced)}
    assert not lost, f"no gradient reaches {sorted(lost)} any more"


def _gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor | None]:
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, [p for _, p in named], allow_unused=True)
    return {n: g for (n, _), g in zip(named, found, strict=True)}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_remedy_applies_or_says_why_not(family: str) -> None:
    patient, model = patient_of(family)
    before, state = bits(model), torch.get_rng_state()
    for name in STRUCTURAL:
        found = list(remedy(name).prescribe(patient))
        assert found, f"{name} says nothing of {family}"
        for rx in found:
            if rx.why_not:
                assert not rx.edits
                assert len(rx.why_not) > 20
                continue
            assert rx.edits
            assert rx.safety is not Safety.ADVICE
            runs(model, rx, patient)
    after = bits(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before), "the user's model was changed"
    assert torch.equal(state, torch.get_rng_state())
