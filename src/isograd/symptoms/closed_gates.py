"""RN603 closed-gates: the gates of a recurrence are closed: it forgets at once, or nothing enters its state.

What it means
    A forget gate of f multiplies the state, and its gradient, by f at every step. At 0.5 half is lost each step and 1%
    is left after 7. The gates were put there to remember, and start by forgetting. What is new passes the input and
    the output gate of an LSTM, or what the update gate of a GRU leaves: where they are closed the layer says nothing,
    and nothing of the gradient reaches what it was given.

Why it happens
    PyTorch starts the biases of `nn.LSTM` and `nn.GRU` around 0, where a sigmoid is 0.5 open. It adds two
    biases, `bias_ih` and `bias_hh`: a 1 in both makes 2. Biases that were set to -5 and below, in the wrong quarter of
    the vector or with the wrong sign, close a gate for thousands of steps of training: its own gradient is as small.

Evidence
    The gates of each LSTM and GRU, averaged over batch and steps. Forgetting is told where even the most open unit
    forgets within the sequence and the gradient does too (RN601); a model that has another way back in time may
    forget what it likes. It is an error where that unit forgets within two steps. An nn.LSTM(32, 128) over 1,000 steps
    keeps 0.63 of the gradient a step at the default, 0.86 with a forget bias of 1, 0.998 with chrono initialisation
    (`python -m gallery.horizon`). Of what is new, even the unit that lets most pass lets less than 1%: an error where
    the gradient has no way around the layer, and loses in it what stops a deep network (VG101).

What helps
    A forget bias of 1 in one of the two biases, and 0 for the gates that let in and out; chrono initialisation, which
    spreads the gates over the time scales up to the length of the sequence.

References
    Gers et al. 2000, Learning to forget; Jozefowicz et al. 2015; Tallec and Ollivier 2018, Can recurrent
    neural networks warp time?
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from isograd.diagnosis import Finding, Severity
from isograd.flow import Flow
from isograd.horizon import LEFT, Horizon
from isograd.recurrent.recurrence import Recurrence
from isograd.symptoms import (
    Healthy,
    Outcome,
    Unexamined,
    short_horizon,
    unmeasured_in_time,
    vanishing_gradient,
)

CODE = "RN603"
NAME = "closed-gates"

AT_ONCE = 2.0
"""Steps after which the unit that remembers most has forgotten: its forget gate is less than 0.1 open, and what is left
of the layer is a plain RNN behind two gates."""


def examine(flow: Flow) -> Iterator[Outcome]:
    """The gates of the model's recurrences."""
    if flow.horizon is None:
        yield unmeasured_in_time(flow)
        return
    told = [shut for shut in (_shut(flow.horizon, flow),) if shut is not None]
    yield from told or judge(flow.horizon)


def judge(found: Horizon) -> Iterator[Outcome]:
    """How many steps the most open unit remembers, and whether anything enters."""
    gated = _gated(found)
    if not gated:
        yield Unexamined("no gate of an LSTM or GRU of torch's own was seen")
        return
    if (shut := _shut(found)) is not None:
        yield shut
        return
    memories = {
        r.name: math.log(LEFT) / math.log(r.gate_widest) if r.gate_widest < 1 else math.inf for r in gated
    }
    longest = max(memories.values())
    said = f"the most open unit is {max(r.gate_widest for r in gated):.2g} open and remembers {longest:.0f} steps"
    short = any(isinstance(o, Finding) for o in short_horizon.judge(found))
    if not short or longest >= found.at:
        yield Healthy(said if longest >= found.at else f"{said}; the horizon is longer")
        return
    yield Finding(
        CODE,
        NAME,
        Severity.ERROR if longest < AT_ONCE else Severity.WARNING,
        f"{said}, and the sequence has {found.at + 1}",
        sites=tuple(r.name for r in gated),
        evidence={
            "gate": sum(r.gate for r in gated) / len(gated),
            "gate_widest": max(r.gate_widest for r in gated),
            "remembers": longest,
            "threshold": AT_ONCE if longest < AT_ONCE else found.at,
            "length": found.at + 1,
        },
        remedies=_opening({r.kind for r in gated}),
    )


def _gated(found: Horizon) -> list[Recurrence]:
    return [r for r in found.recurrences if not math.isnan(r.gate)]


def _shut(found: Horizon, flow: Flow | None = None) -> Finding | None:
    """Layers that let nothing new in and out again, in neither direction. An error where the flow has no way around."""
    layers: dict[str, list[Recurrence]] = {}
    for r in _gated(found):
        layers.setdefault(r.name.removesuffix("_reverse"), []).append(r)
    shut = [r for both in layers.values() if all(r.passes_most < LEFT for r in both) for r in both]
    if not shut:
        return None
    most = max(r.passes_most for r in shut)
    lost = 0.0 if flow is None else min(_through(flow, r.name) for r in shut)
    return Finding(
        CODE,
        NAME,
        Severity.ERROR if lost <= -vanishing_gradient.ERROR else Severity.WARNING,
        f"the unit that lets most pass lets {most:.1g} of what is new at a step into the state and out again",
        cause="the input gate or the output gate is closed, in a GRU the update gate is open",
        sites=tuple(r.name for r in shut),
        evidence={
            "passes_most": most,
            "threshold": LEFT,
            "decades": lost,
            "decades_threshold": -vanishing_gradient.ERROR,
            "cause": "initialisation",
        },
        remedies=_opening({r.kind for r in shut}),
    )


def _through(flow: Flow, name: str) -> float:
    """Decades that the gradient loses on the backbone in the kernel or cells that own this parameter."""
    module = name.rpartition(".")[0]
    decades = flow.column("decades").tolist()
    return sum(
        d for site, d in zip(flow.sites, decades, strict=True) if site.module == module and not math.isnan(d)
    )


def _opening(kinds: set[str]) -> tuple[str, ...]:
    """A GRU's update gate is no forget gate, and opens by the other initialisation alone."""
    return ("forget-bias", "chrono-initialisation") if "LSTM" in kinds else ("chrono-initialisation",)
