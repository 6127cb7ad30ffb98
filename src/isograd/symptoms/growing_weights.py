"""UP508 growing-weights: weights grow exponentially, and do not slow down.

What it means
    A weight matrix grows by the same factor step after step. Signals and gradients grow with the product of such
    factors, so that it ends in a spike or in values that are not finite.

Why it happens
    A feedback between weights and gradients beyond the edge of stability, a learning rate that is too high, no
    weight decay where a scale is free to grow, decay with the wrong sign.

Evidence
    The logarithm of each matrix's norm over 64 steps, or over 32 where it goes faster: it has risen by half and
    more, in each quarter of that time, and in the second half as much as in the first. Where norms are measured more
    rarely, the last five of them, and a rise as fast. Healthy weights grow too, but ever more slowly.

What helps
    Weight decay, a lower learning rate, normalisation, gradient clipping.

References
    Merrill et al. 2021, Effects of Parameter Norm Growth; Wortsman et al. 2023, Small-scale Proxies for Instabilities.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence

import torch
from torch import Tensor

from isograd.diagnosis import Finding, Severity
from isograd.monitor.history import WINDOW, Detector, History
from isograd.monitor.origin import given

CODE = "UP508"
NAME = "growing-weights"

GROWTH = 0.18
"""Decades within 32 or 64 steps: half as large again."""
STEADY = 0.85
"""Growth in the second half over that in the first. Growth by equal amounts has log(1.5/1.25)/log(1.25) = 0.82."""
EACH = 0.6
"""Growth in each quarter over the mean of the four: by leaps grow the weights of a training that is merely noisy."""
EVERY = 4
"""Steps between two looks: 64 do not change so fast."""
POINTS = 5
"""Measurements that four quarters take."""
LOOKS = 2
"""Looks in a row: a single large step grows by leaps."""
HELP = ("lower-learning-rate", "clip-gradients", "add weight decay: weight_decay=0.01 in AdamW")
SETTLED = 2 * WINDOW
"""Steps before anything is said: from a small initialisation weights grow fast at first, while momentum and
warm-up speed the steps up."""


class Growing(Detector):
    """Looks for exponential growth of the norm of a matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = math.nan
        self.looked = 0
        """Step of the weights that were last looked at."""

    unexamined = f"needs weight norms over {SETTLED} steps"

    def examine(self, history: History) -> Finding | None:
        steps, rows = history.weighed, history.weights
        if history.count <= SETTLED or len(rows) < POINTS or steps[-1] < max(self.looked + EVERY, SETTLED):
            return None
        self.looked = steps[-1]
        grown, span = max(
            ((exponential(steps, rows, span), span) for span in _spans(steps)),
            key=lambda found: float(found[0].max()) if len(found[0]) else 0.0,
            default=(torch.zeros(0), WINDOW),
        )
        if not len(grown):
            return None
        self.largest = float(grown.max())
        if not self.holds(self.largest * min(WINDOW / span, 1.0) >= GROWTH, LOOKS):
            return None
        data = given(history)
        return Finding(
            CODE,
            NAME,
            Severity.WARNING,
            f"{history.names[int(grown.argmax())]} has grown {10**self.largest:.2g} times within {span} steps, and does not slow down",
            cause=data.words if data is not None else "weights and gradients drive each other up",
            sites=tuple(history.names[i] for i in grown.argsort(descending=True, stable=True)[:3].tolist()),
            evidence={
                "decades": self.largest,
                "threshold": GROWTH,
                "steps": span,
                "cause": data.slug if data is not None else "feedback",
            },
            remedies=HELP if data is None else data.remedies,
        )

    def outcome(self, history: History) -> str | None:
        if math.isnan(self.largest):
            return None
        return f"no weight matrix grows exponentially (at most by {max(self.largest, 0.0):.2f} decades)"


def _spans(steps: Sequence[int]) -> list[int]:
    """Steps over which the last measurements can be looked at."""
    rare = steps[-1] - steps[-POINTS]
    known = [span for span in (WINDOW // 2, WINDOW) if rare <= span <= steps[-1] - steps[0]]
    return known or [rare]


def exponential(steps: Sequence[int], logs: Sequence[Sequence[float]], span: int) -> Tensor:
    """Decades by which each matrix has grown over the last `span` steps, if it was steady: else 0; (matrix,)."""
    points = torch.tensor(
        [_between(steps, logs, steps[-1] - span * part / 4) for part in (4, 3, 2, 1, 0)], dtype=torch.float64
    )
    growth, parts = points[-1] - points[0], points.diff(dim=0)
    steady = (parts[2] + parts[3] >= STEADY * (parts[0] + parts[1])) & (parts.amin(0) >= EACH * growth / 4)
    return torch.where(steady & growth.isfinite(), growth, 0.0)


def _between(steps: Sequence[int], logs: Sequence[Sequence[float]], step: float) -> Sequence[float]:
    """The row of a step, on the line between those that were measured before and after it."""
    after = bisect_left(steps, step)
    if steps[after] == step:
        return logs[after]
    share = (step - steps[after - 1]) / (steps[after] - steps[after - 1])
    return [a + share * (b - a) for a, b in zip(logs[after - 1], logs[after], strict=True)]
