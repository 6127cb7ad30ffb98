"""TR701 plateau: the loss has stopped falling, and the training is not at its end.

What it means
    Steps are taken at full pace, and the loss stays where it is: near where it started, or back near there after
    it had been far below. A training that has converged has left its start behind and is no plateau.

Why it happens
    Gradients that vanish, units that died, a symmetric start, targets that the inputs do not determine, a
    learning rate that is far too high or too low. What was told beside this says which.

Evidence
    The medians of the two halves of the last 256 losses differ by less than 3 standard errors, or the later is higher by
    less than a hundredth of the first loss, 200 steps were taken
    at full pace, by their size or their learning rate (those of annealing do not count, unless for half of the run
    the rate was below a thousandth of its highest, which is then the cause), and of the way from the start to
    zero, less than a tenth was gained, or more than half of what had been gained is lost again. A loss that is level more than
    a tenth above its start is no plateau: what throws a training there is told as a spike or as diverging, and where
    nothing was, the targets have moved, as the returns of a policy that gets better. Losses whose noise is as
    large as their level, or that change sign, are left alone: there a plateau cannot be told from noise. Where the first
    steps replaced the weights, or these have shrunk to a third since, or hardly moved at all, that is the cause.

What helps
    `isograd check` on the model; the learning rate; the targets.

References
    Goodfellow et al. 2016, Deep Learning, section 8.2; Prechelt 1998, Early Stopping, But When?
"""

from __future__ import annotations

import math
from statistics import median

from isograd.diagnosis import Finding, Severity
from isograd.monitor.history import Detector, History
from isograd.monitor.origin import Cause, faded, replaced, shrunk, silenced, slow, still
from isograd.monitor.seen import spread

CODE = "TR701"
NAME = "plateau"

ERRORS = 3.0
"""Standard errors by which the medians of two halves may differ: a loss that falls slowly is no plateau."""
STEPS = 200
"""Steps at full pace before anything is said."""
EVERY = 8
"""Steps between two looks: the medians of hundreds of losses do not change so fast."""
GAINED = 0.1
"""Share of the first loss that must be gained: a classifier that learned no more than the class frequencies."""
LOST = 0.5
"""Share of what was gained that may be lost again."""
LEVEL = 0.01
"""Share of the first loss by which the later half may lie above the earlier, however little noise there is: with it, a loss
that creeps up over hundreds of steps stays within GAINED of its start."""
NOISE = 0.25
"""Spread over level, from which on the level says nothing."""

LOST_AGAIN = Cause("what had been learned was lost, and is not learned again", "unclear", ())
UNLEARNED = Cause(
    "the weights move, and nothing is learned: what the loss asks for does not follow from the inputs, as where labels are mixed "
    "up, or what tells the inputs apart is lost on its way",
    "unclear",
    ("train on one batch alone: where that is learned by heart, look at the labels",),
)


class Plateau(Detector):
    """Compares two windows of the loss with each other and with the start."""

    def __init__(self) -> None:
        super().__init__()
        self.share = math.nan
        self.falls = False

    unexamined = (
        f"needs a loss (monitor.log(loss=…)) that is positive and no mere noise, over {STEPS} steps, and over as many at full "
        "pace where it does not fall"
    )
    of_level = True

    def examine(self, history: History) -> Finding | None:
        losses, first = history.losses, history.first_loss
        if len(losses) < STEPS or history.count % EVERY or min(*losses, first) <= 0:
            return None
        half = len(losses) // 2
        before, now = median(losses[:half]), median(losses[half:])
        noise = spread(losses[half:])
        share = (first - now) / first
        if noise <= NOISE * now or (noise <= NOISE * first and share >= GAINED):
            self.share = share
        if noise > NOISE * now:
            return None
        error = ERRORS * 1.25 * noise / math.sqrt(half)  # the error of a median
        self.falls = before - now > error
        flat = not self.falls and now - before <= max(error, LEVEL * first)
        stuck = self.share < GAINED
        fallen_back = now - history.best > LOST * (first - history.best) and first > history.best
        paced = history.moving if math.isfinite(history.pace) else history.count
        near = -share <= GAINED
        over = faded(history)
        if (paced < STEPS and over is None) or not flat or not near or not (stuck or fallen_back):
            return None
        lost = first - history.best > GAINED * first
        unknown = LOST_AGAIN if lost else UNLEARNED
        known = (why(history) for why in (still, replaced, shrunk, silenced, slow))
        cause = over or next(filter(None, known), unknown)
        where = f"back at {now:.3g} after {history.best:.3g}" if lost else f"still at {now:.3g}"
        return Finding(
            CODE,
            NAME,
            Severity.WARNING,
            f"the loss is {where} and no longer changes; it started from {first:.3g}",
            cause=cause.words,
            evidence={
                "loss": now,
                "first": first,
                "best": history.best,
                "gained": self.share,
                "threshold": GAINED,
                "cause": cause.slug,
            },
            remedies=(
                *cause.remedies,
                "find where the gradient is lost: isograd check on the model",
            ),
        )

    def outcome(self, history: History) -> str | None:
        if math.isnan(self.share) or (self.share < GAINED and not self.falls):
            return None
        if self.share < GAINED:
            return f"the loss still falls, and {self.share:.0%} of the first is gained"
        return f"{self.share:.0%} of the first loss is gained (a plateau is below {GAINED:.0%})"
