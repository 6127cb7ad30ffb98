"""recurrent-initialisation: recurrent weights that carry the state for as many steps as there are.

What it does
    Brings the state's weights to the scale of an orthogonal matrix where they have another, gate by gate in LSTM and
    GRU: independent draws are drawn anew, orthogonal, with zero biases where no gates stand on them, and what is more
    than that is multiplied. If that is not enough,
    either the input's as well, so small that tanh stays near its origin for all steps; or the state's the identity,
    with ReLU in place of tanh (IRNN), with input weights of deviation 1 / sqrt(T fan_in), at which the state has
    variance 1 after T steps (Le et al. take 0.001 for any T), and zero biases.

When it helps
    A recurrence multiplies by the same matrix at every step: a gain of 0.95 leaves 0.00004 of the gradient after 200.
    Drawn as a layer's, with sigma_w = 1 and inputs of their own, tanh units saturate and lose a third per step.

Expected effect
    Orthogonal and small: 1 decade over the whole sequence, by the choice of the input's scale. Identity: none
    through units that stay positive.

Safety
    Unsafe: the model computes another function; IRNN exchanges its activation.

References
    Le, Jaitly and Hinton 2015, arXiv:1504.00941; Saxe et al. 2014, arXiv:1312.6120; Henaff et al. 2016.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache

from torch import Tensor, nn

from isograd import theory
from isograd.edit import Edit
from isograd.layers import Layer, layers, recurrent, rms, steps_of
from isograd.prescription import Patient, Prescription, Reach, not_applicable
from isograd.remedies.exchange_activation import exchanges
from isograd.remedies.rescale_weights import independent

SLUG = "recurrent-initialisation"
TREATS = ("initialisation", "VG101", "EG201", "EG202", "RN601", "RN602")
SMALL = 0.5
"""Input weights over those that torch draws, from U(-1, 1) / sqrt(hidden size)."""
OFF = 1.25
"""Factor from 1 beyond which the scale of a recurrent matrix is off; torch draws 0.58."""


def prescribe(patient: Patient) -> Iterator[Prescription]:
    """The state's weights alone, where they are off; then with what goes in: written out, nn.RNN and nn.RNNCell."""
    fused = list(_fused(patient.model))
    found = layers(patient.flow, patient.model, patient.exchanged)
    states = [layer for layer in recurrent(found) if layer.activation != "linear" and not patient.flow.splits]
    parameters = dict(patient.model.named_parameters())
    alone = [*_written_alone(states, parameters), *_gates_alone(patient)]
    if alone:
        yield _alone(alone, [edit for edit in _biases(alone, states, fused) if parameters[edit.place].any()])
    if states:
        yield from _written_out(patient, found, states)
    elif fused:
        steps = max(steps_of(patient.flow, name, module) for name, module in fused)
        yield _small(_fused_edits(fused, steps), steps)
        yield _identity(_irnn(fused, steps), len(fused))
    elif not alone:
        yield not_applicable(
            SLUG, "no plain recurrence was seen: no weight acts on the state again and again"
        )


def _written_alone(states: list[Layer], weights: dict[str, nn.Parameter]) -> Iterator[Edit]:
    for layer in states:
        if _off(layer.sigma_w):
            yield _to_scale(layer.weight, weights[layer.weight], layer.sigma_w)


def _gates_alone(patient: Patient) -> Iterator[Edit]:
    """Every gate has a matrix of its own; torch keeps them one below the other.

    Inputs are drawn where they are zero, and of a stack through which the signal fades where they are small.
    """
    fades = "VG101" in patient.told
    for path, module in patient.model.named_modules():
        if not isinstance(module, nn.RNNBase | nn.RNNCellBase):
            continue
        for name, parameter in _weights(module, "weight_"):
            width = module.hidden_size
            place = f"{path}.{name}".lstrip(".")
            for first in range(0, len(parameter), width):
                gate = parameter[first : first + width]
                sigma_w = rms(gate) * math.sqrt(parameter.shape[1])
                small = fades and rms(gate) * math.sqrt(3 * width) < SMALL
                if _off(sigma_w) if name.startswith("weight_hh") else small or sigma_w == 0:
                    rows = (first, first + width) if width < len(parameter) else None
                    yield _to_scale(place, gate, sigma_w, rows)


