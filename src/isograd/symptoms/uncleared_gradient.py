"""UP509 uncleared-gradient: the gradients of all steps add up, because nothing clears them.

What it means
    Each step takes the sum of all gradients since the training began, as momentum that forgets nothing. The sum
    grows, points where the training has long been, and drives weights and loss away, at once or after hundreds of steps.

Why it happens
    A loop without optimizer.zero_grad(), or one that clears another optimizer or model.

Evidence
    When the second backward begins, a parameter that it has not reached yet still holds the gradient of the first step,
    unwritten and not zero; and the third finds that of the second. Where a backward in between finds it cleared, as in the
    loop of a generator and its critic, nothing is said.

What helps
    optimizer.zero_grad() once a step, before the backward or after the step.

References
    PyTorch documentation, Optimizer.zero_grad and "What is torch.autograd": gradients accumulate.
"""

from __future__ import annotations

from isograd.diagnosis import Finding, Severity
from isograd.monitor.history import Detector, History
from isograd.monitor.origin import UNCLEARED

CODE = "UP509"
NAME = "uncleared-gradient"

TIMES = 2
"""Steps: a loop may forget it once, at its start."""


class Uncleared(Detector):
    """Counts the steps that began with the gradients of the step before."""

    unexamined = f"needs the first {TIMES + 1} steps"

    def examine(self, history: History) -> Finding | None:
        if history.uncleared < TIMES or self.told:
            return None
        return Finding(
            CODE,
            NAME,
            Severity.ERROR,
            "nothing clears the gradients between the steps: each step takes the sum of all so far",
            cause=UNCLEARED.words,
            sites=tuple(history.names[:1]),
            evidence={"steps": history.uncleared, "threshold": TIMES, "cause": UNCLEARED.slug},
            remedies=UNCLEARED.remedies,
        )

    def outcome(self, history: History) -> str | None:
        if history.count <= TIMES:
            return None
        return "no step began with the gradients of the one before"
