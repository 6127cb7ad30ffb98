"""SA302 dead-units: units whose derivative is exactly zero for every sample.

What it means
    No gradient passes through these units and none reaches the weights that feed them: they never learn.
    Where a whole layer is dead, nothing before it learns. Or nearly all of every layer sleeps: what is left of the slope
    is a few samples' and positions', and few examples teach anything.

Why it happens
    Biases far below zero, inputs that were not centred, a step that was too large and threw the units
    over the edge, or a normalisation whose shift is strongly negative. Or layers too narrow for their number: each
    ReLU of a deep chain is off for all samples with probability 1/2, a layer of n of them with 2^-n.

Evidence
    The derivative of the activation itself, unit by unit, over all samples and positions of the batch. Half the
    outputs of a ReLU are zero in a healthy layer: only a unit that is zero *everywhere* is dead. Beside the backbone
    only a whole layer counts, where weights are left with a gradient of exactly zero. In deep
    ReLU networks all samples come to look alike and about half of the units are off for all of them at
    initialisation; that trains, so that an error needs 90%. For chains without skips and normalisations, the share of
    draws of the same shape that are dead from the start, 1 - prod(1 - 2^-n): what is alive now has no unit to spare.
    Of a whole network, the mean derivative of its median activation, 1/2 at any usual start: behind a convolution some
    position wakes a unit that is off everywhere else.

What helps
    Biases set to zero, centred inputs, leaky ReLU, ELU or GELU, a lower learning rate or warm-up.

References
    Lu et al. 2019, Dying ReLU and Initialization; Maas et al. 2013.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from statistics import median

from isograd.diagnosis import Finding, Severity
from isograd.flow import Flow
from isograd.graph.operations import ACTIVATIONS, RECTIFIERS
from isograd.statistics import Activation
from isograd.symptoms import Healthy, Outcome, Unexamined

CODE = "SA302"
NAME = "dead-units"

ERROR = 0.9
"""A tenth of a layer still passes a gradient that trains (He-initialised nets of 50 layers: half is off)."""
WARNING = 0.6
"""More than the half that is off by symmetry in a deep ReLU network."""
SAMPLES = 8
"""A unit that is off half of the time is off in 8 samples by chance once in 256."""
EXTINCT = 8
"""Units that are all off for all samples once in 256 draws; the few of a squeeze-and-excitation often are."""
ASLEEP = 0.12
"""Mean derivative of the median activation of a chain. Batch-normalised CNNs of 6 and 10 layers whose shifts leave them 0.1
lose two thirds of their lead and more, at 0.25 a fifth to a quarter; healthy models of the zoo start at 0.48 and
more (`python -m benchmarks.twins.thresholds shift`)."""
ASLEEP_BESIDE_SKIPS = 0.02
"""The same where skips lead by: a residual CNN loses half at 0.05 and nearly all at 0.015, a residual MLP nothing at 0.02."""
DROWSY = 0.2
"""From here on it is told."""
STILLBORN = 1 / 3
"""Share of draws that are dead from which the others do not last either. Of AutoTrainer's ReLU networks of five units, those
with .38 to .42 end short of the best control in 23 of 30 trainings; no healthy model of the zoo has more than .08."""
STILLBORN_WARNING = 0.1
"""One draw in ten is lost, and those that are left have few units to spare in training."""


def examine(flow: Flow) -> Iterator[Outcome]:
    """Share of dead units of every activation that a whole segment or branch passes through, or that is dead as a whole."""
    stuck = any(
        p.grad_norm_log10 == -math.inf and p.weight_norm > 0 and len(p.shape) > 1 for p in flow.parameters
    )
    one_sided = [
        a
        for a in flow.activations
        if not ACTIVATIONS[a.function].bounded and (a.bottleneck or (stuck and _extinct(a)))
    ]
    seen = [a for a in one_sided if a.samples >= SAMPLES]
    if not seen:
        why = f"fewer than {SAMPLES} samples" if one_sided else "no activation that can die"
        yield Unexamined(f"{why} on the backbone")
        return
    worst = max(seen, key=lambda a: a.dead)
    narrow = _narrow(flow)
    stillborn = 1 - math.prod(1 - 2.0**-a.units for a in narrow)
    awake, least = _awake(flow), ASLEEP_BESIDE_SKIPS if flow.splits else ASLEEP
    if worst.dead < WARNING and stillborn < STILLBORN_WARNING and awake >= DROWSY:
        yield Healthy(
            f"at most {worst.dead:.0%} of a layer's units are dead ({len(seen)} activations, an error from {ERROR:.0%})"
        )
        return
    evidence: dict[str, float | str] = {"dead": worst.dead, "threshold": ERROR, "samples": worst.samples}
    said, cause = [], []
    sick = [a for a in seen if a.dead >= WARNING]
    if sick:
        said.append(
            f"{worst.dead:.0%} of the {worst.units} units of {worst.site.name} are dead on all {worst.samples} samples; "
            f"{len(sick)} of {len(seen)} activations have more than {WARNING:.0%}"
        )
        cause.append("pre-activations lie below zero for every sample")
    if stillborn >= STILLBORN_WARNING:
        width = min(a.units for a in narrow)
        said.append(
            f"{stillborn:.0%} of all draws of {len(narrow)} layers with ReLU, the narrowest of {width} units, are dead from the start"
        )
        cause.append(
            "the layers are too narrow for their number: half of all ReLUs are off, and in some layer all are"
        )
        evidence |= {"stillborn": stillborn, "stillborn_threshold": STILLBORN}
    if awake < DROWSY:
        said.append(f"the median of {len(seen)} activations has a mean derivative of {awake:.2g}")
        cause += [] if sick else ["pre-activations lie below zero nearly everywhere"]
        evidence |= {"mean_derivative": awake, "mean_derivative_threshold": least}
    sick = sick or (sorted(seen, key=lambda a: a.mean_derivative) if awake < DROWSY else [])
    yield Finding(
        CODE,
        NAME,
        Severity.ERROR
        if worst.dead >= ERROR or stillborn >= STILLBORN or awake < least
        else Severity.WARNING,
        "; ".join(said),
        cause="; ".join(cause),
        sites=tuple(a.site.place for a in (sick or narrow)[:3]),
        evidence={**evidence, "layers": len(sick or narrow), "cause": "dead-units"},
        remedies=(*_lines(sick), "zero-biases", "leaky-activation", "standardise-input"),
    )


def _awake(flow: Flow) -> float:
    """Mean derivative of the median rectifier that the signal passes through; 1: there is none."""
    slopes = [a.mean_derivative for a in flow.activations if a.carries and a.function in RECTIFIERS]
    return median(slopes) if slopes else 1.0


def _extinct(a: Activation) -> bool:
    """Nothing at all is left of one beside the backbone, as in the feature map of an attention: that is no draw's bad luck."""
    return a.dead == 1 and a.units >= EXTINCT and len(a.site.shape) > 1


def _lines(sick: list[Activation]) -> Iterator[str]:
    """What to write where no bias is to blame, beside the backbone."""
    lines = {a.site.source: a.function for a in sick if not a.bottleneck and a.site.source}
    yield from (f"{line}: give {name} what is positive for some samples" for line, name in lines.items())


def _narrow(flow: Flow) -> list[Activation]:
    """ReLUs of vectors in a chain, where nothing passes a dead layer by and nothing centres its input."""
    if flow.splits or flow.normalisations:
        return []
    return [
        a
        for a in flow.activations
        if a.bottleneck and a.function == "relu" and a.units > 1 and len(a.site.shape) == 2
    ]
