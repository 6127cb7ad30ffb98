"""EG203 growing-gradient: the gradient norm rises tenfold while the loss does not fall.

What it means
    Training leaves the region in which its step size is stable. What follows is a spike, or divergence.

Why it happens
    A learning rate beyond the edge of stability, weights that grow, inputs of another scale, or a recurrence
    whose gain has passed 1.

Evidence
    The median of the last 8 gradient norms against median and spread (MAD) of the 64 before, in logarithms: a
    decade and 6 spreads. In the first steps, against the first step: a decade and a half with a loss that
    rises. A gradient that grows while the loss falls is how many healthy trainings begin. Where other data has come
    (the loss rose by more than the step explains, and stayed), the norm that it brought is the baseline. A norm that has
    leapt in one step at an unchanged rate is waited for 16 steps, and as long as it is on its way back. Values that are not
    finite never enter a baseline.

What helps
    Clipping at a multiple of the usual norm, a lower learning rate, what the cause names.

References
    Pascanu et al. 2013, On the Difficulty of Training Recurrent Neural Networks; Cohen et al. 2021.
"""

from __future__ import annotations

import math

from isograd.diagnosis import Finding, Severity
from isograd.monitor.baseline import Baseline
from isograd.monitor.history import Detector, History, worst
from isograd.monitor.jumps import settling
from isograd.monitor.origin import brought, origin
from isograd.symptoms.steps_too_large import rising

CODE = "EG203"
NAME = "growing-gradient"

GROWTH = 1.0
"""Decades within a window."""
DEVIATIONS = 6.0
"""Spreads of the baseline."""
AT_START = 1.5
"""Decades over the first step, while there is no baseline yet."""
RECENT = 8


class GrowingGradient(Detector):
    """Holds the gradient norm against its own past."""

    def __init__(self) -> None:
        super().__init__()
        self.rise = math.nan

    unexamined = "needs gradient norms over 40 steps"

    def examine(self, history: History) -> Finding | None:
        norms = history.norms
        if len(norms) < 2:
            return None
        base = Baseline(norms, RECENT)
        if base.enough:
            self.rise = min(base.rise, base.now - brought(history))
            grown = (
                self.rise >= GROWTH and base.deviations >= DEVIATIONS and not_falling(history.losses, RECENT)
            )
        else:
            self.rise = norms[-1] - norms[0]
            grown = self.rise >= AT_START and rising(history)
        if not grown or settling(history, norms[-1] if not base.enough else base.now):
            return None
        cause = origin(history)
        now, then = history.grads[-1], history.grads[-min(len(history.grads), RECENT + 32)]
        risen = [a - b for a, b in zip(now, then, strict=True)]
        return Finding(
            CODE,
            NAME,
            Severity.ERROR,
            f"the gradient norm has risen by {self.rise:.1f} decades, and the loss does not fall",
            cause=cause.words,
            sites=worst(history.names, risen),
            evidence={
                "decades": self.rise,
                "threshold": GROWTH if base.enough else AT_START,
                "spread": base.spread,
                "cause": cause.slug,
            },
            remedies=cause.remedies,
        )

    def outcome(self, history: History) -> str | None:
        if math.isnan(self.rise) or not Baseline(history.norms, RECENT).enough:
            return None
        return f"the gradient norm has moved by {self.rise:+.1f} decades within a window (an error from +{GROWTH:.0f})"


def not_falling(losses: list[float], recent: int) -> bool:
    """Is the loss of now at or above its baseline? True where no loss is known."""
    base = Baseline(losses, recent)
    return not base.enough or base.rise >= 0
