"""zero-biases: biases start at zero.

What it does
    Sets the biases of all trainable layers to zero, and those of normalisation layers.

When it helps
    Biases far below zero switch ReLU units off for every sample: such a unit passes no gradient and never learns. Biases
    drawn wide saturate tanh and sigmoid, and close the gates of a recurrence that is written out. Far below zero they
    close the gates of residual branches; as loud as the signal, they drown tokens in what all of them have in common.

Expected effect
    With zero biases and centred weights half of the ReLU units are on for any input.

Safety
    Unsafe: trained biases are lost. Gates of LSTM and GRU are left alone: their biases hold the memory.

References
    Lu et al. 2019, Dying ReLU and Initialization, arXiv:1903.06733.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from isograd.edit import Edit
from isograd.layers import norms, rms
from isograd.prescription import Patient, Prescription, Reach, not_applicable

SLUG = "zero-biases"
TREATS = ("dead-units", "closed-gates", "SA302", "RN601", "VG105", "VG111")
LOUD = 1.0
"""rms of a bias that is as loud as the signal: where tokens are drowned, the others are left as they are."""


def prescribe(patient: Patient) -> Iterator[Prescription]:
    """Every bias that is not zero already."""
    added = {p.name for p in patient.flow.parameters if p.bias}
    shifts = {f"{name}.bias".lstrip(".") for name, _ in norms(patient.model)}
    least = 0.0 if patient.told & set(TREATS) - {"VG105"} else LOUD
    edits = tuple(
        Edit(name, "fill", "nn.init.zeros_", before=f"mean {float(p.detach().float().mean()):.3g}")
        for name, p in patient.model.named_parameters()
        if name in added | shifts and p.requires_grad and _above(p, least)
    )
    if not edits:
        yield not_applicable(
            SLUG,
            "no trainable bias is as loud as the signal"
            if least
            else "all trainable biases are zero already",
        )
        return
    yield Prescription(
        SLUG,
        f"{len(edits)} biases set to zero",
        edits,
        reach=Reach.INITIALISATION,
        treats=TREATS,
        expected="half of the units of a one-sided activation are on",
        references=("Lu et al. 2019, arXiv:1903.06733",),
    )


def _above(parameter: Tensor, least: float) -> bool:
    return parameter.numel() > 0 and rms(parameter) > least
