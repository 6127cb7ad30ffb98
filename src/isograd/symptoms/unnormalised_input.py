"""UP504 unnormalised-input: the model's float inputs are far from zero mean and unit scale.

What it means
    The first layer's outputs, and with them the gradients of its weights, are as many times too large.
    Saturating activations saturate, ReLUs die or explode, and one learning rate cannot suit all layers.

Why it happens
    Pixels from 0 to 255, raw sensor or money values, features with different units, a forgotten scaler.

Evidence
    Mean, standard deviation and largest magnitude of every float input of the model as a whole. A
    normalisation right behind the input takes the scale away again, and then this is no finding.

What helps
    Standardise with the training set's mean and standard deviation, or put a normalisation first.

References
    LeCun et al. 1998, Efficient BackProp.
"""

from __future__ import annotations

from collections.abc import Iterator

from isograd.diagnosis import Finding, Severity
from isograd.flow import Flow
from isograd.symptoms import Healthy, Outcome, Unexamined

CODE = "UP504"
NAME = "unnormalised-input"

WARNING = 5.0
"""Root mean square of the input: five standard deviations of a standardised one."""
SIGNAL = 5.0
"""Root mean square from which the first layer's output carries the excess on."""


def examine(flow: Flow) -> Iterator[Outcome]:
    """Root mean square of each float input, and of what the first layer makes of it."""
    if not flow.inputs:
        yield Unexamined("the model as a whole was given no float input")
        return
    name, (mean, rms, std, largest) = max(flow.inputs.items(), key=lambda item: item[1][1])
    first = flow.column("activation_rms")[1:4]
    carried = float(first[~first.isnan()].max()) if (~first.isnan()).any() else 0.0
    if rms < WARNING or (carried < SIGNAL and "normalisation" in [s.kind for s in flow.sites[1:4]]):
        yield Healthy(f"input {name}: mean {mean:.2g}, standard deviation {std:.2g}")
        return
    yield Finding(
        CODE,
        NAME,
        Severity.WARNING,
        f"input {name} has mean {mean:.3g} and standard deviation {std:.3g} (largest {largest:.3g}); "
        f"the first layers work at rms {carried:.3g}",
        cause="the data are not standardised",
        sites=(flow.sites[0].place,),
        evidence={"mean": mean, "rms": rms, "std": std, "threshold": WARNING, "cause": "unnormalised-input"},
        remedies=("standardise-input", "insert-normalisation"),
    )
