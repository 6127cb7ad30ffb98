"""Why a training breaks: what its readings say of inputs, initialisation, weights and learning rate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from isograd.monitor.history import WINDOW, History, early, late
from isograd.monitor.seen import finite

INPUT = 1.0
"""Decades: inputs of rms 10 and more at the first layer are not normalised."""
INPUT_GROWTH = 0.7
"""Decades by which the inputs have grown since the start: other data than the training began with."""
SPAN = 1.5
"""Decades between the signals, or the sensitivities, of the layers at the first step: a factor of 30 that the
initialisation has put there."""
WEIGHT_GROWTH = 0.3
"""Decades: weights that are twice as large as they were in the window before."""
LARGE = -1.5
"""log10 update over weight: three percent a step, where healthy trainings settle at a tenth of that."""
FASTER = 0.3
"""Decades by which the updates have grown within 16 steps."""
FAST = -1.0
"""log10 update over weight: a tenth a step doubles weights within ten, and is the cause of their growth."""


@dataclass(frozen=True)
class Cause:
    """A cause in words, its slug, and what helps."""

    words: str
    slug: str
    remedies: tuple[str, ...]


def origin(history: History) -> Cause:
    """The most upstream thing that is out of order; it was read off the run, not tested by intervention."""
    data = given(history)
    if data is not None:
        return data
    forward, backward = (_along(history.first.get(name, [])) for name in ("scale", "elasticity"))
    if max(forward, backward) >= SPAN and history.count <= 64:
        words = (
            f"at the first step the layers' signals lie {forward:.1f} decades apart and their sensitivities "
            f"{backward:.1f}: the weights were drawn too large"
        )
        return Cause(words, "initialisation", ("critical-initialisation", "insert-normalisation"))
    grown, name = _growth(history)
    if grown >= WEIGHT_GROWTH and max(history.typical_updates, default=FAST) < FAST:
        words = f"{name} has grown {10**grown:.3g} times within {len(history.weights) - 1} steps"
        return Cause(words, "weight-growth", ("lower-learning-rate", "reduce weight growth: weight decay"))
    updates = finite(history.typical_updates)
    if updates and (max(updates) >= LARGE or updates[-1] - updates[0] >= FASTER):
        words = f"the steps are too large for the curvature, {10 ** max(updates):.2g} of the weights: the learning rate"
        return Cause(words, "learning-rate", ("lower-learning-rate", "warm-up", "clip-gradients"))
    words = "not told by the run: inputs, weights and the size of the steps were as before; look at the batch"
    return Cause(words, "unclear", ("clip-gradients", "lower-learning-rate"))


def given(history: History) -> Cause | None:
    """What is out of order with the data; None: nothing."""
    start = _first(history.first.get("scale", []))
    now = _first([_median(column) for column in zip(*history.scales[-3:], strict=True)])
    if now - start >= INPUT_GROWTH:
        words = f"the first layer now gets inputs of rms {10**now:.3g}, at the start {10**start:.3g}"
        return Cause(words, "input-change", ("standardise-input", "clip-gradients"))
    if start >= INPUT:
        words = f"the first layer gets inputs of rms {10**start:.3g}: they are not normalised"
        return Cause(words, "unnormalised-input", ("standardise-input",))
    if history.jump and history.count - history.jump[0] <= WINDOW:
        _, before, after, explained = history.jump
        words = (
            f"the loss went from {before:.2g} to {after:.2g} in one step, which explains {explained:.1g} of it at most: "
            "what the network was given has changed"
        )
        return Cause(words, "data", ("shuffle the data", "look at the batch", "clip-gradients"))
    return None


def _first(values: Sequence[float]) -> float:
    return next(iter(finite(values)), math.nan)


def _along(values: Sequence[float]) -> float:
    """Decades between the early and the late layers."""
    difference = abs(late(values) - early(values))
    return difference if math.isfinite(difference) else 0.0


def _growth(history: History) -> tuple[float, str]:
    if len(history.weights) < 2:
        return 0.0, ""
    pairs = zip(history.weights[-1], history.weights[0], history.names, strict=True)
    return max(
        ((now - then, name) for now, then, name in pairs if math.isfinite(now - then)), default=(0.0, "")
    )


def _median(values: Sequence[float]) -> float:
    known = finite(values)
    return median(known) if known else math.nan
