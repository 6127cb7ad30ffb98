"""UP502 first-update-too-large: the optimizer's first step goes far beyond where the gradient holds.

What it means
    The gradient's flow may be well, and training still fails in its first steps: the loss jumps, and the
    weights land where gradients vanish or explode.

Why it happens
    Adam's first step has the size of the learning rate for every weight, however small its gradient. The
    steps of all layers add up in the output: in a deep post-norm transformer, whose sublayers all act on
    the normalised stream, by about the number of sublayers. That is why it needs warm-up.

Evidence
    The decrease of the loss that its gradient promises for the first step, sum of gradient times update,
    over the loss itself. A promise of more than the whole loss cannot be kept; and the largest update of a
    weight matrix over its weights.

What helps
    Warm-up, a lower learning rate, pre-norm in place of post-norm, DeepNorm or Admin initialisation.

References
    Liu et al. 2020, Understanding the Difficulty of Training Transformers; Xiong et al. 2020.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from isograd.diagnosis import Finding, Severity
from isograd.flow import Flow
from isograd.symptoms import Healthy, Outcome, Unexamined

CODE = "UP502"
NAME = "first-update-too-large"

PROMISE = 3.0
"""Promised decrease over the loss. Two is exact for the largest stable step on a quadratic; beyond, the
step leaves the region where the gradient tells anything."""
RATIO = 0.5
"""rms(update) / rms(weight): half of a weight matrix replaced in one step."""


def examine(flow: Flow) -> Iterator[Outcome]:
    """Promised decrease, and the largest update of a weight matrix."""
    if math.isnan(flow.first_step):
        yield Unexamined("needs the optimizer: check(model, loss, optimizer=…) or --optimizer adamw:1e-3")
        return
    matrices = [p for p in flow.parameters if len(p.shape) > 1 and not math.isnan(p.first_update)]
    largest = max(matrices, key=lambda p: p.first_update, default=None)
    ratio = largest.first_update if largest is not None else 0.0
    if flow.first_step < PROMISE and ratio < RATIO:
        yield Healthy(
            f"the first step promises {flow.first_step:.2g} of the loss, updates up to {ratio:.2g} of a weight matrix"
        )
        return
    yield Finding(
        CODE,
        NAME,
        Severity.WARNING,
        f"the first step promises to lower the loss by {flow.first_step:.2g} times itself, and changes "
        f"{largest.name if largest is not None else 'the weights'} by {ratio:.2g} of its size",
        cause="the learning rate is too large for the first step: all layers move at once",
        sites=tuple(p.name for p in sorted(matrices, key=lambda p: -p.first_update)[:3]),
        evidence={
            "promise": flow.first_step,
            "threshold": PROMISE,
            "largest_ratio": ratio,
            "ratio_threshold": RATIO,
        },
        remedies=("warm-up", "lower-learning-rate"),
    )
