"""SA303 dying-units: during training, units or whole layers stop getting any gradient.

What it means
    Where all units of a layer are off for every sample, nothing before it learns again, and the loss settles
    at what the biases of the head alone can do.

Why it happens
    A step that was too large, or biases that drift, pushed the pre-activations of rectified units below zero;
    the gradient there is exactly zero, so that nothing brings them back. Exactly zero is also what is left of
    a gradient that underflowed.

Evidence
    Gradients of exactly zero: of the first weight matrix and at least half of all, while other parameters still
    get some, in 10 readings in a row; or of at least 75% of a layer's biases in 32 in a row, where it was below
    half at the start, hardly changes from batch to batch, and the loss is worse than it has been. Experts that saw no token and rows of an embedding that were not looked up do not count.

What helps
    A lower learning rate or warm-up, biases at zero, leaky ReLU, ELU or GELU.

References
    Lu et al. 2019, Dying ReLU and Initialization; Maas et al. 2013.
"""

from __future__ import annotations

import math
from statistics import median

from isograd.diagnosis import Finding, Severity
from isograd.monitor.history import WINDOW, Detector, History

CODE = "SA303"
NAME = "dying-units"

LAYER = 0.75
"""Share of a layer's units. In healthy trainings it stays near the half that is off by symmetry."""
START = 0.5
"""A layer that was half dead from the start did not die: in deep ReLU networks half is off by symmetry."""
DEAD_FOR = 10
"""Readings: a batch without gradient happens, ten in a row do not."""
DYING_FOR = 32
"""Readings: small batches, or batches of one class, leave units without gradient by chance."""
JITTER = 0.02
"""Mean change of the share from batch to batch: a dead unit is dead whatever the batch."""
WORSE = 0.25
"""Share of what had been gained that is lost again: a layer that is merely sparse trains as well as before."""
UNITS = 8
"""Fewer are no share to speak of."""


class Dying(Detector):
    """Counts gradients that are exactly zero."""

    def __init__(self) -> None:
        super().__init__()
        self.first: dict[str, float] = {}
        self.since: dict[str, int] = {}
        self.last: dict[str, float] = {}
        self.jitter: dict[str, float] = {}
        """Sum of the changes of the share since then."""
        self.largest = math.nan

    unexamined = "needs the gradients of weight matrices and the zeros in those of their biases"

    def examine(self, history: History) -> Finding | None:
        seen = history.now
        assert seen is not None
        for name, share in seen.dead.items():
            self.first.setdefault(name, share)
            dying = LAYER <= share < 1 and self.first[name] < START
            self.since[name] = self.since.get(name, 0) + 1 if dying else 0
            change = abs(share - self.last.get(name, share))
            self.jitter[name] = self.jitter.get(name, 0.0) + change if dying else 0.0
            self.last[name] = share
        self.largest = max(seen.dead.values(), default=math.nan)
        zero = [value == -math.inf for value in seen.grad.tolist() if not math.isnan(value)]
        silent = bool(zero) and zero[0] and sum(zero) * 2 >= len(zero)
        alive = seen.bias > -math.inf or not all(zero)
        if self.holds(silent and alive, DEAD_FOR):
            return self._dead(history, sum(zero), len(zero))
        dying = [
            name
            for name, times in self.since.items()
            if times >= DYING_FOR and self.jitter[name] <= JITTER * times
        ]
        return self._dying(seen.dead, dying) if dying and _worse(history) else None

    def _dead(self, history: History, count: int, total: int) -> Finding:
        return Finding(
            CODE,
            NAME,
            Severity.ERROR,
            f"{count} of {total} weight matrices, the first among them, have got a gradient of exactly zero for "
            f"{self.held} steps: what they feed is dead",
            cause="units are off for every sample, or the gradient underflows on its way",
            sites=tuple(history.names[:3]),
            evidence={"matrices": count, "of": total, "steps": self.held, "threshold": DEAD_FOR},
            remedies=("lower-learning-rate", "zero-biases", "leaky-activation"),
        )

    def _dying(self, shares: dict[str, float], names: list[str]) -> Finding:
        worst = max(names, key=lambda name: shares.get(name, 0.0))
        return Finding(
            CODE,
            NAME,
            Severity.WARNING,
            f"{shares.get(worst, math.nan):.0%} of the units of {worst.rpartition('.')[0]} have got no gradient "
            f"for {DYING_FOR} steps, {self.first[worst]:.0%} at the start",
            cause="pre-activations drift below zero",
            sites=tuple(names[:3]),
            evidence={"dead": shares.get(worst, math.nan), "threshold": LAYER, "at_start": self.first[worst]},
            remedies=("lower-learning-rate", "leaky-activation"),
        )

    def outcome(self, history: History) -> str | None:
        if math.isnan(self.largest):
            return None
        return f"at most {self.largest:.0%} of a layer's units get no gradient (a warning from {LAYER:.0%})"


def _worse(history: History) -> bool:
    """Has the training lost part of what it had gained? True where no loss is known."""
    if not history.losses:
        return True
    return median(history.losses[-WINDOW:]) - history.best >= WORSE * (history.first_loss - history.best)
