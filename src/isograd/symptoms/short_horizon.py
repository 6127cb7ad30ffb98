"""RN601 short-horizon: the gradient reaches less far back in time than the sequence is long.

What it means
    What happened earlier than the horizon receives less than 1% of the gradient of the last step. The
    model cannot learn from it, however long it trains; whether it has to is known to the task alone.

Why it happens
    A recurrence multiplies the same Jacobian once a step, so that the gradient falls like factor**lag. At
    PyTorch's default initialisation an RNN of 128 units keeps 0.54 a step, a GRU and an LSTM 0.63: 1% is left
    after 7 and 9 steps, a thousandth after about 10 and 14 (`python -m gallery.horizon`). A convolution ends
    at its receptive field, where the gradient is exactly zero.

Evidence
    The gradient of the last output step at the input of every step before (`isograd horizon`), from a
    backward in which no lag underflows. Steps count by what differs between the samples there: silence at
    the end of a sequence, or padding, tells the model nothing, however near it is. Told as a warning where
    the horizon covers less than a quarter of what differs and the factor per step alone leaves less than 1%
    over all of it. An error only where the loss reads no step but the last, so that all other steps depend
    on the memory; the horizon covers less than a tenth, or what differs receives less than 1% of the
    gradient on average; and the factor loses the 3 decades that stop a deep network (VG101).

What helps
    Gates that start open; an orthogonal recurrent matrix; an LSTM or GRU in place of an RNN; attention or
    pooling over all steps, which lead to each of them directly.

References
    Hochreiter 1991; Bengio et al. 1994, Learning long-term dependencies with gradient descent is difficult.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from isograd.diagnosis import Finding, Severity
from isograd.flow import Flow
from isograd.horizon import LEFT, Horizon
from isograd.symptoms import Healthy, Outcome, Unexamined, unmeasured_in_time, vanishing_gradient

CODE = "RN601"
NAME = "short-horizon"

WARNING = 0.25
"""Share of what differs: a horizon that covers more leaves tasks a way by repetition and context."""
ERROR = 0.1
"""Share below which, with the loss at the last step alone, nine tenths of the data do not take part: of 24 recurrences
that had to remember digits over 8 to 192 silent steps and whose horizon ended before them, 23 lost more than half of
their lead (`python -m benchmarks.twins`; a GRU over 24 steps learned in spite of it)."""


def examine(flow: Flow) -> Iterator[Outcome]:
    """The horizon of the model, where something recurs in it."""
    if flow.horizon is not None:
        yield from judge(flow.horizon)
    else:
        yield unmeasured_in_time(flow)


def judge(found: Horizon) -> Iterator[Outcome]:
    """How much of the sequence the horizon covers."""
    if math.isnan(found.factor) or found.reference == -math.inf:
        yield Unexamined("no gradient at two steps or more")
        return
    if math.isinf(found.steps):
        yield Healthy(
            f"{10**found.decades:.2g} of the gradient is left after {found.at} steps (1% is the horizon)"
        )
        return
    said = f"1% of the gradient is left after {found.steps:.0f} steps, {found.factor:.3g} per step"
    faded = -math.inf if found.reach < found.at else math.log10(found.factor) * found.at
    if faded > math.log10(LEFT):  # a convolution in front of the memory gives the first few lags far more
        yield Healthy(f"{said}, but {found.factor:.3g} per step leaves {10**faded:.2g} over {found.at} steps")
        return
    covered, of = (
        found.covered,
        "the steps" if found.differing is None else "what differs between the samples",
    )
    if covered >= WARNING:
        yield Healthy(f"{said}: {covered:.0%} of {of} (a warning below {WARNING:.0%})")
        return
    little = covered < ERROR or found.received < math.log10(LEFT)
    severe = found.at_end and little and faded < -vanishing_gradient.ERROR
    yield Finding(
        CODE,
        NAME,
        Severity.ERROR if severe else Severity.WARNING,
        f"{said}, and the sequence has {found.at + 1}: {covered:.0%} of {of} lies within; {_rest(found)}",
        cause="the loss reads the last step alone, so that all others depend on this memory"
        if severe
        else "",
        sites=tuple(r.name for r in found.recurrences) or (found.source,),
        evidence={
            "horizon": found.steps,
            "length": found.at + 1,
            "factor": found.factor,
            "factor_error": found.factor_error,
            "decades": found.decades,
            "covered": covered,
            "received": found.received,
            "threshold": ERROR if severe else WARNING,
            "probes": found.probes,
        },
        remedies=_helping({r.kind for r in found.recurrences}),
    )


def _rest(found: Horizon) -> str:
    if found.reach < found.at:
        return f"exactly nothing reaches further back than {found.reach}"
    return f"the first step receives {_share(found)} of it"


def _share(found: Horizon) -> str:
    return f"{10**found.decades:.2g}" if abs(found.decades) < 3 else f"10^{found.decades:.0f}"


def _helping(kinds: set[str]) -> tuple[str, ...]:
    """Remedies for these kinds of recurrence; what reads all steps helps every one."""
    found: list[str] = []
    if "LSTM" in kinds:
        found.append("forget-bias")
    if kinds & {"LSTM", "GRU"}:
        found.append("chrono-initialisation")
    if kinds & {"RNN", "loop"}:
        found += ["orthogonal-recurrence", "gated-recurrence"]
    return (*found, "attend-over-time")
