"""SA301 saturated-units: activations work where their derivative has all but vanished.

What it means
    Most elements of a sigmoid, tanh or similar lie on its flat ends, where the derivative is below 5% of
    its largest value. Little gradient passes. Or most gates are closed: what they multiply says nothing, and the slope by
    which they could open is as small as what they let through.

Why it happens
    Pre-activations that are too large: weights or biases drawn too large, inputs that are not normalised, a constant that
    multiplies them. Gates whose biases start far below zero. A clamp to a range that the signal leaves.

Evidence
    The derivative of the activation itself, element by element; only activations that a whole segment or
    residual branch passes through count, so that a gate may close. Of bounded functions that are multiplied with another
    part of the signal, told where more than half are saturated and let less than 0.005 through; an error where residual
    branches stand behind them, and what most of these add is less than a hundredth of the stream. Where no whole skip leads
    around them, also where most gates are switches, open for some and closed for others: what passes is chosen, and the
    choice cannot change. Of tanh(f) * sigmoid(g) the tanh is the signal and the sigmoid its gate. An error where the median of three activations and more is saturated by
    half, or by nine tenths where skips lead around them; of coordinates high frequencies have to be made first. Of a softmax
    that all of the signal passes through, the mean of 1 - sum(p^2) over that of even weights: an error below 0.05. And
    a softmax over all units between two layers, where an activation was meant, which costs more than 0.8 decades.

What helps
    Smaller weights at the critical gain, standardised inputs, normalisation before the activation. Biases of gates at zero.
    A wider clamp, or none.

References
    Glorot and Bengio 2010; Rakitianskaia and Engelbrecht 2015, Measuring Saturation in Neural Networks.
"""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median

from isograd.diagnosis import Finding, Severity
from isograd.flow import Flow
from isograd.graph.operations import ACTIVATIONS
from isograd.statistics import Activation, Attention, Site
from isograd.symptoms import Healthy, Outcome, Unexamined
from isograd.symptoms.exploding_gradient import of_coordinates
from isograd.symptoms.muted_branches import HEARD
from isograd.symptoms.shrunk_output import CLIPS, leave_out

CODE = "SA301"
NAME = "saturated-units"

WARNING = 0.5
"""More than half: with fewer, the rest still carries the gradient, and depth shows in its own finding."""

ERROR = 0.5
"""Saturated share of the median activation of a chain: behind norms, which hold the signal, tanh and sigmoid learn nothing
from 0.7 on, and have lost four fifths at 0.45 (`python -m benchmarks.twins.thresholds saturated`)."""
ERROR_BESIDE_SKIPS = 0.9
"""The same where skips lead by: residual MLPs lose 5 to 15% of their lead at 0.9 and 15 to 35% at 0.98, a WaveNet more."""
WHOLE = 0.9
"""Share of the gradient that a skip lets by which leads around a gate."""
SEVERAL = 3
"""Activations one after another: what one layer makes of its input, the next can still read."""

CHOSEN = 0.05
"""Openness of a softmax that the signal passes through. A bottleneck of 8 choices of 8 loses a sixth of its lead at 0.04 and a
third at 0.01; with Gumbel noise, at temperatures of 0.1, 0.03 and 0.01, a sixth, two thirds and all of it."""

SHARED = -0.8
"""Decades that a softmax between two layers costs. One of 8, 64 and 256 units costs 0.9, 1.7 and 2.3, and two layers with it lose
0.58 to 0.61 of their lead in 150 steps of Adam at 0.004, against ReLU, and 0.1 to 0.35 at 0.016; a sigmoid, at 0.64, a fourteenth."""

SWITCHES = 0.6
"""Saturated share of the median gate. Highway networks of five blocks whose gates are drawn 10, 30 and 100 times too large, saturated
by 0.17, 0.66 and 0.9, lose a sixth of their lead, half and nearly all; chains of gated linear units at 0.46, 0.8 and 0.94 a seventh,
two thirds and all. Beside whole skips a gated unit loses an eighth at 0.94."""
CHOOSING = (0.3, 0.95)
"""rms of the gates of such a network: beyond, all are closed or open, and choose nothing."""

CLOSED = 0.005
"""rms of a gate that lets nothing through. Squeeze-and-excitation blocks whose gates start at biases of -3 and -4, 0.05 and 0.02
open, learn slowly; at -6, 0.0025 open, they learn in 150 steps of Adam no more than at -12. Open ones, at 6 and 12, are as
saturated, and learn as well as those that start half open."""


def examine(flow: Flow) -> Iterator[Outcome]:
    """Saturated share of every activation that has a largest derivative, gates that let nothing through or choose."""
    seen = [a for a in flow.activations if a.carries and ACTIVATIONS[a.function].largest_slope]
    gates = [a for a in flow.activations if a.gate and ACTIVATIONS[a.function].bounded]
    closed = [a for a in gates if a.saturated >= WARNING and a.output_rms < CLOSED]
    flat = _flat(seen, flow)
    if 2 * len(closed) > len(gates):
        yield _closed(closed, len(gates), _heard(flow))
    elif (flat is None or flat.severity < Severity.ERROR) and (switches := _switching(gates, flow)):
        yield switches
    if flattened := _flattened(flow):
        yield flattened
    if picked := [a for a in flow.choices if 0 <= a.spread < CHOSEN]:
        yield _chosen(picked)
    if not seen:
        yield Unexamined("no activation that saturates on the backbone")
    else:
        most = max(a.saturated for a in seen)
        yield flat or Healthy(
            f"at most {most:.0%} of a layer's elements are saturated ({len(seen)} activations)"
        )


