"""RN603 closed-forget-gates: the gates that keep the state are closed, and it is forgotten in a few steps.

What it means
    A gate of f multiplies the state, and its gradient, by f at every step. At 0.5 half is lost each step
    and 1% is left after 7. The gates were put there to remember, and start by forgetting.

Why it happens
    PyTorch starts the biases of `nn.LSTM` and `nn.GRU` around 0, where a sigmoid is 0.5 open. It adds two
    biases, `bias_ih` and `bias_hh`: a 1 in both makes 2.

Evidence
    The forget gate of each LSTM (the update gate of each GRU), averaged over batch and steps. Told where
    even its most open unit forgets within the sequence and the gradient does too (RN601); a model that has
    another way back in time may forget what it likes. An nn.LSTM(32, 128) over 1,000 steps keeps 0.63 of the
    gradient a step at the default, 0.86 with a forget bias of 1, 0.998 with chrono initialisation
    (`python -m gallery.horizon`).

What helps
    A forget bias of 1 in one of the two biases; chrono initialisation, which spreads the gates over the time
    scales up to the length of the sequence.

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
from isograd.symptoms import Healthy, Outcome, Unexamined, short_horizon, unmeasured_in_time

CODE = "RN603"
NAME = "closed-forget-gates"


def examine(flow: Flow) -> Iterator[Outcome]:
    """The gates of the model's recurrences."""
    if flow.horizon is not None:
        yield from judge(flow.horizon)
    else:
        yield unmeasured_in_time(flow)


def judge(found: Horizon) -> Iterator[Outcome]:
    """How many steps the most open unit remembers."""
    gated = [r for r in found.recurrences if not math.isnan(r.gate)]
    if not gated:
        yield Unexamined("no gate of an LSTM or GRU of torch's own was seen")
        return
    memories = {
        r.name: math.log(LEFT) / math.log(r.gate_widest) if r.gate_widest < 1 else math.inf for r in gated
    }
    longest = max(memories.values())
    said = f"the most open unit is {max(r.gate_widest for r in gated):.2f} open and remembers {longest:.0f} steps"
    short = any(isinstance(o, Finding) for o in short_horizon.judge(found))
    if not short or longest >= found.at:
        yield Healthy(said if longest >= found.at else f"{said}; the horizon is longer")
        return
    yield Finding(
        CODE,
        NAME,
        Severity.WARNING,
        f"{said}, and the sequence has {found.at + 1}",
        sites=tuple(r.name for r in gated),
        evidence={
            "gate": sum(r.gate for r in gated) / len(gated),
            "gate_widest": max(r.gate_widest for r in gated),
            "remembers": longest,
            "length": found.at + 1,
        },
        remedies=_opening({r.kind for r in gated}),
    )


def _opening(kinds: set[str]) -> tuple[str, ...]:
    """A GRU's update gate is no forget gate, and opens by the other initialisation alone."""
    return ("forget-bias", "chrono-initialisation") if "LSTM" in kinds else ("chrono-initialisation",)
