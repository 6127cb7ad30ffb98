"""EG204 norm-drift: the gradient norm drifts away upwards, while the loss does not fall: a spike may follow.

What it means
    An early warning: for the last dozen steps the gradient has been far above its usual level, in the same
    direction each time. The loss shows little of it yet.

Why it happens
    What later makes the spike: a layer whose weights or logits grow, an optimizer whose second moments are too
    old for the gradients that come, a learning rate that rises.

Evidence
    The median of the last 12 gradient norms, in logarithms, against median and spread (MAD) of the 64 before:
    4 spreads and half a decade, with a loss that is not below its own baseline. A trend, and no outlier: the
    median of 12 does not follow single batches. What came with other data, as in EG203, is no drift, nor is a norm that
    has leapt in one step at an unchanged rate within the last 16 steps, or is on its way back from there.

What helps
    Look at the layers that are named; clip at a multiple of the usual norm; lower the learning rate.

References
    Takase et al. 2023, Spike No More; Wortsman et al. 2023, Stable and Low-precision Training (update RMS spikes).
"""

from __future__ import annotations

import math
from statistics import median

from isograd.diagnosis import Finding, Severity
from isograd.monitor.baseline import Baseline
from isograd.monitor.history import WINDOW, Detector, History, worst
from isograd.monitor.jumps import settling
from isograd.monitor.origin import brought, origin
from isograd.symptoms.growing_gradient import not_falling

CODE = "EG204"
NAME = "norm-drift"

DRIFT = 0.5
"""Decades: a factor of three over the usual norm."""
DEVIATIONS = 4.0
"""Spreads of single readings; of a median of 12 it is eleven."""
RECENT = 12


class Drift(Detector):
    """Holds a short median of the gradient norm against a long one."""

    def __init__(self) -> None:
        super().__init__()
        self.drift = math.nan

    unexamined = f"needs gradient norms over {WINDOW} steps"

    def examine(self, history: History) -> Finding | None:
        base = Baseline(history.norms, RECENT)
        if not base.enough or history.count < WINDOW + RECENT:
            return None
        self.drift = min(base.rise, base.now - brought(history))
        if self.drift < DRIFT or base.deviations < DEVIATIONS or not not_falling(history.losses, RECENT):
            return None
        if settling(history, base.now):
            return None
        columns = zip(*history.grads, strict=True)
        # where parameters have just joined, less is known of the matrices than of all together
        risen = [median(column[-RECENT:]) - median(column[:-RECENT] or column[:1]) for column in columns]
        cause = origin(history)
        unclear = cause.slug == "unclear"
        return Finding(
            CODE,
            NAME,
            Severity.WARNING,
            f"the gradient norm has drifted up by {base.rise:.1f} decades ({base.deviations:.0f} spreads), "
            "and the loss does not fall",
            cause="what drifts most is named; the loss has not followed yet" if unclear else cause.words,
            sites=worst(history.names, risen),
            evidence={
                "decades": base.rise,
                "threshold": DRIFT,
                "deviations": base.deviations,
                "spread": base.spread,
                "cause": cause.slug,
            },
            remedies=cause.remedies,
        )

    def outcome(self, history: History) -> str | None:
        if math.isnan(self.drift):
            return None
        return f"the gradient norm has drifted by {self.drift:+.1f} decades (a warning from +{DRIFT})"
