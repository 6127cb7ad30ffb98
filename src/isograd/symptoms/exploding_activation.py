"""EG202 exploding-activation: the signal grows from layer to layer on its way forward.

What it means
    Activations at the output side are many times larger than at the input side. The loss starts far too
    high, its gradient is as large, and in half precision the values overflow.

Why it happens
    The weights of each layer are drawn too large, or residual branches add up with nothing to normalise
    them. In a network without normalisation the weights' gradients, activation times error, can look the
    same in every layer while both factors explode: that is why both directions are measured.

Evidence
    log10 of the root mean square at the last hidden site over that at the first, along the backbone; it
    must grow in the typical layer too, so that one large layer is not called an explosion. A final
    normalisation takes the growth away again and is no finding.

What helps
    An initialisation at the critical gain, residual branches scaled by 1/sqrt(depth), normalisation.

References
    He et al. 2015; Hanin and Rolnick 2018, How to Start Training: The Effect of Initialization and Architecture.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch import Tensor

from isograd.diagnosis import Finding, Severity
from isograd.flow import Flow
from isograd.symptoms import Healthy, Outcome, Unexamined

CODE = "EG202"
NAME = "exploding-activation"

ERROR = 3.0
"""Decades of forward growth from which SGD trained at no learning rate (gallery.border: +3.3 and more)."""


def examine(flow: Flow) -> Iterator[Outcome]:
    """Forward growth over the hidden sites."""
    if flow.failure is not None or not math.isfinite(flow.loss):
        yield Unexamined("the loss is not finite or the backward failed")
        return
    rms = flow.column("activation_rms")[flow.hidden]
    rms = rms[~rms.isnan() & (rms > 0)]
    if len(rms) < 3 or not math.isfinite(float(rms[-1])):
        yield Unexamined("fewer than three finite activations along the backbone")
        return
    steps = rms.log10().diff()
    grown, typical = float(steps.sum()), float(_smoothed(steps).median()) * len(steps)
    if grown < ERROR or typical < grown / 4:
        yield Healthy(f"activations change by {grown:+.1f} decades (an error from {ERROR:+.1f})")
        return
    first, last = flow.sites[flow.hidden][0], flow.sites[flow.hidden][-1]
    yield Finding(
        CODE,
        NAME,
        Severity.ERROR,
        f"activations grow by {grown:+.1f} decades from {first.name} to {last.name} (rms {float(rms[0]):.2g} to {float(rms[-1]):.2g})",
        sites=(first.place, last.place),
        evidence={"decades": grown, "typical": typical, "threshold": ERROR, "layers": flow.layers},
        remedies=("critical-initialisation", "scale-residual-branches", "insert-normalisation"),
    )


def _smoothed(steps: Tensor) -> Tensor:
    """Mean of neighbours: a linear layer and its activation count as one step."""
    return (steps[:-1] + steps[1:]) / 2 if len(steps) > 1 else steps
