"""SA301 saturated-units: activations work where their derivative has all but vanished.

What it means
    Most elements of a sigmoid, tanh or similar lie on its flat ends, where the derivative is below 5% of
    its largest value. Little gradient passes.

Why it happens
    Pre-activations that are too large: weights or biases drawn too large, inputs that are not normalised.

Evidence
    The derivative of the activation itself, element by element; only activations that a whole segment or
    residual branch passes through count, so that a gate may close.

What helps
    Smaller weights at the critical gain, standardised inputs, normalisation before the activation.

References
    Glorot and Bengio 2010; Rakitianskaia and Engelbrecht 2015, Measuring Saturation in Neural Networks.
"""

from __future__ import annotations

from collections.abc import Iterator

from isograd.diagnosis import Finding, Severity
from isograd.flow import Flow
from isograd.graph.operations import ACTIVATIONS
from isograd.symptoms import Healthy, Outcome, Unexamined

CODE = "SA301"
NAME = "saturated-units"

WARNING = 0.5
"""More than half: with fewer, the rest still carries the gradient, and depth shows in its own finding."""


def examine(flow: Flow) -> Iterator[Outcome]:
    """Saturated share of every activation that has a largest derivative."""
    seen = [a for a in flow.activations if a.bottleneck and ACTIVATIONS[a.function].largest_slope]
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
    yield Finding(
        CODE,
        NAME,
        Severity.WARNING,
        f"{worst.saturated:.0%} of {worst.site.name} is saturated (mean derivative {worst.mean_derivative:.2g}); "
        f"{len(sick)} of {len(seen)} activations are by more than {WARNING:.0%}",
        cause="pre-activations are too large for the activation",
        sites=tuple(a.site.place for a in sick[:3]),
        evidence={
            "saturated": worst.saturated,
            "mean_derivative": worst.mean_derivative,
            "threshold": WARNING,
        },
        remedies=("critical-initialisation", "standardise-input", "insert-normalisation"),
    )