def _biases(
    alone: list[Edit], states: list[Layer], fused: list[tuple[str, nn.RNN | nn.RNNCell]]
) -> Iterator[Edit]:
    """Of states that are drawn anew: tanh loses nothing at sigma_w 1 without biases, and a step for each of them."""
    drawn = {edit.place for edit in alone if edit.of == "nn.init.orthogonal_"}
    for layer in states:
        if layer.weight in drawn:
            yield from (Edit(bias, "fill", "nn.init.zeros_") for bias in layer.biases)
    for path, module in fused:
        if any(f"{path}.{name}".lstrip(".") in drawn for name, _ in _weights(module, "weight_hh")):
            yield from _zero(path, module)


def _zero(path: str, module: nn.Module) -> Iterator[Edit]:
    for name, _ in _weights(module, "bias"):
        yield Edit(f"{path}.{name}".lstrip("."), "fill", "nn.init.zeros_")


def _to_scale(place: str, weight: Tensor, sigma_w: float, rows: tuple[int, int] | None = None) -> Edit:
    """Independent draws are exchanged for orthogonal ones; the directions of any other matrix are kept."""
    before = f"sigma_w {sigma_w:.3g}"
    if independent(weight) or not 0 < sigma_w < math.inf:
        return Edit(place, "fill", "nn.init.orthogonal_", rows=rows, before=before)
    factor = float(f"{1 / sigma_w:.6g}")
    return Edit(place, "fill", ".mul_", {"other": factor}, rows=rows, before=before)


def _off(sigma_w: float) -> bool:
    """Is the matrix far from an orthogonal one, whose sigma_w is 1?"""
    return not 1 / OFF < sigma_w < OFF


def _alone(edits: list[Edit], biases: list[Edit]) -> Prescription:
    without = ", without biases" if biases else ""
    return Prescription(
        SLUG,
        f"state at the scale of an orthogonal matrix: {len(edits)} matri{'ces' if len(edits) > 1 else 'x'}{without}",
        (*edits, *biases),
        reach=Reach.INITIALISATION,
        treats=TREATS,
        expected="gain 1 per step but for the slope of the activation",
        references=("Saxe et al. 2014, arXiv:1312.6120", "Henaff et al. 2016"),
    )


def _written_out(patient: Patient, found: list[Layer], states: list[Layer]) -> Iterator[Prescription]:
    widths = {layer.fan_out for layer in states}
    inputs = [la for la in found if la.calls == 0 and not (la.head or la.attends) and la.fan_out in widths]
    steps = max(layer.calls for layer in states)
    size = max((seen.rms for seen in patient.flow.inputs.values()), default=1.0) or 1.0
    before = {layer.weight: f"sigma_w {layer.sigma_w:.3g}" for layer in found}
    zero = [Edit(bias, "fill", "nn.init.zeros_") for layer in (*states, *inputs) for bias in layer.biases]
    if {layer.activation for layer in states} <= {"tanh", "hardtanh", "softsign"}:
        edits = [Edit(la.weight, "fill", "nn.init.orthogonal_", before=before[la.weight]) for la in states]
        for la in inputs:
            std = float(f"{input_scale(steps) / math.sqrt(la.fan_in) / size:.6g}")
            edits.append(Edit(la.weight, "fill", "nn.init.normal_", {"std": std}, before=before[la.weight]))
        yield _small([*edits, *zero], steps)
    edits = [Edit(la.weight, "fill", "nn.init.eye_", before=before[la.weight]) for la in states]
    for la in inputs:
        std = float(f"{1 / math.sqrt(steps * la.fan_in) / size:.6g}")
        edits.append(Edit(la.weight, "fill", "nn.init.normal_", {"std": std}, before=before[la.weight]))
    flat = sorted({la.activation for la in states} - {"relu"})
    changed, by_hand = exchanges(patient, flat, "relu") if flat else ([], [])
    if changed or not flat:
        yield _identity([*changed, *edits, *zero], len(states), *by_hand)


