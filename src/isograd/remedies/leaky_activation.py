"""leaky-activation: leaky ReLU, ELU or GELU in place of ReLU where units are dead.

What it does
    Exchanges ReLU for a function that has a slope below zero too: leaky ReLU of slope 0.2, ELU or GELU.

When it helps
    A ReLU unit that is off for every sample gets no gradient and stays so for good. With a slope below zero
    it learns its way back. Where biases or a large step switched the units off, that is to be mended as well.

Expected effect
    At least the slope passes: a layer that is dead throughout costs 0.7 decades at slope 0.2, not all of them.

Safety
    Unsafe: the model computes another function.

References
    Maas et al. 2013, Rectifier Nonlinearities; Lu et al. 2019, arXiv:1903.06733.
"""

from __future__ import annotations

from collections.abc import Iterator

from isograd.prescription import Patient, Prescription, not_applicable
from isograd.remedies.exchange_activation import exchange, functions

SLUG = "leaky-activation"
TREATS = ("dead-units", "SA302")
DYING = {"relu", "relu6", "threshold", "hardswish", "hardshrink", "softshrink"}


def prescribe(patient: Patient) -> Iterator[Prescription]:
    """Three functions, the nearest first."""
    dying = [name for name in functions(patient.flow) if name in DYING]
    if not dying:
        yield not_applicable(SLUG, "no activation on the way of the hidden signal can die")
        return
    yield exchange(patient, dying, "leaky_relu", 0.2, slug=SLUG)
    yield exchange(patient, dying, "elu", slug=SLUG)
    yield exchange(patient, dying, "gelu", slug=SLUG)
