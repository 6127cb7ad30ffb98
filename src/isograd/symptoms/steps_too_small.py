"""UP507 steps-too-small: the weights hardly move, and the loss has far to go.

What it means
    In hundreds of steps the typical weight matrix has moved by a few percent of itself at most, and the loss falls at
    the end as slowly and as steadily as at the beginning, or not at all: nothing has been learned yet.

Why it happens
    A learning rate that is too low or zero, a schedule that never reached it, or an optimizer whose epsilon outweighs
    its gradients. An optimizer over other parameters than those of the loss, such as a copy of the model or the one that
    was there before: none of them gets a gradient. A zero_grad() between the backward and the step. Clipping that leaves next
    to nothing, as of gradients that a GradScaler has scaled and not yet unscaled.

Evidence
    The largest update norm over weight norm of the median matrix, over 16 readings, that the run has ever had, so
    that annealing does not count; and the medians of the four quarters of the remembered losses, which fall evenly
    where nothing bends yet. A run whose updates still grow is warming up. An error where nothing moves at all: from the
    first step on, in 32 readings in a row, no parameter got a gradient, or none was left of it at the step, or each learning
    rate was zero.

What helps
    A higher learning rate; a look at epsilon and at the schedule.

References
    Smith 2017, Cyclical Learning Rates (the range test); Schmidt et al. 2021, Descending through a Crowded Valley.
"""

from __future__ import annotations

import math
from itertools import pairwise
from statistics import median

from isograd.diagnosis import Finding, Severity
from isograd.monitor.history import RECENT, WINDOW, Detector, History
from isograd.monitor.origin import LOW, NO_RATE, SLOW, Cause, clipped, silenced, still
from isograd.monitor.seen import spread

CODE = "UP507"
NAME = "steps-too-small"

NONE = -5.5
"""log10: 3e-6, at which nothing moves, whatever the loss does."""
EVEN = 0.4
"""The loss falls in the last quarter by this share of what it fell in the second: it does not bend yet."""
GAINED = 0.1
"""Share of the first loss: where it is gained, the steps were large enough for it."""
STEPS = 200
NEVER = 32
"""Readings from the first on without any gradient, or at a learning rate of zero: a schedule may start with one step
at zero, and a loop with a few batches before there is a loss."""


class TooSmall(Detector):
    """Remembers how fast the typical matrix ever went."""

    def __init__(self) -> None:
        super().__init__()
        self.pace = -math.inf
        self.warming = 0.0

    unexamined = f"needs update norms and {STEPS} steps, and where these are small a loss that falls by more than its noise"

    def examine(self, history: History) -> Finding | None:
        cause = still(history)
        if self.holds(cause is not None, NEVER) and cause is not None and self.held == history.count:
            return self._never(history, cause)
        if len(history.typical_updates) < RECENT or self.pace > SLOW:
            return None
        typical = median(history.typical_updates)
        if history.count % WINDOW == 0:
            self.warming = typical - self.pace
        self.pace = max(self.pace, typical)
        if history.count < STEPS or self.pace > SLOW or self.warming > 0.02:
            return None
        if self.pace > NONE and not self._steady(history.losses):
            return None
        cause = silenced(history) or clipped(history) or LOW
        return Finding(
            CODE,
            NAME,
            Severity.WARNING,
            f"the typical weight matrix moved by at most {10**self.pace:.1g} of itself a step in {history.count} steps, "
            "and the loss has not bent yet",
            cause=cause.words,
            sites=tuple(history.names[:1]),
            evidence={
                "update_ratio": 10**self.pace,
                "threshold": 10**SLOW,
                "steps": history.count,
                "cause": cause.slug,
            },
            remedies=cause.remedies,
        )

    def _never(self, history: History, cause: Cause) -> Finding:
        return Finding(
            CODE,
            NAME,
            Severity.ERROR,
            f"{'no weight has moved' if cause is NO_RATE else 'no gradient has reached the optimizer'} in {history.count} steps",
            cause=cause.words,
            sites=tuple(history.names[:1]),
            evidence={"steps": history.count, "threshold": NEVER, "cause": cause.slug},
            remedies=cause.remedies,
        )

    def _steady(self, losses: list[float]) -> bool:
        """Falling, beyond its noise, and at the end about as fast as before."""
        size = len(losses) // 4
        quarters = [median(losses[i * size : (i + 1) * size]) for i in range(4)] if size >= 16 else []
        if not quarters:
            return False
        noise = spread(losses[-size:]) / math.sqrt(size)
        falls = [a - b for a, b in pairwise(quarters)]
        return quarters[0] - quarters[3] > 4 * noise and falls[2] > EVEN * falls[0] and min(falls) > 0

    def outcome(self, history: History) -> str | None:
        if not math.isfinite(self.pace) or history.count < STEPS:
            return None
        if self.pace <= SLOW and not history.first_loss - history.best > GAINED * abs(history.first_loss):
            return None
        return f"the typical weight matrix moved by up to {10**self.pace:.1g} of itself a step (a warning below {10**SLOW:.0e})"