def _small(edits: list[Edit], steps: int) -> Prescription:
    return Prescription(
        SLUG,
        f"orthogonal state, inputs small enough for {steps} steps",
        tuple(edits),
        reach=Reach.INITIALISATION,
        treats=TREATS,
        expected=f"1 decade lost over {steps} steps",
        decades=-1.0,
        references=("Saxe et al. 2014, arXiv:1312.6120", "Henaff et al. 2016"),
    )


def _identity(edits: list[Edit], count: int, *by_hand: str) -> Prescription:
    return Prescription(
        SLUG,
        f"IRNN: the identity and ReLU for {count} recurrence{'s' * (count > 1)}",
        tuple(edits),
        reach=Reach.ACTIVATION,
        treats=TREATS,
        expected="gain 1 per step through units that stay positive",
        decades=0.0,
        references=("Le et al. 2015, arXiv:1504.00941",),
        advice=by_hand,
    )


@cache
def input_scale(steps: int) -> float:
    """Standard deviation that the inputs may add to the pre-activation: one decade is lost over all the steps.

    With an orthogonal matrix the state's variance is q = E tanh(x)^2 + sigma^2 over x ~ N(0, q), and the gain per
    step sqrt(E tanh'(x)^2).
    """
    wanted = 10 ** (-2 / steps)
    low, high = math.log(1e-8), math.log(10.0)
    for _ in range(24):
        middle = (low + high) / 2
        if theory.moments("tanh", math.exp(middle)).slope_square > wanted:
            low = middle
        else:
            high = middle
    q = math.exp(low)
    return math.sqrt(max(q - theory.moments("tanh", q).square, 0.0))


def _fused(model: nn.Module) -> Iterator[tuple[str, nn.RNN | nn.RNNCell]]:
    for name, module in model.named_modules():
        if isinstance(module, nn.RNN | nn.RNNCell):
            yield name, module


def _weights(module: nn.Module, kind: str) -> Iterator[tuple[str, nn.Parameter]]:
    for name, parameter in module.named_parameters(recurse=False):
        if name.startswith(kind) and parameter.requires_grad:
            yield name, parameter


def _fused_edits(fused: list[tuple[str, nn.RNN | nn.RNNCell]], steps: int) -> list[Edit]:
    edits: list[Edit] = []
    for path, module in fused:
        for name, _ in _weights(module, "weight_hh"):
            edits.append(Edit(f"{path}.{name}".lstrip("."), "fill", "nn.init.orthogonal_"))
        for name, p in _weights(module, "weight_ih"):
            std = float(f"{input_scale(steps) / math.sqrt(p.shape[1]):.6g}")
            edits.append(Edit(f"{path}.{name}".lstrip("."), "fill", "nn.init.normal_", {"std": std}))
        edits += _zero(path, module)
    return edits


def _irnn(fused: list[tuple[str, nn.RNN | nn.RNNCell]], steps: int) -> list[Edit]:
    edits: list[Edit] = []
    for path, module in fused:
        place = f"{path}.nonlinearity".lstrip(".")
        edits.append(Edit(place, "set", arguments={"value": "relu"}, before=module.nonlinearity))
        if isinstance(module, nn.RNN):
            edits.append(
                Edit(f"{path}.mode".lstrip("."), "set", arguments={"value": "RNN_RELU"}, before=module.mode)
            )
        edits += [
            Edit(f"{path}.{n}".lstrip("."), "fill", "nn.init.eye_") for n, _ in _weights(module, "weight_hh")
        ]
        for name, p in _weights(module, "weight_ih"):
            std = float(f"{1 / math.sqrt(steps * p.shape[1]):.6g}")
            edits.append(Edit(f"{path}.{name}".lstrip("."), "fill", "nn.init.normal_", {"std": std}))
        edits += _zero(path, module)
    return edits
