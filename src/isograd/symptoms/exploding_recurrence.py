"""RN602 exploding-recurrence: the gradient grows from step to step on its way back in time.

What it means
    The gradient of the weights is a sum over time, and the earliest steps, amplified step by step, are all
    of it. Its size changes from batch to batch by orders of magnitude: the loss spikes, then comes NaN.

Why it happens
    The recurrent matrix has eigenvalues outside of the unit circle, and no saturation or gate holds them:
    weights drawn too large, or an RNN with ReLU whose matrix is not orthogonal. A recurrence that grows so
    is chaotic too: a change of the last digit at the first step changes all of the output.

Evidence
    The gradient of the last output step at the input of every step before, from a backward that does not
    overflow. Factor per step, to the power of the steps, or what the first step receives, makes more than
    1.2 decades: less than what stops a deep network (EG201), because every step adds to the same weights. Where sequences are packed or read in both directions a lag
    is no single way, and the curve may be flat; a kernel that as a whole multiplies the gradient by more than that,
    and by what a step adds to a step where none is lost, explodes all the same.

What helps
    An orthogonal recurrent matrix, or one of spectral radius 1; gates; gradient clipping as a stopgap; a
    shorter stretch of truncated backpropagation.

References
    Pascanu et al. 2013, On the difficulty of training recurrent neural networks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from isograd.diagnosis import Finding, Severity
from isograd.flow import Flow
from isograd.horizon import Horizon
from isograd.symptoms import Healthy, Outcome, Unexamined, unmeasured_in_time

CODE = "RN602"
NAME = "exploding-recurrence"

ERROR = 1.2
"""Decades of growth over the sequence. Of RNNs, LSTMs and GRUs over 16 to 200 steps whose gradient grows by up to 0.7 most
train as well or nearly so; from 1.3 they lose a fifth of their lead to all of it; healthy models of the zoo grow by 0.3 at most
(`python -m benchmarks.twins.thresholds recurrence`)."""
FUSED = 2.7
"""Decades by which a kernel as a whole may multiply the gradient, as along depth: its steps are not seen."""


def examine(flow: Flow) -> Iterator[Outcome]:
    """The growth along time, where something recurs in the model."""
    told = list(judge(flow.horizon)) if flow.horizon is not None else [unmeasured_in_time(flow)]
    yield from told if any(isinstance(o, Finding) for o in told) else _kernels(flow) or told


def _kernels(flow: Flow) -> list[Outcome]:
    """Fused kernels whose gain is more than a sum over their steps can make."""
    found: list[Outcome] = []
    for site, decades in zip(flow.sites, flow.column("decades").tolist(), strict=True):
        limit = FUSED + 0.5 * math.log10(max(site.shape, default=1))
        kind = "RNN" if "rnn" in site.operation else site.operation.upper()
        if site.kind == "recurrent" and "cell" not in site.operation and decades > limit:
            found.append(
                Finding(
                    CODE,
                    NAME,
                    Severity.ERROR,
                    f"{site.name} as a whole multiplies the gradient by {decades:+.1f} decades (an error from {limit:+.1f})",
                    sites=(site.place,),
                    evidence={"decades": decades, "threshold": limit},
                    remedies=_helping({kind}),
                )
            )
    return found


def judge(found: Horizon) -> Iterator[Outcome]:
    """What the factor per step makes of the gradient over the sequence."""
    if math.isnan(found.factor):
        yield Unexamined("no gradient at two steps or more")
        return
    grown = growth(found)
    said = f"{found.factor:.3g} per step, {grown:+.1f} decades over {found.at} steps"
    if grown < ERROR:
        yield Healthy(f"{said} (an error from {ERROR:+.1f})")
        return
    yield Finding(
        CODE,
        NAME,
        Severity.ERROR,
        f"the gradient grows by {said}",
        sites=tuple(
            f"{r.name} (spectral radius {r.radius:.3g}, norm {r.norm:.3g})" for r in found.recurrences
        )
        or (found.source,),
        evidence={
            "factor": found.factor,
            "factor_error": found.factor_error,
            "decades": grown,
            "length": found.at + 1,
            "threshold": ERROR,
            "probes": found.probes,
        },
        remedies=_helping({r.kind for r in found.recurrences}),
    )


def _helping(kinds: set[str]) -> tuple[str, ...]:
    """Remedies for these kinds of recurrence: what has gates cannot be given any."""
    gated = kinds and not kinds & {"RNN", "loop"}
    drawn = ("recurrent-initialisation",) if gated else ("orthogonal-recurrence", "gated-recurrence")
    return (*drawn, "clip-gradients")


def growth(found: Horizon) -> float:
    """Decades by which the gradient grows over the sequence.

    The curve itself has to be high: a bump in the middle of a short one is no growth, and one that levels off once
    saturation holds the state, as where chaos has spread to all units, is one if it ends high.
    """
    steady = math.log10(found.factor) * found.at if found.factor > 0 else -math.inf
    return min(max(steady, found.decades), float(found.curve.max()) - found.reference)
