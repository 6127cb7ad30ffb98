"""TR702 loss-spike: the loss jumps, and gives back what had been learned.

What it means
    Within a few steps the loss rises far above its noise and stays there: not one hard batch, but a network that
    has been thrown out of its minimum. It may come back, or not.

Why it happens
    A batch or a step that was too large for the curvature; second moments of the optimizer that were too small;
    a layer that had grown unstable before.

Evidence
    The median of the last 5 losses against median and spread (MAD) of the 64 before: 6 spreads, beyond the
    largest of those losses, and a third of all that had been gained since the start, or a twentieth of the first loss where
    less was gained than that takes. A jump that no step explains, as of other targets, is told unless it is coming back, half of
    it within 32 steps: then nothing was lost. The layer that moved first:
    for each matrix, how many steps back its gradient norm left its own band (4 spreads and a fifth of a decade)
    and stayed out; the lead is the largest of these.

What helps
    Clipping, skipping the batch, a lower learning rate, a smaller beta2 in Adam; the layer that is named.

References
    Molybog et al. 2023, A Theory on Adam Instability; Takase et al. 2023, Spike No More.
"""

from __future__ import annotations

import math

from isograd.diagnosis import Finding, Severity
from isograd.monitor.baseline import Baseline
from isograd.monitor.history import WINDOW, Detector, History
from isograd.monitor.jumps import absorbed, judged
from isograd.monitor.origin import origin

CODE = "TR702"
NAME = "loss-spike"

DEVIATIONS = 6.0
"""Spreads of the baseline; losses have heavier tails than a normal distribution."""
BEYOND = 1.0
"""Times the distance from the level to the largest loss of the baseline."""
GIVEN_BACK = 1 / 3
"""Share of what had been gained since the start."""
LEVEL = 0.05
"""Share of the first loss: where nothing was gained, a move within that is no loss of anything."""
RECENT = 5
"""Losses whose median is the loss of now: three of five batches must agree, in a batch of four one may be odd."""
BAND = 4.0
"""Spreads within which the gradient norm of a layer is as usual."""
LEAST = 0.2
"""Decades: a smaller move is none, however quiet the layer was."""
FARTHEST = 32
"""Steps that one looks back."""


class Spike(Detector):
    """Holds the loss against its own past, and asks the layers who left theirs first."""

    def __init__(self) -> None:
        super().__init__()
        self.deviations = math.nan

    unexamined = "needs a loss (monitor.log(loss=…)) over 40 steps"
    of_level = True

    def examine(self, history: History) -> Finding | None:
        base = Baseline(judged(history, RECENT), RECENT)
        if not base.enough:
            return None
        self.deviations = base.deviations
        if not jumped(base, history.first_loss) or absorbed(history, RECENT):
            return None
        leads = moved_first(history)
        lead = max(leads.values(), default=0)
        first = sorted(leads, key=lambda name: -leads[name])[:3] if lead else []
        cause = origin(history)
        return Finding(
            CODE,
            NAME,
            Severity.WARNING,
            f"the loss jumped from {base.level:.3g} to {base.now:.3g}"
            + (f"; the gradient of {first[0]} had left its band {lead} steps before" if first else ""),
            cause=cause.words,
            sites=tuple(first),
            evidence={
                "loss": base.now,
                "before": base.level,
                "deviations": base.deviations,
                "threshold": DEVIATIONS,
                "lead": lead,
                "cause": cause.slug,
            },
            remedies=cause.remedies,
        )

    def outcome(self, history: History) -> str | None:
        if math.isnan(self.deviations):
            return None
        return f"the loss is {self.deviations:+.1f} spreads from its level (a spike from +{DEVIATIONS:.0f})"


def jumped(base: Baseline, first_loss: float) -> bool:
    """Is the loss of now far above what it was, by more than its noise and a good part of what was gained?"""
    gained = max(first_loss - base.level, 0.0)
    return (
        base.deviations >= DEVIATIONS
        and base.now >= base.level + BEYOND * (base.largest - base.level)
        and base.rise >= max(GIVEN_BACK * gained, LEVEL * abs(first_loss))
    )


def moved_first(history: History) -> dict[str, int]:
    """By matrix: steps since which its gradient norm has been above its band without a break; 0: it is not."""
    found: dict[str, int] = {}
    for name, column in zip(history.names, zip(*history.grads, strict=True), strict=True):
        base = Baseline(column, FARTHEST, WINDOW)
        if not base.enough or not math.isfinite(base.spread):
            continue
        limit = base.level + max(BAND * base.spread, LEAST)
        outside = 0
        for value in reversed(column[-FARTHEST:]):
            if not value > limit:
                break
            outside += 1
        found[name] = outside
    return found
