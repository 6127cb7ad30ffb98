"""reset-norm-gain: normalisation layers start with a gain of 1 and a shift of 0.

What it does
    Fills the weights of normalisation layers whose gain lies far from 1 with ones, and their biases with zeros. Where a
    layer is seen to multiply by 1 + weight, as Gemma's do, its weights become zeros. Of layers whose weights are
    normalised, the length of each unit's weights becomes the critical gain of the activation.

When it helps
    The gain of a normalisation multiplies the signal and the gradient of its layer, whatever the weights before
    it are. Drawn near 0, as by an initialiser that treats every parameter alike, it takes a decade and more from
    each layer. A gain of exactly 0 at the end of a residual branch is meant so and is left alone.

Expected effect
    Each layer gives back log10(1 / gain) decades.

Safety
    Unsafe: the model computes another function. Trained gains are lost.

References
    Ioffe and Szegedy 2015, Batch Normalization; Goyal et al. 2017 (arXiv:1706.02677) on gains of 0; Salimans and
    Kingma 2016, Weight Normalization.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from statistics import median

from torch import Tensor, nn

from isograd.edit import Edit
from isograd.layers import common_activation, norms, rms
from isograd.prescription import Patient, Prescription, Reach, not_applicable
from isograd.remedies.critical_initialisation import scale

SLUG = "reset-norm-gain"
TREATS = ("norm-gain", "VG101", "VG105", "EG201", "EG202", "EG205")
NEAR = (0.3, 3.0)
"""RMS gains between these cost less than half a decade: trained networks have them."""
AGREES = 2.0
"""Factor within which the gain that was measured is that of the weight, or of 1 + weight: the signal's features are not all
of one size. Near zero the two lie decades apart."""


def prescribe(patient: Patient) -> Iterator[Prescription]:
    """Ones and zeros for every normalisation layer whose gain is far off."""
    model, meant, added = patient.model, bool(patient.flow.splits), _added(patient)
    off = {name: (module, size) for name, module, size in _gains(model, added) if not _fine(size, meant)}
    lengths = {name: size for name, size in _lengths(model) if not _fine(size, meant)}
    if not off and not lengths:
        frozen = [n for n, _, size in _gains(model, added, trainable=False) if not _fine(size, meant)]
        if frozen:
            yield not_applicable(
                SLUG,
                f"the gains that are far from 1 are frozen, {len(frozen)} of them",
                f"nn.init.{'zeros' if frozen[0] in added else 'ones'}_(model.get_submodule({frozen[0]!r}).weight), or thaw them: weight.requires_grad_(True)",
            )
            return
        yield not_applicable(SLUG, "no normalisation layer has a gain far from 1")
        return
    edits = [
        Edit(
            f"{name}.weight",
            "fill",
            "nn.init.zeros_" if name in added else "nn.init.ones_",
            before=f"rms {rms(module.weight):.3g}",  # pyright: ignore[reportArgumentType]
        )
        for name, (module, _) in off.items()
    ]
    edits += [
        Edit(f"{name}.bias", "fill", "nn.init.zeros_", before=f"rms {rms(shift):.3g}")
        for name, (module, _) in off.items()
        if isinstance(shift := getattr(module, "bias", None), Tensor) and bool(shift.any())
    ]
    critical = float(f"{scale(common_activation(patient.flow))[0]:.6g}")
    edits += [
        Edit(name, "fill", "nn.init.constant_", {"val": critical}, before=f"rms {size:.3g}")
        for name, size in lengths.items()
    ]
    gains = [
        -math.log10(size) if size > 0 else math.inf
        for size in (*(s for _, s in off.values()), *lengths.values())
    ]
    where = f"a branch behind one {median(gains):+.1f}" if meant else f"the layers {sum(gains):+.1f}"
    yield Prescription(
        SLUG,
        " and ".join(
            [f"gain 1 for {len(off)} normalisation layers"] * bool(off)
            + [f"length {critical:g} for the normalised weights of {len(lengths)} layers"] * bool(lengths)
        ),
        tuple(edits),
        reach=Reach.INITIALISATION,
        treats=TREATS,
        expected=f"decades given back: {where}",
        references=("Ioffe and Szegedy 2015, arXiv:1502.03167",),
    )


def _gains(
    model: nn.Module, added: set[str], *, trainable: bool = True
) -> Iterator[tuple[str, nn.Module, float]]:
    """Normalisations and the size of what each multiplies by: its weight, or 1 + weight for those in `added`."""
    for name, module in norms(model):
        gain = getattr(module, "weight", None)
        if isinstance(gain, Tensor) and gain.ndim == 1 and gain.requires_grad is trainable:
            yield name, module, rms(gain + 1 if name in added else gain)


def _added(patient: Patient) -> set[str]:
    """Normalisations that multiply by 1 + weight: what they were measured to pass on tells."""
    modules, found = dict(norms(patient.model)), set[str]()
    for seen in patient.flow.normalisations:
        weight = getattr(modules.get(seen.site.module), "weight", None)
        if not isinstance(weight, Tensor) or not 0 < seen.gain < math.inf:
            continue
        plain, added = (
            seen.gain / rms(weight + one) if rms(weight + one) > 0 else math.inf for one in (0, 1)
        )
        if _agrees(added) and not _agrees(plain):
            found.add(seen.site.module)
    return found


def _agrees(factor: float) -> bool:
    return 1 / AGREES < factor < AGREES


def _lengths(model: nn.Module) -> Iterator[tuple[str, float]]:
    """Of the weights of one unit, in layers under `weight_norm`, in its new form and in its old one."""
    for name, parameter in model.named_parameters():
        new = name.endswith(".parametrizations.weight.original0")
        if (new or name.endswith("weight_g")) and parameter.requires_grad:
            yield name, rms(parameter)


def _fine(size: float, residual: bool) -> bool:
    return (residual and size == 0) or NEAR[0] < size < NEAR[1]
