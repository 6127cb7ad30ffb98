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
    half at the start, or of 40% more than at the start; it hardly changes from batch to batch, and the loss is worse
    than it has been. Experts that saw no token and rows of an embedding that were not looked up do not count.

What helps
    A lower learning rate or warm-up, biases at zero, leaky ReLU, ELU or GELU.

References
    Lu et al. 2019, Dying ReLU and Initialization; Maas et al. 2013.
"""

from __future__ import annotations

import math
from statistics import median
from typing import Any

import torch
from torch import Tensor

from isograd.diagnosis import Finding, Severity
from isograd.monitor.history import WINDOW, Detector, History
from isograd.monitor.origin import given, raised, replaced
from isograd.monitor.seen import Seen

CODE = "SA303"
NAME = "dying-units"

LAYER = 0.75
"""Share of a layer's units. In healthy trainings it stays near the half that is off by symmetry."""
MORE = 0.4
"""Share of a layer's units that have gone since the start: it need not be nearly all of them, where the loss suffers."""
START = 0.5
"""A layer that was half dead from the start did not die: in deep ReLU networks half is off by symmetry."""
DEAD_FOR = 10
"""Readings: a batch without gradient happens, ten in a row do not."""
DYING_FOR = 32
"""Readings: small batches, or batches of one class, leave units without gradient by chance."""
JITTER = 0.02
"""Mean change of the share from batch to batch, up and down: a dead unit is dead whatever the batch."""
WORSE = 0.25
"""Share of what had been gained that is lost again: a layer that is merely sparse trains as well as before."""
LOOK = 8
"""Readings that one is worth which is so many steps from the one before it, as looks from inside (`deep_every`) are."""


class Dying(Detector):
    """Counts gradients that are exactly zero."""

    def __init__(self) -> None:
        super().__init__()
        self.sites: tuple[str, ...] = ()
        self.by_site = torch.empty(4, 0)
        """Share at first, share at the last reading, readings that it has been dying for, and the sum of its changes up
        and down since then; (4, site)."""
        self.largest = math.nan
        self.counted = -1
        """Step at which units were last counted."""
        self.before = ""
        """What the run said when the first of the readings came that are all zero."""
        self.calm = False
        """No site is dying, and of each that has biases the first share is known."""

    unexamined = "needs the gradients of weight matrices and the zeros in those of their biases"

    def examine(self, history: History) -> Finding | None:
        seen = history.now
        assert seen is not None
        dying = self._follow(seen)
        zero = -math.inf in history.grads[-1] and _first_half(seen)
        if zero and not self.held:
            self.before = _after(
                history, "units are off for every sample, or the gradient underflows on its way"
            )
        if self.holds(zero, DEAD_FOR):
            silent = seen.grad == -math.inf
            return self._dead(history, int(silent.sum()), int((~seen.grad.isnan()).sum()))
        return self._dying(history, seen.dead, dying) if dying and _worse(history) else None

    def _follow(self, seen: Seen) -> list[int]:
        """Sites whose units have been dying for long enough."""
        if seen.sites != self.sites:
            self.sites, self.by_site = seen.sites, torch.full((4, len(seen.sites)), math.nan)
            self.by_site[2:] = 0
            self.calm = False
        if not seen.counted:
            return []
        largest = float(seen.dead.nan_to_num(-1.0).max()) if self.sites else -1.0
        if largest < 0:  # nothing was counted
            return []
        self.largest = largest
        far, self.counted = seen.step - self.counted >= LOOK, seen.step
        if self.calm and seen.inside is None and largest < MORE:
            self.by_site[1] = seen.dead
            return []
        first, last, since, jitter = self.by_site
        known = ~seen.dead.isnan()
        first.copy_(torch.where(first.isnan(), seen.dead, first))
        dying = (seen.dead >= LAYER) | (seen.dead - first >= MORE)
        dying &= (seen.dead < 1) & (first < START)
        one = float(LOOK) if far else 1.0
        worth = one if seen.inside is None else torch.where(seen.inside, float(LOOK), one)
        back = 2 * (last - seen.dead).clamp(min=0.0)  # those that come back: more that die are no jitter
        change = torch.where(since > 0, back * worth, 0.0)
        since.copy_(torch.where(dying, since + worth, torch.where(known, 0.0, since)))
        jitter.copy_(torch.where(dying, jitter + change, torch.where(known, 0.0, jitter)))
        last.copy_(torch.where(known, seen.dead, last))
        self.calm = seen.inside is None and not bool(since.any())
        return ((since >= DYING_FOR) & (jitter <= JITTER * since)).nonzero().flatten().tolist()

    def state(self) -> dict[str, Any]:
        return super().state() | {"sites": list(self.sites), "by_site": self.by_site.tolist()}

    def restore(self, state: dict[str, Any]) -> None:
        super().restore(state)
        self.sites = tuple(state["sites"])
        self.by_site = torch.tensor(state["by_site"]).view(4, len(self.sites))

    def _dead(self, history: History, count: int, total: int) -> Finding:
        return Finding(
            CODE,
            NAME,
            Severity.ERROR,
            f"{count} of {total} weight matrices, the first among them, have got a gradient of exactly zero for "
            f"{self.held} steps: what they feed is dead",
            cause=self.before,
            sites=tuple(history.names[:3]),
            evidence={"matrices": count, "of": total, "steps": self.held, "threshold": DEAD_FOR},
            remedies=("lower-learning-rate", "zero-biases", "leaky-activation"),
        )

    def _dying(self, history: History, shares: Tensor, sites: list[int]) -> Finding:
        dead, at = shares[sites].nan_to_num(0.0).max(0)
        worst = sites[int(at)]
        share, first = float(dead), float(self.by_site[0, worst])
        return Finding(
            CODE,
            NAME,
            Severity.WARNING,
            f"{share:.0%} of the units of {self.sites[worst].rpartition('.')[0]} have got no gradient "
            f"for {DYING_FOR} steps, {first:.0%} at the start",
            cause=_after(history, "pre-activations drift below zero"),
            sites=tuple(self.sites[i] for i in sites[:3]),
            evidence={"dead": share, "threshold": LAYER, "at_start": first},
            remedies=("lower-learning-rate", "leaky-activation"),
        )

    def outcome(self, history: History) -> str | None:
        if math.isnan(self.largest):
            return None
        most = f"at most {self.largest:.0%} of a layer's units get no gradient"
        if self.largest < LAYER:
            return f"{most} (a warning from {LAYER:.0%})"
        _, _, since, jitter = self.by_site
        if bool(((since > 0) & (since < DYING_FOR) & (jitter <= JITTER * since)).any()):
            return None  # too early to tell
        return f"{most}: from the start on, by turns, or without harm to the loss"


def _after(history: History, words: str) -> str:
    """What is dead, and what went before."""
    before = given(history) or raised(history) or replaced(history)
    return words if before is None else f"{words}; {before.words}"


def _first_half(seen: Seen) -> bool:
    """Of the matrices that were read, are the first and half of all silent, while something else is not?"""
    read = (seen.grad == -math.inf)[~seen.grad.isnan()]
    return bool(read[0]) and int(read.sum()) * 2 >= len(read) and not (seen.silent and bool(read.all()))


def _worse(history: History) -> bool:
    """Has the training lost part of what it had gained? True where no loss is known."""
    if not history.losses:
        return True
    return median(history.losses[-WINDOW:]) - history.best >= WORSE * (history.first_loss - history.best)
