"""standardise-weights: every unit's weights have mean 0 and a fixed scale, in training too.

What it does
    Parametrizes the weight of each hidden linear layer and convolution: rows are centred and divided by their
    standard deviation, times gain / sqrt(fan_in) with the gain that keeps the gradient for the activation in use.

When it helps
    Rows that sum to zero take the activation's mean off the signal, as BatchNorm does, and need no batch. So a gain
    exists that keeps both signal and gradient for every activation, sigmoid and softplus included, whose mean all
    samples share.

Expected effect
    A gain of sqrt(E phi'^2 / Var phi) a layer at pre-activation variance 1: 1.02 for a sigmoid, 1.09 for tanh, 1.21
    for ReLU.

Safety
    Unsafe: another function. The parameter is called `parametrizations.weight.original` from then on.

References
    Qiao et al. 2019, arXiv:1903.10520; Brock et al. 2021, arXiv:2101.08692; Huang et al. 2017, arXiv:1710.02338.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch import nn
from torch.nn.utils import parametrize

from isograd import theory
from isograd.anatomy import Layer, hidden
from isograd.edit import Edit
from isograd.prescription import Patient, Prescription, Reach, not_applicable

SLUG = "standardise-weights"
TREATS = ("initialisation", "activation", "missing-normalisation", "VG101", "EG201")


def prescribe(patient: Patient) -> Iterator[Prescription]:
    """A parametrization of every hidden weight whose activation theory knows."""
    chain = [layer for layer in hidden(patient.flow, patient.model) if _free(layer)]
    known = {layer.place: gain for layer in chain if (gain := gain_of(layer)) is not None}
    if not known:
        yield not_applicable(
            SLUG,
            "no hidden layer on the backbone has a trainable weight, no norm and an activation that theory knows",
        )
        return
    factors = [
        theory.batch_norm_gain(layer.activation) for layer in chain if layer.activation in theory.NAMES
    ]
    decades = sum(math.log10(f) for f in factors)
    yield Prescription(
        SLUG,
        f"standardised weights in {len(known)} layers",
        tuple(
            Edit(place, "alter", "modules.standardise_weight", {"gain": gain})
            for place, gain in known.items()
        ),
        reach=Reach.NORMALISATION,
        treats=TREATS,
        expected=f"{decades:+.1f} decades over {len(known)} layers",
        decades=decades,
        references=("Qiao et al. 2019, arXiv:1903.10520", "Brock et al. 2021, arXiv:2101.08692"),
    )


def gain_of(layer: Layer) -> float | None:
    """1 / sqrt(Var phi) at unit variance, which keeps the signal's variance when rows sum to zero; None: no theory."""
    if not layer.activation:
        return 1.0
    if layer.activation not in theory.NAMES:
        return None
    moments = theory.moments(layer.activation, 1.0)
    return round((moments.square - moments.mean**2) ** -0.5, 6)


def _free(layer: Layer) -> bool:
    """Trainable, not behind a norm that cancels the scale anyway, with rows that a standard deviation exists for."""
    usable = isinstance(layer.module, nn.Linear | nn.modules.conv._ConvNd) and layer.fan_in > 1
    return (
        usable and not layer.frozen and not layer.normalised and not parametrize.is_parametrized(layer.module)
    )
