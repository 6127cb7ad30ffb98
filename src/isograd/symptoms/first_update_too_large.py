"""UP502 first-update-too-large: the optimizer's first step goes far beyond where the gradient holds.

What it means
    The gradient's flow may be well, and training still fails in its first steps: the loss jumps, and the
    weights land where gradients vanish or explode.

Why it happens
    Adam's first step has the size of the learning rate for every weight, however small its gradient. The
    steps of all layers add up in the output: in a deep post-norm transformer, whose sublayers all act on
    the normalised stream, by about the number of sublayers. That is why it needs warm-up.

Evidence
    The relative first update of each layer, rms(update) over rms(weight) under the optimizer's rule, times
    the share of the stream that this layer writes, summed over the layers: by how much of itself the
    output changes when all layers move at once, to first order. In a pre-norm network the shares fall
    with depth as the stream grows; in a post-norm network they do not. And the largest update of a weight
    matrix over its weights.

What helps
    Warm-up, a lower learning rate, pre-norm in place of post-norm, DeepNorm or Admin initialisation.

References
    Liu et al. 2020, Understanding the Difficulty of Training Transformers; Xiong et al. 2020.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from statistics import median

from isograd.diagnosis import Finding, Severity
from isograd.flow import Flow
from isograd.symptoms import Healthy, Outcome, Unexamined

CODE = "UP502"
NAME = "first-update-too-large"

OUTPUT = 0.5
"""Relative change of the output: beyond a half the step replaces what the network computes, and no gradient
taken before it tells anything about the loss after it."""
RATIO = 0.5
"""rms(update) / rms(weight): half of a weight matrix replaced in one step."""


def examine(flow: Flow) -> Iterator[Outcome]:
    """Change of the output when all layers move at once, and the largest update of a weight matrix."""
    matrices = [p for p in flow.parameters if len(p.shape) > 1 and not math.isnan(p.first_update)]
    if not matrices:
        yield Unexamined("needs the optimizer: check(model, loss, optimizer=…) or --optimizer adamw:1e-3")
        return
    largest = max(matrices, key=lambda p: p.first_update)
    change = sum(_share(flow, depth) * update for depth, update in _updates(flow).items())
    if change < OUTPUT and largest.first_update < RATIO:
        yield Healthy(
            f"the first step changes the output by about {change:.2g} of itself, {largest.name} by {largest.first_update:.2g}"
        )
        return
    yield Finding(
        CODE,
        NAME,
        Severity.WARNING,
        f"the first step changes the output by about {change:.2g} times itself ({flow.layers} layers move at once), "
        f"and {largest.name} by {largest.first_update:.2g} of its size",
        cause="the learning rate is too large for the first steps: what all layers change adds up",
        sites=tuple(p.name for p in sorted(matrices, key=lambda p: -p.first_update)[:3]),
        evidence={
            "output_change": change,
            "threshold": OUTPUT,
            "largest_ratio": largest.first_update,
            "ratio_threshold": RATIO,
        },
        remedies=("warm-up", "lower-learning-rate", "pre-norm"),
    )


def _updates(flow: Flow) -> dict[int, float]:
    """Median relative update of the weight matrices of each layer, by its depth on the backbone."""
    found: dict[int, list[float]] = {}
    for p in flow.parameters:
        if len(p.shape) > 1 and not math.isnan(p.first_update) and not math.isnan(p.depth):
            found.setdefault(int(p.depth), []).append(p.first_update)
    weighted = flow.column("weighted")
    return {depth: median(sizes) for depth, sizes in found.items() if weighted[depth] == 1}


def _share(flow: Flow, depth: int) -> float:
    """Share of the stream that the layer at this depth writes: 1 without a skip connection."""
    split = flow.splits.get(depth)
    if split is None or math.isnan(split.forward_ratio):
        return 1.0
    return split.forward_ratio / math.hypot(1.0, split.forward_ratio)
