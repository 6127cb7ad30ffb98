"""TR703 diverging: the loss has risen far above where the training started.

What it means
    The network is worse than before it was trained, and does not come back by itself.

Why it happens
    A learning rate that is too high, inputs that are not normalised, weights drawn too large.

Evidence
    The median of the last 3 losses is above three times the first, in a run whose losses are positive, by 6 spreads of the
    64 before them and beyond their largest, and the gradient norm is above three times the first; the first step alone is no
    evidence, nor is a jump that no step explains while it comes back (TR705). The cause is read off the first steps, as under UP506.

What helps
    What the cause names; warm-up; gradient clipping.

References
    Goodfellow et al. 2016, Deep Learning, section 8.2.4; Cohen et al. 2021, Edge of Stability.
"""

from __future__ import annotations

import math
from statistics import median

from isograd.diagnosis import Finding, Severity
from isograd.monitor.baseline import Baseline
from isograd.monitor.history import Detector, History
from isograd.monitor.jumps import absorbed, judged
from isograd.monitor.origin import origin

CODE = "TR703"
NAME = "diverging"

RISE = 3.0
"""Times the first loss."""
NORM = 0.5
"""Decades by which the gradient norm must have risen too: where the first loss was small by luck, as with noisy
rewards, the loss alone says nothing."""
DEVIATIONS = 6.0
"""Spreads of the losses, once enough of them are known; and above the largest of these, as tails are heavy."""
RECENT = 3
"""Losses whose median is the loss of now."""


class Diverging(Detector):
    """Compares the loss with the first."""

    def __init__(self) -> None:
        super().__init__()
        self.lowest = math.inf
        self.ratio = math.nan

    unexamined = "needs a positive loss (monitor.log(loss=…))"
    of_level = True

    def examine(self, history: History) -> Finding | None:
        losses = history.losses
        if not losses:
            return None
        self.lowest = min(self.lowest, losses[-1])
        if self.lowest < 0 or len(losses) < RECENT or history.first_losses[0] <= 0:
            return None
        now, first = median(losses[-RECENT:]), history.first_losses[0]
        self.ratio = now / first
        norm = max(history.norms[-3:], default=math.inf) - history.first["norm"][0]
        base = Baseline(judged(history, RECENT), RECENT)
        if self.ratio < RISE or norm < NORM or now - first < DEVIATIONS * base.noise:
            return None
        if now < base.largest or absorbed(history, RECENT):  # the largest is nan where too little is known
            return None
        cause = origin(history)
        return Finding(
            CODE,
            NAME,
            Severity.ERROR,
            f"the loss is at {now:.3g}, {self.ratio:.2g} times where it started",
            cause=cause.words,
            evidence={
                "loss": now,
                "first": first,
                "ratio": self.ratio,
                "threshold": RISE,
                "cause": cause.slug,
            },
            remedies=cause.remedies,
        )

    def outcome(self, history: History) -> str | None:
        if math.isnan(self.ratio):
            return None
        return f"the loss is at {self.ratio:.2g} of the first (an error from {RISE:.0f})"
