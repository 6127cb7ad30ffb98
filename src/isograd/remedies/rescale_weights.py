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
from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from isograd.layers import Layer, layers, rms
from isograd.prescription import Edit, Patient, Prescription, Reach, not_applicable
from isograd.remedies.critical_initialisation import expected, remaining, wanted

SLUG = "rescale-weights"
TREATS = ("initialisation", "VG101", "EG201", "EG202", "EG205", "attention-logits")
OFF = 1.25
"""Factor beyond which a layer's scale is off: a draw of 48 x 48 weights scatters by 2%, tanh trains at 1 to 1.2."""

LOUD = 10.0
"""Factor beyond which a layer is scaled down alone, and a head at all, which may start at zero or small: at ten times its
gain a loss starts at several times a constant answer."""

APART = ("q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight")
"""Projections of `nn.MultiheadAttention` that have a parameter of their own; the others are in one, row behind row."""


def prescribe(patient: Patient) -> Iterator[Prescription]:
    """One factor for each layer that is off."""
    found = layers(patient.flow, patient.model, patient.exchanged)
    factors = {
        layer.weight: wanted(layer) / layer.sigma_w
        for layer in found
        if layer.calls <= 1 and 0 < layer.sigma_w < math.inf and (not layer.head or _loud(layer))
    }
    off = {name: factor for name, factor in factors.items() if abs(math.log(factor)) > math.log(OFF)}
    loud = {name: factor for name, factor in off.items() if factor < 1 / LOUD}
    if len(loud) == len(off) or 2 * len(loud) > len(factors):
        loud = {}
    packed = list(_packed(patient.model))
    if loud or packed:  # the rest may be as it is meant to be
        yield _scaled(patient, found, loud, len(factors), packed)
    if not off:
        why = (
            "every weight has the critical gain of its activation"
            if factors
            else "no trainable layer was seen"
        )
        yield not_applicable(SLUG, f"{why}, or none that a factor could give it")
        return
    parameters = dict(patient.model.named_parameters())
    if 2 * len(off) > len(factors) and all(
        parameters[name].ndim == 2 and independent(parameters[name]) for name in off
    ):
        yield not_applicable(SLUG, "the weights are independent draws: drawn anew, they lose nothing")
        return
    yield _scaled(patient, found, off, len(factors))


def _packed(model: nn.Module) -> Iterator[Edit]:
    """Loud projections of `nn.MultiheadAttention`, which projects inside of one call, to sigma_w 1."""
    for name, module in model.named_modules():
        if not isinstance(module, nn.MultiheadAttention):
            continue
        width, parameters = module.embed_dim, dict(module.named_parameters())
        together = [("in_proj_weight", (0, 2 * width)), ("in_proj_weight", (2 * width, 3 * width))]
        for leaf, rows in [*together, *((name, None) for name in APART)]:
            weight = parameters.get(leaf)
            if weight is not None and weight.requires_grad:
                part = weight if rows is None else weight[slice(*rows)]
                sigma_w = rms(part) * math.sqrt(part.shape[1])
                if LOUD < sigma_w < math.inf:
                    factor = {"other": float(f"{1 / sigma_w:.6g}")}
                    place = f"{name}.{leaf}".lstrip(".")
                    yield Edit(place, "fill", ".mul_", factor, rows, before=f"sigma_w {sigma_w:.3g}")


def _scaled(
    patient: Patient, found: list[Layer], off: dict[str, float], count: int, packed: Sequence[Edit] = ()
) -> Prescription:
    before = {layer.weight: f"sigma_w {layer.sigma_w:.3g}" for layer in found}
    return Prescription(
        SLUG,
        " and ".join(
            [f"{len(off)} of {count} layers scaled to the critical gain"] * bool(off)
            + [f"{len(packed)} projections of attentions scaled to gain 1"] * bool(packed)
        ),
        (
            *(
                Edit(name, "fill", ".mul_", {"other": float(f"{factor:.6g}")}, before=before[name])
                for name, factor in off.items()
            ),
            *packed,
        ),
        reach=Reach.INITIALISATION,
        treats=TREATS,
        expected=expected(found),
        decades=remaining(patient.flow, found),
        references=("Schoenholz et al. 2017, arXiv:1611.01232", "He et al. 2015, arXiv:1502.01852"),
    )


def _loud(head: Layer) -> bool:
    return head.sigma_w > LOUD * wanted(head)


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
