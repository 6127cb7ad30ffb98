"""critical-initialisation: weights and biases drawn at the critical point of the activation in use.

What it does
    Draws the weights of every layer from N(0, sigma_w^2 / fan_in) and its biases from N(0, sigma_b^2), with the
    sigma_w and sigma_b at which mean-field theory finds a fixed point of the signal where the gradient keeps its
    size: 1.414 and 0 for ReLU (He), 1 and 0 for tanh (Xavier), 1.408 and 0.416 for GELU, and so for any function.

When it helps
    Where weights were drawn for another activation, or by a default: nn.Linear's own has sigma_w = 0.577, which
    costs a ReLU network 0.39 decades a layer. A sigmoid has no such point in reach, nor has softplus: there the
    activation is to be exchanged.

Expected effect
    log10 of the gain per layer, times the layers, before; about 0 after, but for the luck of narrow layers.

Safety
    Unsafe: trained weights are lost. Frozen parameters are left alone.

References
    Schoenholz et al. 2017, arXiv:1611.01232; He et al. 2015, arXiv:1502.01852; Roberts, Yaida and Hanin 2022.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache

from isograd import theory
from isograd.edit import Edit, Value
from isograd.flow import Flow
from isograd.graph.operations import ACTIVATIONS
from isograd.layers import Layer, batch_norms, is_chain, layers
from isograd.own import SATURATED
from isograd.prescription import Patient, Prescription, Reach, not_applicable

SLUG = "critical-initialisation"
TREATS = ("initialisation", "VG101", "EG201", "EG202", "EG205", "SA301", "NF401", "NF402")


def prescribe(patient: Patient) -> Iterator[Prescription]:
    """Gaussian weights for every trainable layer."""
    found = layers(patient.flow, patient.model, patient.exchanged)
    if not found:
        yield not_applicable(SLUG, "no trainable weight was seen to multiply the signal")
        return
    edits = [
        weight(layer, "nn.init.normal_", {"std": _round(wanted(layer) / math.sqrt(layer.fan_in))})
        for layer in found
    ]
    yield Prescription(
        SLUG,
        f"{len(found)} layers drawn at the critical gain of {_names(found)}",
        (*edits, *biases(found)),
        reach=Reach.INITIALISATION,
        treats=TREATS,
        expected=expected(found),
        decades=remaining(patient.flow, found),
        references=("Schoenholz et al. 2017, arXiv:1611.01232", "He et al. 2015, arXiv:1502.01852"),
    )


def weight(layer: Layer, of: str, arguments: dict[str, Value]) -> Edit:
    """The weight of a layer, drawn by `of`."""
    return Edit(layer.weight, "fill", of, arguments, layer.rows, before=f"sigma_w {layer.sigma_w:.3g}")


def biases(found: list[Layer], zero: bool = False) -> Iterator[Edit]:
    """Biases at the variance that the activation's critical point needs: mostly none."""
    for layer in found:
        sigma_b = 0.0 if zero else scale(layer.activation)[1]
        for name in layer.biases:
            if sigma_b:
                yield Edit(name, "fill", "nn.init.normal_", {"std": _round(sigma_b)})
            else:
                yield Edit(name, "fill", "nn.init.zeros_")


def wanted(layer: Layer) -> float:
    """The sigma_w that brings a layer, with the constant behind it, to the critical point."""
    return scale(layer.activation)[0] / layer.times


@cache
def scale(activation: str) -> tuple[float, float]:
    """sigma_w and sigma_b of the critical point; of the better of Xavier's and He's where there is none in reach."""
    if activation not in ACTIVATIONS:
        return 1.0, 0.0
    try:
        point = theory.critical(activation)
        if point.sigma_w <= SATURATED:
            return point.sigma_w, math.sqrt(point.sigma_b2)
    except ValueError:
        pass
    return min((1.0, math.sqrt(2)), key=lambda s: abs(math.log(theory.gain(activation, sigma_w=s)))), 0.0


@cache
def gain(activation: str, sigma_w: float, sigma_b2: float = 0.0) -> float:
    """Factor per layer on the gradient; 0 where theory has none."""
    if activation not in ACTIVATIONS:
        return sigma_w
    try:
        return theory.gain(activation, sigma_w=sigma_w, sigma_b2=sigma_b2)
    except ValueError:
        return math.nan


def remaining(flow: Flow, found: list[Layer]) -> float:
    """Decades that theory expects of a plain chain of these layers at their critical points; NaN: no chain.

    Batch normalisation divides the scale of the weights out: its layers keep a gain of their own.
    """
    names = [layer.activation for layer in found if not layer.head]
    if names and batch_norms(flow) > len(names) / 2:
        return sum(math.log10(theory.batch_norm_gain(name)) for name in names if name in theory.NAMES)
    if not is_chain(flow, found):
        return math.nan
    points = [(layer.activation, *scale(layer.activation)) for layer in found if not layer.head]
    return sum(math.log10(gain(name, sigma_w, sigma_b**2)) for name, sigma_w, sigma_b in points)


def expected(found: list[Layer]) -> str:
    """What theory says of one layer, and of all."""
    kept = []
    for name in sorted({layer.activation for layer in found if not layer.head}):
        sigma_w, sigma_b = scale(name)
        kept.append(f"{gain(name, sigma_w, sigma_b**2):.3g} per layer for {name}")
    return f"gain {', '.join(kept)}" if kept else ""


def _names(found: list[Layer]) -> str:
    return ", ".join(sorted({layer.activation for layer in found if not layer.head}) or ["linear"])


def _round(value: float) -> float:
    """Six digits: what is printed is what is drawn."""
    return float(f"{value:.6g}")
