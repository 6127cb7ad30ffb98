"""lsuv: orthogonal weights, scaled so that each layer's output has variance 1 on the user's own data.

What it does
    Draws orthogonal weights, then runs the batch through the model layer by layer and divides each layer's
    weights by the standard deviation of its output (layer-sequential unit variance). Biases start at zero. The
    projections of `nn.MultiheadAttention`, whose outputs nobody sees, are orthogonal and not scaled.

When it helps
    Where theory has no answer: odd activations, poolings, concatenations, weights of very unequal fan-in, data that
    is not standardised. It looks at the forward only: a sigmoid's small derivative remains.

Expected effect
    Outputs of variance 1 in every layer, to a hundredth.

Safety
    Unsafe: trained weights are lost. Frozen parameters are left alone.

References
    Mishkin and Matas 2016, All you need is a good init, arXiv:1511.06422.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from isograd import surgery, theory
from isograd.edit import Edit, perform
from isograd.graph.preserve import copied, preserved
from isograd.layers import Layer, batch_norms, is_chain, layers
from isograd.prescription import Patient, Prescription, Reach, not_applicable
from isograd.remedies.critical_initialisation import remaining
from isograd.remedies.orthogonal_initialisation import orthogonal
from isograd.symptoms.vanishing_gradient import threshold

SLUG = "lsuv"
TREATS = ("initialisation", "VG101", "EG201", "EG202")


def prescribe(patient: Patient) -> Iterator[Prescription]:
    """Factors found on a copy, with one forward of the user's own batch."""
    if patient.loss is None:
        yield not_applicable(SLUG, "it needs data: prescribe(diagnosis, model, loss)")
        return
    everything = layers(patient.flow, patient.model)
    found = [la for la in everything if la.module and la.calls == 1 and not la.head]
    hidden = [la for la in everything if la.attends and la.calls == 0]
    if not found:
        yield not_applicable(SLUG, "no trainable layer is a module that acts once")
        return
    decades = _decades(patient, found)
    if decades < -threshold(len(found)):
        names = ", ".join(sorted({la.activation for la in found}))
        yield not_applicable(
            SLUG, f"unit variance would still lose {-decades:.1f} decades to the slope of {names}"
        )
        return
    drawn = [orthogonal(layer, 1.0) for layer in (*found, *hidden)]
    drawn += [Edit(bias, "fill", "nn.init.zeros_") for layer in (*found, *hidden) for bias in layer.biases]
    try:
        factors = _factors(patient, found, drawn)
    except Exception as error:
        yield not_applicable(SLUG, f"the model cannot be run on a copy: {error}")
        return
    scaled = [
        Edit(layer.weight, "fill", ".mul_", {"other": float(f"{factors[layer.module]:.6g}")})
        for layer in found
        if 0 < factors[layer.module] < float("inf")
    ]
    yield Prescription(
        SLUG,
        f"{len(scaled)} layers orthogonal, with unit variance on this batch",
        (*drawn, *scaled),
        reach=Reach.INITIALISATION,
        treats=TREATS,
        expected="output variance 1 in every layer",
        decades=decades,
        references=("Mishkin and Matas 2016, arXiv:1511.06422",),
    )


def _decades(patient: Patient, found: list[Layer]) -> float:
    """Of a plain chain with pre-activations of variance 1: log10 sqrt(E phi'^2 / E phi^2) a layer; NaN: no chain."""
    if batch_norms(patient.flow):
        return remaining(patient.flow, found)
    if not is_chain(patient.flow, found) or any(la.activation not in theory.NAMES for la in found):
        return math.nan
    at_one = [theory.moments(la.activation, 1.0) for la in found]
    return sum(math.log10(m.slope_square / m.square) / 2 for m in at_one)


def _factors(patient: Patient, found: list[Layer], drawn: list[Edit]) -> dict[str, float]:
    assert patient.loss is not None
    twin = copied(patient.model)
    factors = {layer.module: 1.0 for layer in found}

    def rescale(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            if not isinstance(output, Tensor):
                return output
            deviation = float(output.detach().float().std())
            if not 0 < deviation < float("inf"):
                return output
            factors[name] /= deviation
            return output / deviation  # biases are zero: what comes after sees unit variance already

        return hook

    with preserved(twin), surgery.drawing(twin, seed=0):
        for edit in drawn:
            perform(twin, edit)
        hooks = [twin.get_submodule(name).register_forward_hook(rescale(name)) for name in factors]
        patient.loss(twin)  # with gradients: a loss may differentiate the model itself
        for hook in hooks:
            hook.remove()
    return factors
