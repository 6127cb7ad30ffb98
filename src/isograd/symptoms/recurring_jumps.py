"""TR705 recurring-jumps: every so many steps the loss jumps and comes back: something is exchanged there.

What it means
    At these steps the loss, or its gradient, is another one from one step to the next, and what is learned after that brings it
    back. The weights are where they were, so nothing is lost; but the loss has no level of its own: it stands where the last
    exchange has put it. Plateau, spike, divergence and the order of the data are not told of it any more.

Why it happens
    A target network that is copied every so many steps, as that of a DQN: it is meant to be so. Data in blocks of equal
    length, or batches in the same order in each epoch: the jump is what each block makes the network forget.

Evidence
    Steps at which the loss rises by more than the step explains (its length times the mean of the gradient norms at both its
    ends) and by a third of the first loss above all of the last 16, or the gradient norm by half a decade above all of the last 16 at
    an unchanged learning rate, and stays there for more than one batch. They lie the same number of steps apart, 16 or more, so
    often that as many random ones would do so with a chance below one in 10,000, and half of each jump is back before the next.

What helps
    Nothing, where targets are exchanged on purpose. Where so many steps are an epoch or a block of the data: shuffle it.

References
    Mnih et al. 2015, Human-level Control through Deep Reinforcement Learning (the target network); Bottou 2009, Curiously
    Fast Convergence of some Stochastic Gradient Descent Algorithms (the order of the examples).
"""

from __future__ import annotations

from isograd.diagnosis import Finding, Severity
from isograd.monitor.history import Detector, History
from isograd.monitor.jumps import CHANCE, NEAR

CODE = "TR705"
NAME = "recurring-jumps"


class Recurring(Detector):
    """Says once that jumps come regularly."""

    unexamined = f"needs gradient norms over {NEAR} steps"

    def examine(self, history: History) -> Finding | None:
        if not history.period:
            return None
        period, _, times, chance = history.period
        return Finding(
            CODE,
            NAME,
            Severity.INFO,
            f"every {period:.0f} steps the loss or its gradient jumps from one step to the next and comes back, {times:.0f} times "
            "so far",
            cause="something is exchanged at these steps: the targets, as where a target network is copied, which is meant to be so; "
            f"or the data, where it comes in blocks or epochs of {period:.0f} batches that are not shuffled",
            evidence={"period": period, "times": times, "chance": chance, "threshold": CHANCE},
            remedies=("nothing, where targets are exchanged on purpose; else shuffle the data",),
        )

    def outcome(self, history: History) -> str | None:
        return "what jumps does not come every so many steps" if len(history.norms) >= NEAR else None
