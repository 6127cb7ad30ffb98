"""UP508 growing-weights: weights grow exponentially, and do not slow down.

What it means
    A weight matrix grows by the same factor step after step. Signals and gradients grow with the product of such
    factors, so that it ends in a spike or in values that are not finite.

Why it happens
    A feedback between weights and gradients beyond the edge of stability, a learning rate that is too high, no
    weight decay where a scale is free to grow, decay with the wrong sign.

Evidence
    The logarithm of each matrix's norm over 64 steps, or over 32 where it goes faster: it has risen by half and
    more, in each quarter of that time, and in the second half as much as in the first. Healthy weights grow too, but ever more slowly.

What helps
    Weight decay, a lower learning rate, normalisation, gradient clipping.

References
    Merrill et al. 2021, Effects of Parameter Norm Growth; Wortsman et al. 2023, Small-scale Proxies for Instabilities.
"""

from __future__ import annotations

import math
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
READINGS = 2
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

    unexamined = f"needs weight norms over {SETTLED} steps"

    def examine(self, history: History) -> Finding | None:
        rows = history.weights
        if history.count <= SETTLED or len(rows) <= WINDOW or history.count % EVERY:
            return None
        grown = torch.maximum(exponential(rows, WINDOW // 2), exponential(rows, WINDOW))  # (matrix,)
        if not len(grown):
            return None
        self.largest = float(grown.max())
        if not self.holds(self.largest >= GROWTH, READINGS):
            return None
        data = given(history)
        return Finding(
            CODE,
            NAME,
            Severity.WARNING,
            f"{history.names[int(grown.argmax())]} has grown {10**self.largest:.2g} times within {WINDOW} steps, and does not slow down",
            cause=data.words if data is not None else "weights and gradients drive each other up",
            sites=tuple(history.names[i] for i in grown.argsort(descending=True, stable=True)[:3].tolist()),
            evidence={
                "decades": self.largest,
                "threshold": GROWTH,
                "steps": WINDOW,
                "cause": data.slug if data is not None else "feedback",
            },
            remedies=HELP if data is None else data.remedies,
        )

    def outcome(self, history: History) -> str | None:
        if math.isnan(self.largest):
            return None
        return f"no weight matrix grows exponentially (at most {max(self.largest, 0.0):.2f} decades in {WINDOW} steps)"


def exponential(logs: Sequence[Sequence[float]], span: int) -> Tensor:
    """Decades by which each matrix has grown over the last `span` rows, if it was steady: else 0; (matrix,)."""
    points = torch.tensor([logs[-1 - span * part // 4] for part in (4, 3, 2, 1, 0)], dtype=torch.float64)
    growth, parts = points[-1] - points[0], points.diff(dim=0)
    steady = (parts[2] + parts[3] >= STEADY * (parts[0] + parts[1])) & (parts.amin(0) >= EACH * growth / 4)
    return torch.where(steady & growth.isfinite(), growth, 0.0)
