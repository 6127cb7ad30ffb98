"""Why a training breaks: what its readings say of inputs, initialisation, weights and learning rate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from isograd.monitor.history import MOMENTUM, RECENT, START, WINDOW, History, early, late
from isograd.monitor.seen import finite, sibling

INPUT = 1.0
"""Decades: inputs of rms 10 and more at the first layer are not normalised."""
INPUT_GROWTH = 0.7
"""Decades by which the inputs have grown since the start, and within the window: other data than the training began with."""
ONE = 1.0
"""Decades by which the inputs of one batch lie above those of each of the others in the window."""
SPAN = 1.5
"""Decades by which the signals grow along the layers, or the sensitivities on their way back, at the first step: a factor
of 30 that the initialisation has put there."""
WEIGHT_GROWTH = 0.3
"""Decades: weights that are twice as large as they were in the window before."""
SHRUNK = -0.5
"""Decades: a third of the size that the weights were drawn with, by which each layer then passes less on."""
LARGE = -1.5
"""log10 update over weight: three percent a step, where healthy trainings settle at a tenth of that."""
FASTER = 0.3
"""Decades by which the updates have grown within RECENT steps."""
RAISED = 3.0
"""Times the highest learning rate that a run had before the window: a warm-up that goes on is no such rise, nor a restart."""
RISING = 1.5
"""Times what it was half a window ago: what has been trained at since is not the cause."""
FAST = -1.0
"""log10 update over weight: a tenth a step doubles weights within ten, and is the cause of their growth."""
JOINED = 0.25
"""Share of the parameters that have been trained for less than a window: another training than the one before."""
SLOW = -3.7
"""log10 update over weight: 2e-4, where healthy trainings from scratch reach 1e-3 and more."""
LEAPS = 3
"""Steps of a fifth of the weights at the start of a training: one of them a bold recipe may have."""
FASTER_STEPS = "raise the learning rate: sweep it upwards by factors of 3 until the loss no longer falls"


@dataclass(frozen=True)
class Cause:
    """A cause in words, its slug, and what helps."""

    words: str
    slug: str
    remedies: tuple[str, ...]


UNCLEARED = Cause(
    "gradients are not cleared between the steps, and add up: optimizer.zero_grad() is missing",
    "uncleared-gradient",
    ("call optimizer.zero_grad() once a step, before the backward or after the step",),
)

NO_GRADIENT = Cause(
    "no parameter has got a gradient: the optimizer holds others than the loss is computed from, such as those of a model "
    "that was copied or built again, or all are detached or frozen",
    "no-gradient",
    ("make the optimizer over the parameters of the very model that computes the loss",),
)
CLEARED = Cause(
    "the gradients are cleared between the backward and the step: zero_grad() stands before optimizer.step()",
    "cleared",
    ("call optimizer.zero_grad() before the backward or after optimizer.step()",),
)
NO_RATE = Cause(
    "each learning rate is zero",
    "low-learning-rate",
    ("set a learning rate above zero: look at the schedule, and at when its step() is called",),
)
LOW = Cause("the learning rate is too low", "low-learning-rate", (FASTER_STEPS,))


def origin(history: History) -> Cause:
    """The most upstream thing that is out of order; it was read off the run, not tested by intervention."""
    if history.uncleared > 1:
        return UNCLEARED
    data = written(history) or given(history)
    if data is not None:
        return data
    # The signal grows forward and the sensitivity backward; where they shrink, nothing was drawn too large.
    forward = _along(history.along(history.first.get("scale", [])))
    backward = -_along(history.along(history.first.get("elasticity", [])))
    if max(forward, backward) >= SPAN and history.count <= 64:
        words = (
            f"at the first step the layers' signals grow by {max(forward, 0.0):.1f} decades and their sensitivities, on the "
            f"way back, by {max(backward, 0.0):.1f}: the weights were drawn too large"
        )
        return Cause(words, "initialisation", ("critical-initialisation", "insert-normalisation"))
    higher = raised(history)
    if higher is not None:
        return higher
    joined = _joined(history)
    if joined is not None:
        return joined
    recent = [i for i, step in enumerate(history.measured) if step > history.step - RECENT]
    updates = finite(history.typical_updates[i] for i in recent)
    grown, name, steps = _growth(history)
    if (
        not updates and steps and grown / steps >= math.log10(1 + 10**FAST)
    ):  # it has moved by as much at least
        words = f"{name} has grown {10**grown:.3g} times within {steps} steps: these are too large, and so is the learning rate"
        return Cause(words, "learning-rate", ("lower-learning-rate", "warm-up", "clip-gradients"))
    if grown >= WEIGHT_GROWTH and max(updates, default=-math.inf) < FAST:
        words = f"{name} has grown {10**grown:.3g} times within {steps} steps"
        return Cause(words, "weight-growth", ("lower-learning-rate", "reduce weight growth: weight decay"))
    faster = len(updates) > 1 and updates[-1] - updates[0] >= FASTER and not _steady(history)
    if faster or max(updates, default=-math.inf) >= LARGE:
        words = f"the steps are too large for the curvature, {10 ** max(updates):.2g} times the norm of the weights: the learning rate"
        return Cause(words, "learning-rate", ("lower-learning-rate", "warm-up", "clip-gradients"))
    thrown = replaced(history)
    if thrown is not None:
        return thrown
    rated = bool(history.rates and history.rates[-1])
    what = (
        "inputs, weights and the size of the steps"
        if updates
        else "inputs and learning rate"
        if rated
        else "inputs"
    )
    words = (
        f"not told by the run: {what} were as before; look at the batch, and at what the loss passes through that this "
        "optimizer does not train"
    )
    return Cause(words, "unclear", ("clip-gradients", "lower-learning-rate"))


def written(history: History) -> Cause | None:
    """Has something else than the optimizer written to a weight within the window?"""
    if not history.written or history.count - history.written[0] > WINDOW:
        return None
    _, name, before, after, most = history.written
    words = (
        f"the norm of {name} went from {before:.3g} to {after:.3g}, of which the optimizer's steps explain {most:.1g} at most: "
        "something else wrote to it"
    )
    return Cause(
        words, "written-weight", ("look at what loads, clips or draws weights while the model trains",)
    )


def given(history: History) -> Cause | None:
    """What is out of order with the data; None: nothing."""
    return (None if _cancelling(history) else _inputs(history)) or _jumped(history)


def _cancelling(history: History) -> bool:
    """Do the errors of the samples cancel in the biases, as in the loss of a critic, which is a difference? Then the
    last layer too seems to be fed with more than the first, or its bias gets next to nothing, and no scale is one."""
    scales = history.first.get("scale", [])
    if not scales or len(scales) != len(history.names):
        return False
    last = scales[-1]
    return last > scales[0] + INPUT_GROWTH or (
        math.isnan(last) and sibling(history.names[-1]) in history.sites
    )


def _inputs(history: History) -> Cause | None:
    start = next(iter(history.first.get("scale", [])), math.nan)
    now, before = _median(history.scales[-3:]), _median(history.scales[:3])
    if now - max(start, before) >= INPUT_GROWTH:
        words = f"the first layer now gets inputs of rms {10**now:.3g}, at the start {10**start:.3g}"
        return Cause(words, "input-change", ("standardise-input", "clip-gradients"))
    first = [row[0] for row in history.scales if row and math.isfinite(row[0])]
    if len(first) > RECENT:
        *others, largest = sorted(first)
        if largest - others[-1] >= ONE:
            words = f"the first layer got inputs of rms {10**largest:.3g} in one batch, in all others {10 ** others[-1]:.3g} at most"
            return Cause(words, "data", ("look at the batch", "standardise-input", "clip-gradients"))
    if start >= INPUT:
        words = f"the first layer gets inputs of rms {10**start:.3g}: they are not normalised"
        return Cause(words, "unnormalised-input", ("standardise-input",))
    return None


def _jumped(history: History) -> Cause | None:
    if history.jump and history.count - history.jump[0] <= WINDOW and math.isnan(_raised(history)[0]):
        _, before, after, explained, once = history.jump
        words = (
            f"the loss went from {before:.2g} to {after:.2g} in one step, which explains {explained:.1g} of it at most: "
            f"{'one batch was unlike the others' if once else 'what the network was given has changed, or the loss itself, as by new targets, or the weights, by something else than the optimizer'}"
        )
        return Cause(words, "data", ("shuffle the data", "look at the batch", "clip-gradients"))
    return None


def brought(history: History) -> float:
    """log10 of the gradient norm that came with other data within the last window, as with targets that are computed
    anew: what rises no further has not grown. -inf: none came. Of the first readings after the jump."""
    since = history.count - history.jump[0] + 1 if history.jump else math.inf
    if since > WINDOW or history.jump[-1] or math.isfinite(_raised(history)[0]):
        return -math.inf
    return median(history.norms[-int(since) :][:START])


def shrunk(history: History) -> Cause | None:
    """Have the weights shrunk since the first step? With them what passes through all of them, forward and back."""
    pairs = zip(*history.weights[-1:], history.first.get("weight", []), strict=False)
    change = finite(now - first for now, first in pairs)
    if not change or median(change) > SHRUNK:
        return None
    words = f"the typical weight matrix has shrunk to {10 ** median(change):.2g} of what it was: weight decay pulls harder than the gradient"
    return Cause(words, "weight-decay", ("lower the weight decay",))


def still(history: History) -> Cause | None:
    """Why nothing can move; None: something may."""
    seen = history.now
    assert seen is not None
    if seen.missing == len(seen.sites):
        return NO_GRADIENT
    if history.passed and max(history.passed) == -math.inf:
        return CLEARED
    return NO_RATE if seen.rates and not any(seen.rates) else None


def faded(history: History) -> Cause | None:
    """Has the learning rate been next to nothing for as long as it had not been? The tail of a schedule never lasts so long."""
    if 2 * history.faint < history.count or not history.faint:
        return None
    words = (
        f"the learning rate has gone from {history.fastest:.2g} to {max(history.rates[-1]):.2g}, and for {history.faint} of "
        f"{history.count} steps it was below a thousandth of what it had been: its schedule is over long before the training"
    )
    return Cause(
        words,
        "schedule",
        ("look at the schedule: is its step() called once a batch, where it counts epochs?",),
    )


def clipped(history: History) -> Cause | None:
    """Would the steps be large enough without what clipping takes? Those of an optimizer that divides by the gradient are as
    large with it."""
    if not history.passed or not history.length:
        return None
    left = median(history.passed)
    _, length, norm, rate = history.length
    if left == -math.inf or not history.pace - left > SLOW or not rate > 0:
        return None
    if length - math.log10(rate) > norm + left + MOMENTUM:
        return None
    words = f"clipping leaves {10**left:.1g} of the gradient: without it no step would be too small"
    return Cause(
        words,
        "clipping",
        (
            "clip to a norm that most steps do not reach",
            "with a GradScaler: call scaler.unscale_(optimizer) before clipping, or what is clipped is scaled",
        ),
    )


def silenced(history: History) -> Cause | None:
    """Do half of the matrices get a gradient of exactly zero?"""
    arrives = [grad for grad in history.grads[-1] if not math.isnan(grad)] if history.grads else []
    silent = arrives.count(-math.inf)
    if not silent or 2 * silent < len(arrives):
        return None
    words = (
        f"{silent} of {len(arrives)} weight matrices get a gradient of exactly zero: what they feed is dead"
    )
    return Cause(words, "zero-gradient", ("zero-biases", "leaky-activation"))


def slow(history: History) -> Cause | None:
    """Has no step been as large as those of a training that gets on?"""
    if not -math.inf < history.pace <= SLOW:
        return None
    if cause := silenced(history) or clipped(history):
        return cause
    words = (
        f"no step changed the typical weight matrix by more than {10**history.pace:.1g} of itself, where trainings from scratch reach "
        "1e-3: the learning rate is too low, or next to no gradient arrives"
    )
    return Cause(words, "small-steps", (FASTER_STEPS,))


def replaced(history: History) -> Cause | None:
    """Did the first steps replace the weights? What follows starts from wherever that led to."""
    if history.leaps < LEAPS:
        return None
    words = (
        f"{history.leaps} of the first steps changed the typical weight matrix by a fifth of itself and more: little is left "
        "of the weights as they were drawn; the learning rate"
    )
    return Cause(words, "learning-rate", ("lower-learning-rate", "warm-up", "clip-gradients"))


def raised(history: History) -> Cause | None:
    """Has a learning rate risen beyond all that it had been, within the window?"""
    before, high, now = _raised(history)
    if not high > before:
        return None
    back = f", and is {now:.2g} now" if high >= RISING * now else ""
    words = f"the learning rate has gone from {before:.2g} to {high:.2g}{back}"
    return Cause(words, "learning-rate", ("lower-learning-rate", "warm-up", "clip-gradients"))


def _joined(history: History) -> Cause | None:
    """Have many parameters been trained for a short time only?"""
    if not history.joined or history.step - history.joined[0] > WINDOW:
        return None
    step, count, first = history.joined
    if count < JOINED * len(history.sites):
        return None
    words = (
        f"{count} of {len(history.sites)} parameters, {first} first, have been trained since step {step} only: what was "
        "unfrozen or added moves too fast for the rest"
    )
    return Cause(words, "unfrozen", ("lower-learning-rate", "warm-up", "clip-gradients"))


def _raised(history: History) -> tuple[float, float, float]:
    """A learning rate before and after it rose beyond all that it had been, and what it is now; nan: none did.

    One step is enough to throw a training, which is told when the rate is back.
    """
    rates = history.rates
    if len(rates) > 1:
        then, *since = rates[-WINDOW // 2 :]
        for before, was, *rose in zip(history.highest or rates[0], then, *since, strict=True):
            if before > 0 and max(rose) >= max(RAISED * before, RISING * was):
                return before, max(rose), rose[-1]
    return math.nan, math.nan, math.nan


def _along(values: Sequence[float]) -> float:
    """Decades from the early to the late layers; 0: not known."""
    difference = late(values) - early(values)
    return difference if math.isfinite(difference) else 0.0


def _steady(history: History) -> bool:
    """Was no learning rate higher in the whole window than at its start?"""
    rates = history.rates
    return len(rates) > WINDOW and bool(rates[0]) and list(map(max, *rates)) == rates[0]


def _growth(history: History) -> tuple[float, str, int]:
    """Decades by which a weight has grown over the window, the weight, and the steps in it."""
    if len(history.weights) < 2:
        return 0.0, "", 0
    since = next(i for i, step in enumerate(history.weighed) if step >= history.weighed[-1] - WINDOW)
    pairs = zip(history.weights[-1], history.weights[since], history.names, strict=True)
    grown, name = max(
        ((now - then, name) for now, then, name in pairs if math.isfinite(now - then)), default=(0.0, "")
    )
    return grown, name, history.weighed[-1] - history.weighed[since]


def _median(rows: Sequence[Sequence[float]]) -> float:
    """Of the first layer; nan: not known."""
    known = finite(row[0] for row in rows if row)
    return median(known) if known else math.nan
