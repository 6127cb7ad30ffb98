"""SA301 saturated-units: activations work where their derivative has all but vanished.

What it means
    Most elements of a sigmoid, tanh or similar lie on its flat ends, where the derivative is below 5% of
    its largest value. Little gradient passes. Or most gates are closed: what they multiply says nothing, and the slope by
    which they could open is as small as what they let through.

Why it happens
    Pre-activations that are too large: weights or biases drawn too large, inputs that are not normalised. Gates whose
    biases start far below zero.

Evidence
    The derivative of the activation itself, element by element; only activations that a whole segment or
    residual branch passes through count, so that a gate may close. Of bounded functions that are multiplied with another
    part of the signal, told where more than half are saturated and let less than 0.005 through. Of tanh(f) * sigmoid(g) the
    tanh is the signal and the sigmoid its gate. An error where the median of three activations and more is saturated by
    half, or by nine tenths where skips lead around them; of coordinates high frequencies have to be made first.

What helps
    Smaller weights at the critical gain, standardised inputs, normalisation before the activation. Biases of gates at zero.

References
    Glorot and Bengio 2010; Rakitianskaia and Engelbrecht 2015, Measuring Saturation in Neural Networks.
"""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median

from isograd.diagnosis import Finding, Severity
from isograd.flow import Flow
from isograd.graph.operations import ACTIVATIONS
from isograd.statistics import Activation
from isograd.symptoms import Healthy, Outcome, Unexamined
from isograd.symptoms.exploding_gradient import of_coordinates

CODE = "SA301"
NAME = "saturated-units"

WARNING = 0.5
"""More than half: with fewer, the rest still carries the gradient, and depth shows in its own finding."""

ERROR = 0.5
"""Saturated share of the median activation of a chain: behind norms, which hold the signal, tanh and sigmoid learn nothing
from 0.7 on, and have lost four fifths at 0.45 (`python -m benchmarks.twins.thresholds saturated`)."""
ERROR_BESIDE_SKIPS = 0.9
"""The same where skips lead by: residual MLPs lose 5 to 15% of their lead at 0.9 and 15 to 35% at 0.98, a WaveNet more."""
SEVERAL = 3
"""Activations one after another: what one layer makes of its input, the next can still read."""

CLOSED = 0.005
"""rms of a gate that lets nothing through. Squeeze-and-excitation blocks whose gates start at biases of -3 and -4, 0.05 and 0.02
open, learn slowly; at -6, 0.0025 open, they learn in 150 steps of Adam no more than at -12. Open ones, at 6 and 12, are as
saturated, and learn as well as those that start half open."""


def examine(flow: Flow) -> Iterator[Outcome]:
    """Saturated share of every activation that has a largest derivative, and gates that let nothing through."""
    gates = [a for a in flow.activations if a.gate and ACTIVATIONS[a.function].bounded]
    closed = [a for a in gates if a.saturated >= WARNING and a.output_rms < CLOSED]
    if 2 * len(closed) > len(gates):
        yield _closed(closed, len(gates))
    seen = [a for a in flow.activations if a.carries and ACTIVATIONS[a.function].largest_slope]
    if not seen:
        yield Unexamined("no activation that saturates on the backbone")
        return
    worst = max(seen, key=lambda a: a.saturated)
    if worst.saturated < WARNING:
        yield Healthy(
            f"at most {worst.saturated:.0%} of a layer's elements are saturated ({len(seen)} activations)"
        )
        return
    sick = [a for a in seen if a.saturated >= WARNING]
    middle, limit = median(a.saturated for a in seen), ERROR_BESIDE_SKIPS if flow.splits else ERROR
    hashed = len(seen) >= SEVERAL and middle >= limit and not of_coordinates(flow)
    yield Finding(
        CODE,
        NAME,
        Severity.ERROR if hashed else Severity.WARNING,
        f"{worst.saturated:.0%} of {worst.site.name} is saturated (mean derivative {worst.mean_derivative:.2g}); "
        f"{len(sick)} of {len(seen)} activations are by more than {WARNING:.0%}",
        cause="pre-activations are too large for the activation",
        sites=tuple(a.site.place for a in sick[:3]),
        evidence={
            "saturated": worst.saturated,
            "mean_derivative": worst.mean_derivative,
            "median": middle,
            "threshold": limit if hashed else WARNING,
            "cause": "initialisation",
        },
        remedies=("rescale-weights", "critical-initialisation", "standardise-input", "insert-normalisation"),
    )


def _closed(closed: list[Activation], count: int) -> Finding:
    least = min(closed, key=lambda a: a.output_rms)
    return Finding(
        CODE,
        NAME,
        Severity.WARNING,
        f"{len(closed)} of {count} gates are closed: {least.site.name} lets {least.output_rms:.1g} through",
        cause="what they are made of is far below zero: their branches say nothing, and their own slope is as small",
        sites=tuple(a.site.place for a in closed[:3]),
        evidence={
            "open": least.output_rms,
            "threshold": CLOSED,
            "saturated": least.saturated,
            "gates": count,
            "cause": "closed-gates",
        },
        remedies=("zero-biases",),
    )
