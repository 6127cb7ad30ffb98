"""reset-norm-epsilon: the epsilon of normalisation layers back to 1e-5.

What it does
    Sets `eps` to 1e-5 where it lies outside of 1e-8 to 1e-2.

When it helps
    A normalisation divides by sqrt(variance + eps). An eps far above the variance makes it a constant factor
    1 / sqrt(eps): the signal is no longer normalised, and signal and gradient shrink by that factor in each layer.
    An eps of 0 divides by zero where a feature is constant.

Expected effect
    log10(sqrt(eps / variance)) decades a layer come back.

Safety
    Unsafe: the model computes another function.

References
    Ba et al. 2016, Layer Normalization, arXiv:1607.06450.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from isograd.edit import Edit
from isograd.layers import norms
from isograd.prescription import Patient, Prescription, Reach, not_applicable
from isograd.symptoms.epsilon_above_variance import USUAL

SLUG = "reset-norm-epsilon"
TREATS = ("norm-epsilon", "VG101", "EG201", "EG202")
NAMES = ("eps", "variance_epsilon", "epsilon")
DEFAULT = 1e-5


def prescribe(patient: Patient) -> Iterator[Prescription]:
    """One edit a layer."""
    edits = tuple(
        Edit(f"{name}.{attribute}".lstrip("."), "set", arguments={"value": DEFAULT}, before=f"{value:g}")
        for name, module in norms(patient.model)
        for attribute, value in epsilons(module)
        if not USUAL[0] <= value <= USUAL[1]
    )
    if not edits:
        yield not_applicable(SLUG, "every normalisation layer has an epsilon between 1e-8 and 1e-2")
        return
    yield Prescription(
        SLUG,
        f"epsilon {DEFAULT:g} for {len(edits)} normalisation layers",
        edits,
        reach=Reach.INITIALISATION,
        treats=TREATS,
        expected="the layers normalise again",
        references=("Ba et al. 2016, arXiv:1607.06450",),
    )


def epsilons(module: nn.Module) -> Iterator[tuple[str, float]]:
    """Attributes that hold an epsilon, under any of the names that are in use."""
    for name in NAMES:
        value = getattr(module, name, None)
        if isinstance(value, float | int):
            yield name, float(value)
