"""What there is to try for a patient, and in which order: the candidates of a search.

Prescriptions come in the order of their reach - weights before activations, activations before normalisation,
residual connections, gates - and within it the specific before the general. What lies behind the cure is not even
looked for: the candidates are generators, and some remedies run the model.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from types import ModuleType

from torch import nn

from isograd.layers import layers
from isograd.prescription import Patient, Prescription, Reach, Safety, combined, prescriptions
from isograd.remedies import (
    critical_initialisation,
    exchange_activation,
    insert_residual,
    orthogonal_initialisation,
    rescale_weights,
    scale_residual_branches,
    slugs,
)
from isograd.remedies.scale_residual_branches import without_skips

ORDER: tuple[str, ...] = (
    "batch-first", "lower-dropout", "batch-statistics", "standardise-input", "reset-norm-epsilon", "reset-norm-gain", "leave-out-factor", "scale-embeddings", "zero-biases",
    "recurrent-initialisation", "chrono-initialisation", "forget-bias", "scale-residual-branches",
    "rescale-weights", "orthogonal-initialisation", "delta-orthogonal", "critical-initialisation", "classic-initialisation", "lsuv",
)  # fmt: skip
"""Of one reach: what mends one property that is off, before what draws everything anew; the rest follows."""
MENDING = set(ORDER[: ORDER.index("orthogonal-initialisation")]) - {"zero-biases"}
"""Those of the former kind that find out themselves whether the property is off."""
FIRST = {*ORDER, "leaky-activation"}
"""Remedies that leave the structure as it is; the others are not even looked for before these have failed."""
NARROW = 1.0
"""Depth over width from which a draw of the weights decides more than their gain: the logarithm of the gradient's norm
has a variance of this order, a healthy mean says little of most directions, and every ReLU that is off takes one away
(Hanin and Nica 2018, arXiv:1812.05994). Of AutoTrainer's networks on circles and blobs, tanh or ReLU at the right gain
brought 2 of 17 within two points of the best control, this all 18 (`python -m benchmarks.replay table`). Plain CNNs of
eight channels train to .59 +- .2 as He draws them and to .83 at least with this (`python -m benchmarks.twins table`)."""
NARROWED = ("VG101", "EG201", "EG202", "SA301", "SA302", "NF401", "NF402")
"""Findings that in such networks are treated with another function and orthogonal weights together."""
SMOOTH = {"elu", "celu", "selu"}
TRAINED = (
    "residual-branch-growth", "post-norm", "activation", "missing-residual", "missing-normalisation",
    "ungated-recurrence", "attention-logits", "initialisation",
)  # fmt: skip
"""Causes that a training is asked about where the flow is healthy: what a gradient at the start shows least comes first."""


def candidates(patient: Patient, *, unsafe: bool) -> Iterator[Prescription]:
    """Everything that may cure the model as it came, each by itself or as a pair that belongs together."""
    if unsafe and _treated(patient, NARROWED) and depth_over_width(patient) >= NARROW:
        yield from _isometric(patient)
    if patient.flow.splits and without_skips(patient.flow):
        # A skip that is there and damped is one property that is off; new weights would bridge it, not mend it.
        yield from changing(patient, {insert_residual.SLUG}, unsafe=unsafe)
    activations: list[Prescription] = []
    for slug in (*ORDER, "leaky-activation"):
        if slug == scale_residual_branches.SLUG and patient.flow.splits and unsafe:
            # A branch whose weights are too loud is put right; scaled or at zero it would only be hidden.
            for quiet in rescale_weights.quietened(patient):
                yield quiet
                yield from _with_branches(quiet, patient)
        for rx in changing(patient, {slug}, unsafe=unsafe):
            if rx.reach <= Reach.INITIALISATION:
                yield rx
            else:
                activations.append(rx)
    yield from activations
    if unsafe:
        yield from _exchanges(patient)
    structural = changing(patient, set(slugs()) - FIRST - {exchange_activation.SLUG}, unsafe=unsafe)
    yield from structural
    yield from _with_weights(patient, structural)


def for_training(patient: Patient, asked: set[str], *, unsafe: bool) -> Iterator[list[Prescription]]:
    """What may change how a healthy flow trains: what is said against a warning, what mends one property, the rest.

    One variant of each remedy, the first, and none of those that were asked already.
    """
    for wanted in (None, MENDING, *({cause} for cause in TRAINED)):
        found = [rx for rx in prescriptions(patient, wanted) if rx.applicable]
        new = [rx for rx in _ordered(found, unsafe) if rx.remedy not in asked]
        first = {rx.remedy: rx for rx in reversed(new)}
        asked |= first.keys()
        yield [rx for rx in new if first[rx.remedy] is rx]


def on_top(
    base: Prescription | None, model: nn.Module, found: Iterable[Prescription]
) -> Iterator[Prescription]:
    """What was prescribed for a changed model, together with what had changed it."""
    if base is None:
        yield from found
    elif not base.key_map(model):  # else names have changed: edits of both cannot be told together
        for more in found:
            try:
                yield replace(combined([base, more]), decades=math.nan)
            except ValueError:
                continue


def changing(patient: Patient, among: set[str], *, unsafe: bool) -> list[Prescription]:
    """Applicable prescriptions of these remedies that change the model, in the order in which they are tried."""
    return _ordered(prescriptions(patient, among=among), unsafe)


def _ordered(found: Iterable[Prescription], unsafe: bool) -> list[Prescription]:
    """Those that change the model, the least invasive first, and of one reach the specific first."""
    allowed = [rx for rx in found if changes(rx) and (unsafe or rx.safety is Safety.SAFE)]
    rank = {slug: i for i, slug in enumerate(ORDER)}
    return sorted(allowed, key=lambda rx: (rx.reach, rank.get(rx.remedy, len(ORDER))))


def changes(rx: Prescription) -> bool:
    """Does it change the model, and not the training alone?"""
    return any(edit.verb != "configure" for edit in rx.edits)


def _exchanges(patient: Patient) -> Iterator[Prescription]:
    """Another activation alone, then with weights drawn for it: one function after the other, as they are asked for."""
    if not _treated(patient, exchange_activation.TREATS):
        return
    flat = exchange_activation.saturating(patient)
    for rx in exchange_activation.prescribe(patient):
        if not rx.applicable:
            continue
        yield rx
        if any(e.verb == "fill" for e in rx.edits):  # SELU brings its own weights
            continue
        exchanged = dict.fromkeys(flat, exchange_activation.target_of(rx))
        yield from _with_drawn(rx, patient, exchanged, (orthogonal_initialisation, critical_initialisation))


def _isometric(patient: Patient) -> Iterator[Prescription]:
    """Orthogonal weights with a function that keeps all directions, for networks deeper than they are wide.

    tanh does (Pennington et al. 2017, arXiv:1711.04735), and ReLU does not. Where a head reads the mean over positions,
    which an odd function leaves none of, ELU takes its place.
    """
    found = exchange_activation.functions(patient.flow) or exchange_activation.own_operations(patient)
    pictures = any(site.kind == "convolution" for site in patient.flow.sites)
    smooth = pictures and not exchange_activation.differentiated(patient.flow)
    target, kept = ("elu", SMOOTH) if smooth else ("tanh", {"tanh"})
    names = [name for name in found if name not in kept]
    if not names:
        return
    rx = exchange_activation.exchange(patient, names, target)
    if rx.applicable:
        yield from _with_drawn(rx, patient, dict.fromkeys(names, target), (orthogonal_initialisation,))


def _with_branches(weights: Prescription, patient: Patient) -> Iterator[Prescription]:
    """Weights of the right size, and then the ends of the residual branches scaled with their number."""
    for rx in changing(patient, {scale_residual_branches.SLUG}, unsafe=True):
        if all(edit.of == ".mul_" for edit in rx.edits):
            yield replace(
                weights,
                remedy=f"{weights.remedy} + {rx.remedy}",
                title=f"{weights.title}; {rx.title}",
                edits=(*weights.edits, *rx.edits),
                treats=tuple(dict.fromkeys((*weights.treats, *rx.treats))),
                expected=rx.expected,
                decades=math.nan,
                references=(*weights.references, *rx.references),
            )


def _with_weights(patient: Patient, structural: list[Prescription]) -> Iterator[Prescription]:
    """A normalisation or skip together with orthogonal weights."""
    for drawn in orthogonal_initialisation.prescribe(patient):
        if drawn.applicable:
            for rx in structural:
                try:
                    yield combined([rx, replace(drawn, decades=math.nan)])
                except ValueError:  # it redraws or takes the place of the same weights
                    continue


def _with_drawn(
    rx: Prescription, patient: Patient, exchanged: dict[str, str], remedies: Iterable[ModuleType]
) -> Iterator[Prescription]:
    """An exchange of activations together with weights drawn for the new ones."""
    for remedy in remedies:
        for drawn in remedy.prescribe(replace(patient, exchanged=exchanged)):
            if drawn.applicable:
                yield replace(combined([rx, drawn]), decades=drawn.decades, expected=drawn.expected)


def depth_over_width(patient: Patient) -> float:
    """Sum of 1 / fan-in over the layers of a chain; 0 where skips pass the signal by (Hanin and Nica 2018).

    Of a convolution the channels count alone: along depth neighbouring positions come to carry the same. Layers side by
    side, as in an Inception block, count once: the narrowest.
    """
    if patient.flow.splits:
        return 0.0
    depth = {parameter.name: parameter.depth for parameter in patient.flow.parameters}
    along: dict[float, float] = {}
    for layer in layers(patient.flow, patient.model, {}):
        if layer.fan_in:
            at = depth[layer.weight]
            width = layer.shape[0] if layer.convolution and not layer.head else layer.fan_in
            along[at] = max(along.get(at, 0.0), 1 / width)
    return sum(along.values())


def _treated(patient: Patient, treats: tuple[str, ...]) -> bool:
    return any(finding.code in treats for finding in patient.diagnosis.findings)
