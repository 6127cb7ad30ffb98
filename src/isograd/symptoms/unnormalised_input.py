"""UP504 unnormalised-input: the model's float inputs are far from zero mean and unit scale.

What it means
    Large inputs saturate or kill the first layer, and the gradients of its weights are as many times too
    large. Inputs that are tiny, or nearly the same for every sample, are drowned by biases and rounding:
    the network cannot tell its samples apart.

Why it happens
    Pixels from 0 to 255, raw sensor or money values, years and identifiers as features, features with
    different units, a forgotten scaler or one applied twice.

Evidence
    Mean, scale and largest magnitude of every float input of the model as a whole, and how much of it
    differs between the samples. A normalisation behind one layer at most may take scale and offset away again, and
    so does arithmetic of the model's own, as x / 255 or (x - mean) / std: then what reaches the first layer counts.
    Large inputs alone are a warning; they are an error where they saturate most of the first activation. Tiny ones, and those
    that are all alike, are an error where no batch normalisation makes up for it.

What helps
    Standardise with the training set's mean and standard deviation, or put a normalisation first.

References
    LeCun et al. 1998, Efficient BackProp.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from isograd.diagnosis import Finding, Severity
from isograd.flow import ADDED, Flow
from isograd.graph.operations import ACTIVATIONS
from isograd.statistics import InputStatistics
from isograd.symptoms import Healthy, Outcome, Unexamined

CODE = "UP504"
NAME = "unnormalised-input"

WARNING = 5.0
"""Root mean square of the input: five standard deviations of a standardised one. No more than a warning:
with a thousand the first layer is all but frozen, and the others still learn from what it makes of it."""
TINY = 0.06
"""Length of what the first layer reads, its root mean square times sqrt(fan-in), beside a bias that reads 1. MLPs, CNNs,
recurrences, mixers and transformers of digits lose 0.37 to all of their lead in 140 steps, at the better of two rates, from
0.06 on down; at twice that some lose nothing. A one-hot vector, or a row of norm 1, has length 1 however wide it is."""
ALIKE = 0.05
"""Share of the input's size that differs between samples. Data 20 standard deviations away from zero, at 0.035 to 0.048,
cost 30 networks of digits and of a teacher 0.34 to all of their lead, whatever their size, 10 away 0.1 to all of it; with
batch normalisation, which takes off what is common, 7 of them lost a tenth at most, even at 40."""
DROWNED = 0.04
"""Share of the signal that differs between the samples behind what is added to it: small decoders whose positions are drawn
10, 30 and 100 times as large as their tokens learn as well at 0.1, in part at 0.032 and nothing at 0.01."""
LOUD = 0.85
"""Root mean square of the sum. Decoders of four blocks on characters lose 4% of their lead in 300 steps where positions of 0.1
stand beside tokens a tenth to a hundredth as large, 9% at 0.3 and beside sinusoids (0.71), which are few directions, 22% at 1 and 36% at 3:
what is small, Adam makes up for in few steps."""

SATURATED = 0.5
"""Share of the first activation: it passes on little but signs, and no gradient back to change that."""


def examine(flow: Flow) -> Iterator[Outcome]:
    """Scale of each float input, and how much of it differs between the samples; what drowns it before the first layer."""
    drowned = [found for line in (flow, *flow.towers) if (found := _drowned(line)) is not None]
    yield from drowned
    if not flow.inputs:
        if not drowned:
            yield Unexamined("the model as a whole was given no float input")
        return
    if _normalised(flow):
        yield Healthy("a normalisation follows the input")
        return
    size, shifted = _arriving(flow)
    for name, seen in flow.inputs.items():
        first = ("name", name) in flow.sites[0].settings
        reads = math.nan if _batched(flow) else math.sqrt(_fan_in(flow)) if first else 0.0
        if first and size < WARNING and not size * reads <= TINY and (shifted or not _alike(seen, reads)):
            yield Healthy(f"input {name} has root mean square {size:.3g} where the first layer reads it")
        else:
            yield _one(name, seen, _saturated(flow), reads)


def _drowned(flow: Flow) -> Finding | None:
    """An addition, behind one layer at most, of what is the same for all samples, beside which they hardly differ."""
    varying, rms = flow.column("varying").tolist(), flow.column("activation_rms").tolist()
    layers = flow.column("weighted").cumsum(0).tolist()
    for i, site in enumerate(flow.sites[1:], 1):
        if layers[i] > 1 or site.kind in ("normalisation", "loss"):
            return None
        added = site.kind in ("elementwise", "addition") and site.operation.strip("_") in ADDED
        if added and rms[i] > LOUD and varying[i] < min(DROWNED, varying[i - 1] / 3):
            return Finding(
                CODE,
                NAME,
                Severity.ERROR,
                f"only {varying[i]:.1g} of the signal differs between the samples behind {site.name}, where it grows to "
                f"{rms[i]:.3g}; before it {varying[i - 1]:.2g} does",
                cause="what is added there is the same for all samples, and far louder than they are",
                sites=(site.place,),
                evidence={
                    "varying": varying[i],
                    "alike_threshold": DROWNED,
                    "rms": rms[i],
                    "threshold": LOUD,
                    "cause": "embedding",
                },
                remedies=("scale-embeddings",),
            )
    return None


def _saturated(flow: Flow) -> float:
    """Saturated share of the first activation, which is given what the first layer makes of the input."""
    first = next((a for a in flow.activations if a.carries), None)
    return first.saturated if first is not None and ACTIVATIONS[first.function].bounded else 0.0


def _arriving(flow: Flow) -> tuple[float, bool]:
    """Root mean square of what arithmetic makes of the input, and whether it shifts it; NaN: a layer reads it as it is."""
    first = next(iter(flow.weighted), 0)
    between = flow.sites[1:first]
    computed = [site for site in between if site.kind == "elementwise"]
    if not computed or any(site.kind not in ("elementwise", "reshape") for site in between):
        return math.nan, False
    known = flow.column("activation_rms")[1:first]
    known = known[~known.isnan()]
    if not len(known):  # nothing of it was finite
        return math.nan, False
    return float(known[-1]), any(site.operation in ("sub", "rsub", "add") for site in computed)


def _fan_in(flow: Flow) -> float:
    """Of the first layer; NaN: there is none."""
    return flow.fan_in() or math.nan


def _batched(flow: Flow) -> bool:
    """Does a normalisation take off what the samples of a batch have in common, there or in a branch?"""
    return any("batch_norm" in n.site.operation and not n.fixed for n in flow.normalisations)


def alike(seen: InputStatistics) -> bool:
    """Do its samples hardly differ? What is the same to the last digit is no data: a grid, the graph that all samples share."""
    return 0 < seen.varying < ALIKE * seen.rms


def _alike(seen: InputStatistics, reads: float) -> bool:
    """`reads`: square root of the first layer's fan-in; 0: another one reads it, as a mask; NaN: samples are told apart behind it."""
    return alike(seen) and (reads > 0 or (reads == 0 and seen.rms > WARNING))