def _flat(seen: list[Activation], flow: Flow) -> Finding | None:
    """Activations that the signal passes through, most of whose elements lie on their flat ends."""
    sick = [a for a in seen if a.saturated >= WARNING]
    if not sick:
        return None
    worst = max(sick, key=lambda a: a.saturated)
    middle, limit = median(a.saturated for a in seen), ERROR_BESIDE_SKIPS if _spared(flow) else ERROR
    hashed = len(seen) >= SEVERAL and middle >= limit and not of_coordinates(flow)
    return Finding(
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
        remedies=(
            *dict.fromkeys(leave_out(site) for site in pushing(flow)),
            "rescale-weights",
            "critical-initialisation",
            "standardise-input",
            "insert-normalisation",
        ),
    )


def pushing(flow: Flow) -> list[Site]:
    """Where the signal is clamped to so little that most of it is beyond, or multiplied by a constant right before it saturates."""
    sick = [a.site for a in flow.activations if a.carries and a.saturated >= WARNING]
    found = [
        site if site.operation in CLIPS else flow.sites[site.depth - 1] for site in sick if site.depth > 0
    ]
    return [site for site in found if site.operation in CLIPS or flow.factors.get(site.depth, 1.0) > 1]


def _spared(flow: Flow) -> bool:
    """Do whole skips lead around what is saturated?"""
    return any(split.skip > WHOLE for split in flow.splits.values())


def _chosen(picked: list[Attention]) -> Finding:
    worst = min(picked, key=lambda a: a.spread)
    return Finding(
        CODE,
        NAME,
        Severity.ERROR,
        f"{worst.site.name} has picked: it leaves {worst.spread:.1%} open of what even weights do, and all of the signal passes "
        "through it",
        cause="its logits are too large for the softmax, or its temperature is too low for them",
        sites=tuple(a.site.place for a in picked[:3]),
        evidence={"spread": worst.spread, "threshold": CHOSEN, "cause": "temperature"},
        remedies=(
            f"{worst.site.source or worst.site.name}: a temperature at which several weights count, 0.5 to 1 at the start",
        ),
    )


def _flattened(flow: Flow) -> Finding | None:
    """A softmax where an activation was meant: all units share a sum of 1."""
    decades = flow.column("decades")
    costly = [site for site in flow.simplices if float(decades[site.depth]) < SHARED]
    if not costly:
        return None
    site = costly[0]
    return Finding(
        CODE,
        NAME,
        Severity.ERROR,
        f"{site.name} between two layers leaves its {site.shape[-1]} units a sum of 1: it alone costs "
        f"{float(decades[site.depth]):+.1f} decades",
        cause="a softmax where an activation was meant: every unit is about 1 / width, and so is its slope",
        sites=tuple(site.place for site in costly[:3]),
        evidence={"decades": float(decades[site.depth]), "threshold": SHARED, "cause": "activation"},
        remedies=("exchange-activation",),
    )


def _heard(flow: Flow) -> float:
    """rms of what a residual branch adds over that of its stream, in the median; 1: there are none."""
    ratios = [split.forward_ratio for split in flow.splits.values()]
    return median(ratios) if ratios else 1.0


def _switching(gates: list[Activation], flow: Flow) -> Finding | None:
    """Gates that are open for some and closed for others, and nothing in between, on the only way of the signal."""
    names = {a.function for a in gates}
    behind = sum(any(step.site.operation in names for step in steps) for steps in flow.ledgers.values())
    # Inside of one segment ways may lead past most of them.
    if behind < SEVERAL or _spared(flow) or of_coordinates(flow):
        return None
    middle, size = median(a.saturated for a in gates), median(a.output_rms for a in gates)
    if middle < SWITCHES or not CHOOSING[0] < size < CHOOSING[1]:
        return None
    worst = sorted(gates, key=lambda a: -a.saturated)
    return Finding(
        CODE,
        NAME,
        Severity.ERROR,
        f"{len(gates)} gates are switches: the median is saturated by {middle:.0%}, open for some and closed for others",
        cause="what the gates are made of is too large: they choose what passes, and their slope is too small to choose otherwise",
        sites=tuple(a.site.place for a in worst[:3]),
        evidence={"saturated": middle, "threshold": SWITCHES, "gates": len(gates), "cause": "initialisation"},
        remedies=("rescale-weights", "critical-initialisation", "insert-normalisation"),
    )


def _closed(closed: list[Activation], count: int, heard: float) -> Finding:
    least = min(closed, key=lambda a: a.output_rms)
    return Finding(
        CODE,
        NAME,
        Severity.ERROR if heard < HEARD else Severity.WARNING,
        f"{len(closed)} of {count} gates are closed: {least.site.name} lets {least.output_rms:.1g} through",
        cause="what they are made of is far below zero: their branches say nothing, and their own slope is as small",
        sites=tuple(a.site.place for a in closed[:3]),
        evidence={
            "open": least.output_rms,
            "threshold": CLOSED,
            "saturated": least.saturated,
            "gates": count,
            "branch": heard,
            "cause": "closed-gates",
        },
        remedies=("zero-biases",),
    )
