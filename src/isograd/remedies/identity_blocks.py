"""identity-blocks: residual blocks that begin as the identity, or next to it, and learn how much to add.

What it does
    Puts a learned factor on each residual branch: one number that starts at 0 (ReZero, SkipInit), or one for each feature
    that starts at 0.1, 1e-5 from 19 blocks and 1e-6 from 25 on (LayerScale). Or draws the whole network as Fixup does: He's
    weights, those of branches of m layers times L^(-1/(2m-2)), zero for each branch's last layer and for the head, a
    learned factor that starts at 1 on each branch, and a learned scalar before each layer without a bias.

When it helps
    Residual networks without normalisation, at any depth; LayerScale also where norms are there. Nothing that the branches
    compute reaches the stream at first, so that neither signal nor gradient can grow.

Expected effect
    Gain 1 from the first block to the last. With factors of 0 the branches' own weights get their first gradient after one
    step; with Fixup's zero head nothing below the head does.

Safety
    Unsafe: another function. The parameter is called `parametrizations.weight.original` from then on.

References
    Bachlechner et al. 2021, ReZero, arXiv:2003.04887; De and Smith 2020, SkipInit, arXiv:2002.10444; Touvron et al. 2021,
    LayerScale, arXiv:2103.17239; Zhang et al. 2019, Fixup, arXiv:1901.09321.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch import nn

from isograd.edit import Edit
from isograd.graph.operations import WEIGHTED
from isograd.layers import Layer, layers
from isograd.prescription import Patient, Prescription, Reach, not_applicable
from isograd.remedies.critical_initialisation import biases, weight
from isograd.remedies.scale_residual_branches import blocks, ends, multiplied, without_skips

SLUG = "identity-blocks"
TREATS = ("residual-branch-growth", "EG201", "EG202")
LAYER_SCALE = ((18, 0.1), (24, 1e-5))
"""Up to so many blocks, the factor that LayerScale starts at (Touvron et al. 2021, section 3)."""
DEEPER = 1e-6


def prescribe(patient: Patient) -> Iterator[Prescription]:
    """ReZero, LayerScale, Fixup."""
    if why := without_skips(patient.flow):
        yield not_applicable(SLUG, why)
        return
    depth = blocks(patient.flow)
    start = next((value for most, value in LAYER_SCALE if depth <= most), DEEPER)
    try:
        zero = multiplied(patient, 0.0, learned=True)
        small = multiplied(patient, start, learned=True, each=True)
    except ValueError as error:
        yield not_applicable(SLUG, str(error), "write x + a * f(x), with a = nn.Parameter(torch.zeros(()))")
        return
    yield _prescription(
        f"ReZero: a learned factor of 0 on {len(zero)} residual branches",
        zero,
        "every block starts as the identity",
        "Bachlechner et al. 2021, arXiv:2003.04887",
    )
    yield _prescription(
        f"LayerScale: a learned factor of {start:g} for each feature of {len(small)} residual branches",
        small,
        "every block starts close to the identity",
        "Touvron et al. 2021, arXiv:2103.17239",
    )
    yield _fixup(patient)


def _prescription(title: str, edits: list[Edit], expected: str, reference: str) -> Prescription:
    return Prescription(
        SLUG,
        title,
        tuple(edits),
        reach=Reach.RESIDUAL,
        treats=TREATS,
        expected=expected,
        decades=0.0,
        references=(reference,),
        advice=("let the learned factors be without weight decay",),
    )


def _fixup(patient: Patient) -> Prescription:
    flow = patient.flow
    kinds = {s.kind for s in flow.sites} | {
        step.site.kind for steps in flow.ledgers.values() for step in steps
    }
    if "normalisation" in kinds:
        return not_applicable(SLUG, "Fixup is for networks without normalisation, and this one has it")
    drawn = layers(flow, patient.model)
    if not any(layer.head for layer in drawn):
        return not_applicable(SLUG, "Fixup starts the head at 0, and no trainable head was seen")
    last, inside = ends(flow, patient.model), _branch_factors(patient)
    edits = [
        _drawn(layer, layer.head or layer.module in last, inside.get(layer.module, 1.0)) for layer in drawn
    ]
    offsets = [Edit(layer.module, "wrap", "modules.Offset") for layer in drawn if _bare(layer, patient.model)]
    return Prescription(
        SLUG,
        f"Fixup: {len(last)} residual branches drawn for L = {len(flow.splits)}, their last weights and the head 0",
        (*edits, *biases(drawn, zero=True), *multiplied(patient, 1.0, learned=True), *offsets),
        reach=Reach.RESIDUAL,
        treats=TREATS,
        expected="updates of size lr at any depth; in the first step only the head moves",
        references=("Zhang et al. 2019, arXiv:1901.09321",),
        advice=("scalar factors and offsets learn at a tenth of the rate in the paper",),
    )


def _branch_factors(patient: Patient) -> dict[str, float]:
    """L^(-1/(2m-2)) for every layer of a branch of m; a branch of one layer has only the last, which is 0."""
    count, found = len(patient.flow.splits), dict[str, float]()
    for depth in patient.flow.splits:
        steps = [s.site for s in patient.flow.ledgers.get(depth, ()) if s.branch and s.site.kind in WEIGHTED]
        names = dict.fromkeys(site.module for site in steps)
        for name in names:
            found[name] = count ** (-1 / (2 * len(names) - 2)) if len(names) > 1 else 1.0
    return found


def _drawn(layer: Layer, zero: bool, factor: float) -> Edit:
    if zero:
        return weight(layer, "nn.init.zeros_", {})
    std = float(f"{factor * math.sqrt(2 / layer.fan_in):.6g}")
    return weight(layer, "nn.init.normal_", {"std": std})


def _bare(layer: Layer, model: nn.Module) -> bool:
    """A layer whose output no bias can shift, so that a scalar before it says something new."""
    module = model.get_submodule(layer.module) if layer.module else None
    return isinstance(module, nn.Linear | nn.modules.conv._ConvNd) and module.bias is None
