"""delta-orthogonal: convolutions that are orthogonal at their centre tap and zero elsewhere.

What it does
    Fills the kernel of every convolution with zeros but for its centre, which becomes an orthogonal matrix over
    the channels times the critical gain of the activation. Layers that are no convolutions get orthogonal weights.

When it helps
    Plain convolutional networks of hundreds of layers: the whole map, not only each tap, then preserves norms, and
    no spatial frequency is lost with depth. tanh networks of ten thousand layers were trained so.

Expected effect
    Gain 1 per layer for every direction; Gaussian kernels have it on average over directions only.

Safety
    Unsafe: trained weights are lost. Frozen parameters are left alone.

References
    Xiao et al. 2018, arXiv:1806.05393.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch import nn

from isograd.edit import Edit
from isograd.layers import Layer, layers
from isograd.prescription import Patient, Prescription, Reach, not_applicable
from isograd.remedies.critical_initialisation import biases, expected, remaining, wanted
from isograd.remedies.orthogonal_initialisation import gain, orthogonal

SLUG = "delta-orthogonal"
TREATS = ("initialisation", "VG101", "EG201", "EG202")
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def prescribe(patient: Patient) -> Iterator[Prescription]:
    """Kernels for every convolution with one group, a centre tap, and at least as many outputs as inputs."""
    found = layers(patient.flow, patient.model, patient.exchanged)
    fit = {layer.weight for layer in found if _fits(patient.model.get_submodule(layer.module))}
    if not fit:
        yield not_applicable(
            SLUG, "no convolution has one group, an odd kernel and at least as many outputs as inputs"
        )
        return
    edits = [
        Edit(
            layer.weight,
            "fill",
            "surgery.delta_orthogonal_",
            {"gain": _gain(layer)},
            before=f"sigma_w {layer.sigma_w:.3g}",
        )
        if layer.weight in fit
        else orthogonal(layer, gain(layer))
        for layer in found
    ]
    yield Prescription(
        SLUG,
        f"{len(fit)} convolutions delta-orthogonal",
        (*edits, *biases(found)),
        reach=Reach.INITIALISATION,
        treats=TREATS,
        expected=expected(found),
        decades=remaining(patient.flow, found),
        references=("Xiao et al. 2018, arXiv:1806.05393",),
    )


def _fits(module: nn.Module) -> bool:
    if not isinstance(module, _CONVOLUTIONS) or module.groups != 1:
        return False
    odd = all(size % 2 == 1 for size in module.kernel_size)
    return odd and any(size > 1 for size in module.kernel_size) and module.out_channels >= module.in_channels


def _gain(layer: Layer) -> float:
    """The centre tap alone carries the signal: the fan-in is that of one position."""
    outputs, inputs = layer.shape[:2]
    return float(f"{wanted(layer) * math.sqrt(outputs / inputs):.6g}")