def _normalised(flow: Flow) -> bool:
    """Does a normalisation follow the input, with one layer at most before it, behind which samples differ?"""
    layers, varying = 0, flow.column("varying").tolist()
    for i, flag in enumerate(flow.column("weighted").tolist()):
        layers += flag == 1
        if flow.sites[i].kind == "normalisation" and layers < 2:
            return not varying[i] < ALIKE
    return False


def _one(name: str, seen: InputStatistics, saturated: float, reads: float) -> Outcome:
    said = f"input {name} has mean {seen.mean:.3g}, root mean square {seen.rms:.3g} and largest {seen.largest:.3g}"
    if not math.isfinite(seen.rms):
        return Unexamined(f"input {name} holds values that are not finite")
    same = _alike(seen, reads)
    tiny = 0 < seen.rms * reads < TINY
    if seen.rms < WARNING and not tiny and not same:
        return Healthy(said)
    if same:
        said += f"; only {seen.varying / seen.rms:.1g} of it differs between samples"
    if saturated > SATURATED:
        said += f"; {saturated:.0%} of the first activation is saturated"
    return Finding(
        CODE,
        NAME,
        Severity.ERROR if same or tiny or saturated > SATURATED else Severity.WARNING,
        said,
        cause="the data are not standardised",
        sites=(name,),
        evidence={
            "mean": seen.mean,
            "rms": seen.rms,
            "std": seen.std,
            "varying": seen.varying,
            "read": seen.rms * reads,
            "threshold": TINY if tiny else WARNING,
            "alike_threshold": ALIKE,
            "saturated": saturated,
            "saturated_threshold": SATURATED,
            "cause": "unnormalised-input",
        },
        remedies=("standardise-input", "insert-normalisation"),
    )
