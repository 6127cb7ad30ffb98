"""classic-initialisation: He's, Xavier's and LeCun's weights, by their names.

What it does
    Draws the weights from normal distributions of variance 2 / fan_in (He), 2 / (fan_in + fan_out) (Xavier) or
    1 / fan_in (LeCun), and sets the biases to zero.

When it helps
    He's for ReLU and its relatives, Xavier's for tanh, LeCun's for SELU: there they are the critical point, or
    very near. For any other activation `critical-initialisation` says which variance is.

Expected effect
    Gain 1 per layer for the activation that each is made for. For others what theory says of sigma_w: He's
    variance gives tanh 1.05 per layer, Xavier's gives ReLU 0.71.

Safety
    Unsafe: trained weights are lost. Frozen parameters are left alone.

References
    He et al. 2015, arXiv:1502.01852; Glorot and Bengio 2010; LeCun et al. 1998, Efficient BackProp;
    Klambauer et al. 2017, arXiv:1706.02515.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from isograd.layers import Layer, common_activation, is_chain, layers
from isograd.prescription import Patient, Prescription, Reach, not_applicable
from isograd.remedies.critical_initialisation import biases, gain, weight

SLUG = "classic-initialisation"
TREATS = ("initialisation",)


def prescribe(patient: Patient) -> Iterator[Prescription]:
    """Three prescriptions, the one that theory prefers for the activation in use first."""
    found = layers(patient.flow, patient.model, patient.exchanged)
    if not found:
        yield not_applicable(SLUG, "no trainable weight was seen to multiply the signal")
        return
    common = common_activation(patient.flow)
    activation = patient.exchanged.get(common, common)
    schemes = sorted(_SCHEMES, key=lambda s: abs(math.log(gain(activation, s[1]) or 1e-9)))
    for name, sigma_w, deviation, reference in schemes:
        factor = gain(activation, sigma_w)
        yield Prescription(
            SLUG,
            f"{name}'s weights for {len(found)} layers",
            (
                *(weight(la, "nn.init.normal_", {"std": float(f"{deviation(la):.6g}")}) for la in found),
                *biases(found, zero=True),
            ),
            reach=Reach.INITIALISATION,
            treats=TREATS,
            decades=sum(math.log10(gain(la.activation, sigma_w) or 1e-9) for la in found if not la.head)
            if is_chain(patient.flow, found)
            else math.nan,
            expected=f"gain {factor:.3g} per layer for {activation} where the width stays",
            references=(reference,),
        )


def _he(layer: Layer) -> float:
    return math.sqrt(2 / layer.fan_in)


def _xavier(layer: Layer) -> float:
    return math.sqrt(2 / (layer.fan_in + layer.fan_out))


def _lecun(layer: Layer) -> float:
    return math.sqrt(1 / layer.fan_in)


_SCHEMES = (
    ("He", math.sqrt(2), _he, "He et al. 2015, arXiv:1502.01852"),
    ("Xavier", 1.0, _xavier, "Glorot and Bengio 2010"),
    ("LeCun", 1.0, _lecun, "LeCun et al. 1998, Efficient BackProp"),
)
