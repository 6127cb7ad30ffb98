"""rescale-weights: weights multiplied to the critical gain, not drawn anew.

What it does
    Multiplies the weights of every layer whose sigma_w is off by more than a quarter by one number, so that it becomes
    the critical sigma_w of the activation after it. Layers that are right, and all biases, stay as they are.

When it helps
    Where the size of the weights is wrong and their directions are not (what is ten times too loud is scaled alone first): one layer that was scaled down, orthogonal
    weights of the wrong gain, a checkpoint converted with a factor. What was learned is kept. Where most layers are
    off and all are matrices of independent draws there is nothing to keep, and orthogonal weights train deep narrow
    chains better. An orthogonal kernel is no orthogonal convolution: those are multiplied.

Expected effect
    Gain 1 per layer, as `critical-initialisation` has it, with the scatter of the weights as they were drawn.

Safety
    Unsafe: the model computes another function. Frozen parameters, recurrences and a head are left alone, but for one
    that is ten times too loud.

References
    Schoenholz et al. 2017, arXiv:1611.01232; He et al. 2015, arXiv:1502.01852.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch import Tensor

from isograd.layers import Layer, layers
from isograd.prescription import Patient, Prescription, Reach, not_applicable
from isograd.remedies.critical_initialisation import expected, remaining, wanted, weight

SLUG = "rescale-weights"
TREATS = ("initialisation", "VG101", "EG201", "EG202", "EG205", "SA301", "attention-logits")
OFF = 1.25
"""Factor beyond which a layer's scale is off: a draw of 48 x 48 weights scatters by 2%, tanh trains at 1 to 1.2."""

LOUD = 10.0
"""Factor beyond which a layer is scaled down alone, and a head at all, which may start at zero or small: at ten times its
gain a loss starts at several times a constant answer."""


def prescribe(patient: Patient) -> Iterator[Prescription]:
    """One factor for each layer that is off."""
    fit = _fit(patient)
    off = [layer for layer in fit if abs(math.log(_factor(layer))) > math.log(OFF)]
    loud = [layer for layer in off if _loud(layer)]
    if loud and len(loud) < len(off) and 2 * len(loud) <= len(fit):  # the rest may be as it is meant to be
        yield _scaled(patient, loud, len(fit))
    if not off:
        why = "every weight has the critical gain of its activation" if fit else "no trainable layer was seen"
        yield not_applicable(SLUG, f"{why}, or none that a factor could give it")
        return
    parameters = dict(patient.model.named_parameters())
    matrices = [parameters[layer.weight][slice(*layer.rows or (None,))] for layer in off]
    if 2 * len(off) > len(fit) and all(m.ndim == 2 and independent(m) for m in matrices):
        yield not_applicable(SLUG, "the weights are independent draws: drawn anew, they lose nothing")
        return
    yield _scaled(patient, off, len(fit))


def quietened(patient: Patient) -> Iterator[Prescription]:
    """Only what is ten times too loud: that is wrong whatever stands around it."""
    fit = _fit(patient)
    if loud := [layer for layer in fit if _loud(layer)]:
        yield _scaled(patient, loud, len(fit))


def _fit(patient: Patient) -> list[Layer]:
    """Layers whose size can be told to be right or wrong."""
    return [
        layer
        for layer in layers(patient.flow, patient.model, patient.exchanged)
        if layer.calls <= 1 and 0 < layer.sigma_w < math.inf and (not layer.head or _loud(layer))
    ]


def _factor(layer: Layer) -> float:
    return wanted(layer) / layer.sigma_w


def _loud(layer: Layer) -> bool:
    return layer.sigma_w > LOUD * wanted(layer)


def _scaled(patient: Patient, off: list[Layer], count: int) -> Prescription:
    found = layers(patient.flow, patient.model, patient.exchanged)
    return Prescription(
        SLUG,
        f"{len(off)} of {count} layers scaled to the critical gain",
        tuple(weight(layer, ".mul_", {"other": float(f"{_factor(layer):.6g}")}) for layer in off),
        reach=Reach.INITIALISATION,
        treats=TREATS,
        expected=expected(found),
        decades=remaining(patient.flow, found),
        references=("Schoenholz et al. 2017, arXiv:1611.01232", "He et al. 2015, arXiv:1502.01852"),
    )


def independent(weight: Tensor) -> bool:
    """Do its singular values scatter as those of independent draws?

    For an m x n matrix of independent elements, E s^4 / (E s^2)^2 over its m <= n singular values is 1 + m / n on average
    (Marchenko and Pastur 1967), with a standard deviation of 2 / n; it is 1 for an orthogonal one, and above for
    what was learned.
    """
    matrix = weight.detach().double().flatten(1)
    if len(matrix) > matrix.shape[1]:
        matrix = matrix.T
    rows, columns = matrix.shape
    gram = matrix @ matrix.T
    scatter = float(rows * gram.square().sum() / gram.trace() ** 2) if rows else 1.0
    return abs(scatter - 1 - rows / columns) < 4 * 2 / columns
