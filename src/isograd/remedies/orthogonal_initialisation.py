"""orthogonal-initialisation: orthogonal weights at the critical gain of the activation in use.

What it does
    Draws every weight matrix as a random orthogonal one (semi-orthogonal where it changes the width) times the
    critical sigma_w of the activation after it; biases as `critical-initialisation` does.

When it helps
    All singular values of a layer are then equal. In a deep chain of linear or tanh layers no direction is lost
    (dynamical isometry), where Gaussian weights spread the singular values exponentially with depth, and a
    narrow layer cannot be unlucky. ReLU networks gain the latter only.

Expected effect
    As `critical-initialisation` on average; without its scatter of sqrt(2 / width) per layer in squared norm.

Safety
    Unsafe: trained weights are lost. Frozen parameters are left alone.

References
    Saxe et al. 2014, arXiv:1312.6120; Pennington et al. 2017, arXiv:1711.04735.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from isograd.edit import Edit
from isograd.layers import Layer, layers
from isograd.prescription import Patient, Prescription, Reach, not_applicable
from isograd.remedies.critical_initialisation import biases, expected, remaining, wanted, weight

SLUG = "orthogonal-initialisation"
TREATS = ("initialisation", "VG101", "EG201", "EG202", "EG205", "NF401", "NF402")


def prescribe(patient: Patient) -> Iterator[Prescription]:
    """Orthogonal weights for every trainable layer."""
    found = layers(patient.flow, patient.model, patient.exchanged)
    if not found:
        yield not_applicable(SLUG, "no trainable weight was seen to multiply the signal")
        return
    edits = [orthogonal(layer, gain(layer)) for layer in found]
    names = ", ".join(sorted({layer.activation for layer in found if not layer.head}) or ["linear"])
    yield Prescription(
        SLUG,
        f"{len(found)} layers orthogonal, at the critical gain of {names}",
        (*edits, *biases(found)),
        reach=Reach.INITIALISATION,
        treats=TREATS,
        expected=expected(found),
        decades=remaining(patient.flow, found),
        references=("Saxe et al. 2014, arXiv:1312.6120", "Pennington et al. 2017, arXiv:1711.04735"),
    )


def orthogonal(layer: Layer, factor: float) -> Edit:
    """The weight of a layer, drawn orthogonal times a factor; each of several matrices in one parameter."""
    if layer.stacked:
        return weight(layer, "surgery.orthogonal_", {"gain": factor, "stacked": True})
    plain = not layer.half and len(layer.shape) > 1
    return weight(layer, "nn.init.orthogonal_" if plain else "surgery.orthogonal_", {"gain": factor})


def gain(layer: Layer) -> float:
    """What nn.init.orthogonal_ is to multiply by so that its elements have variance sigma_w^2 / fan_in.

    A semi-orthogonal matrix has elements of variance 1 / max(rows, columns). The rows are the parameter's first axis: an
    operand of an einsum may sum over another.
    """
    rows, *rest = layer.shape[1:] if layer.stacked else layer.shape
    return float(f"{wanted(layer) * math.sqrt(max(rows, math.prod(rest)) / layer.fan_in):.6g}")
