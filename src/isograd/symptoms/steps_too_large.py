"""UP506 steps-too-large: the optimizer replaces the weights instead of correcting them.

What it means
    A step changes the typical weight matrix by a fifth of itself and more, and the loss rises. The gradient
    says nothing about a point so far away: the weights land where gradients explode or units are dead.

Why it happens
    A learning rate that is too high or rises too fast, inputs that are not normalised, weights that were drawn
    too large, or a gradient that exploded on its way.

Evidence
    Update norm over weight norm, median over the weight matrices, in two of the last three readings, and the
    median of the last three losses above what the loss was before. The first steps of a healthy training may
    be large; then the loss falls. The cause is read off the run: the scale of the inputs and of the layers'
    signals at the first step (||dW|| / (||db|| sqrt(fan-in)) is the rms of what a layer is fed with), the
    growth of weights, else the learning rate.

What helps
    A lower learning rate, warm-up, gradient clipping; where the cause is the input or the initialisation, that.

References
    Liu et al. 2020, Understanding the Difficulty of Training Transformers; Cohen et al. 2021, Edge of Stability.
"""

from __future__ import annotations

import math
from statistics import median

from isograd.diagnosis import Finding, Severity
from isograd.monitor.history import LEAP, Detector, History
from isograd.monitor.origin import origin

CODE = "UP506"
NAME = "steps-too-large"

RISE = 1.2
"""The loss after over the loss before, where a level is known only from a few steps."""


class TooLarge(Detector):
    """Looks for large relative updates that a rise of the loss follows."""

    def __init__(self) -> None:
        super().__init__()
        self.recent: list[float] = []

    unexamined = "needs update norms"

    def examine(self, history: History) -> Finding | None:
        update = history.typical_update
        if math.isnan(update):
            return None
        self.recent = [*self.recent[-2:], update]
        if sum(value >= LEAP for value in self.recent) < 2 or not rising(history):
            return None
        cause = origin(history)
        largest = max(self.recent)
        return Finding(
            CODE,
            NAME,
            Severity.ERROR,
            f"a step changes the typical weight matrix by {10**largest:.2g} times its norm, and the loss rises",
            cause=cause.words,
            sites=tuple(history.names[:3]),
            evidence={"update_ratio": 10**largest, "threshold": 10**LEAP, "cause": cause.slug},
            remedies=cause.remedies,
        )

    def outcome(self, history: History) -> str | None:
        if not math.isfinite(history.pace):
            return None
        return f"the typical weight matrix changes by at most {10**history.pace:.1g} of itself a step"


def rising(history: History) -> bool:
    """Is the loss above what it was before these steps? True where no loss is known."""
    if not history.losses:
        return True
    now, before = median(history.losses[-3:]), history.losses[:-3][-16:]
    if not before:
        return False
    level = median(before)
    return now - level > (RISE - 1) * abs(level)
