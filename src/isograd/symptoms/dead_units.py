"""SA302 dead-units: units whose derivative is exactly zero for every sample.

What it means
    No gradient passes through these units and none reaches the weights that feed them: they never learn.
    Where a whole layer is dead, nothing before it learns.

Why it happens
    Biases far below zero, inputs that were not centred, a step that was too large and threw the units
    over the edge, or a normalisation whose shift is strongly negative.

Evidence
    The derivative of the activation itself, unit by unit, over all samples and positions of the batch. Half the
    outputs of a ReLU are zero in a healthy layer: only a unit that is zero *everywhere* is dead. In deep
    ReLU networks all samples come to look alike and about half of the units are off for all of them at
    initialisation; that trains, so that an error needs 90%.

What helps
    Biases set to zero, centred inputs, leaky ReLU, ELU or GELU, a lower learning rate or warm-up.

References
    Lu et al. 2019, Dying ReLU and Initialization; Maas et al. 2013.
"""

from __future__ import annotations

from collections.abc import Iterator

from isograd.diagnosis import Finding, Severity
from isograd.flow import Flow
from isograd.graph.operations import ACTIVATIONS
from isograd.symptoms import Healthy, Outcome, Unexamined

CODE = "SA302"
NAME = "dead-units"

ERROR = 0.9
"""A tenth of a layer still passes a gradient that trains (He-initialised nets of 50 layers: half is off)."""
WARNING = 0.6
"""More than the half that is off by symmetry in a deep ReLU network."""
SAMPLES = 8
"""A unit that is off half of the time is off in 8 samples by chance once in 256."""


def examine(flow: Flow) -> Iterator[Outcome]:
    """Share of dead units of every activation that a whole segment or branch passes through."""
    one_sided = [a for a in flow.activations if a.bottleneck and not ACTIVATIONS[a.function].bounded]
    seen = [a for a in one_sided if a.samples >= SAMPLES]
    if not seen:
        why = f"fewer than {SAMPLES} samples" if one_sided else "no activation that can die"
        yield Unexamined(f"{why} on the backbone")
        return
    worst = max(seen, key=lambda a: a.dead)
    if worst.dead < WARNING:
        yield Healthy(
            f"at most {worst.dead:.0%} of a layer's units are dead ({len(seen)} activations, an error from {ERROR:.0%})"
        )
        return
    sick = [a for a in seen if a.dead >= WARNING]
    yield Finding(
        CODE,
        NAME,
        Severity.ERROR if worst.dead >= ERROR else Severity.WARNING,
        f"{worst.dead:.0%} of the {worst.units} units of {worst.site.name} are dead on all {worst.samples} samples; "
        f"{len(sick)} of {len(seen)} activations have more than {WARNING:.0%}",
        cause="pre-activations lie below zero for every sample",
        sites=tuple(a.site.place for a in sick[:3]),
        evidence={
            "dead": worst.dead,
            "threshold": ERROR,
            "samples": worst.samples,
            "layers": len(sick),
            "cause": "dead-units",
        },
        remedies=("zero-biases", "leaky-activation", "standardise-input"),
    )
