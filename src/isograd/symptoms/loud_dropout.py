"""VG112 loud-dropout: what dropout leaves out is far louder than what it lets through.

What it means
    Dropout multiplies the power of the signal by 1 / (1 - p), and what is added is noise, new at every step. Layer behind layer these
    factors multiply: of a hundred parts one is the signal. Gains look right, since noise passes the layers as the signal does, and
    the gradient of every step points somewhere else.

Why it happens
    p is the share that is left out, and was given as the share that is kept: nn.Dropout(0.9), as keep_prob in TensorFlow 1. Or a
    dropout that suits one layer stands behind each of many.

Evidence
    The product of 1 / (1 - p) over the dropouts that the signal cannot get round, times that of the residual branch where it is
    largest, in training mode; over the inputs that the layer behind them averages it over, where those are fewest. A warning above
    0.3, an error above 0.6.

What helps
    p of 0.1 to 0.3 in hidden layers, 0.5 before a wide head alone; wider layers.

References
    Srivastava et al. 2014, Dropout; Schoenholz et al. 2017, section 5: dropout bounds the depth to which a signal reaches.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

from isograd.diagnosis import Finding, Severity
from isograd.flow import Flow
from isograd.statistics import Site
from isograd.symptoms import Healthy, Outcome

CODE = "VG112"
NAME = "loud-dropout"

NOISE = (0.3, 0.6)
"""For a warning and for an error. Chains 128 to 1024 wide of 1 to 6 dropouts, CNNs with batch normalisation and vision transformers of
digits lose in 200 steps of Adam, at the better of two rates and judged without dropout, 0.01 to 0.11 of their lead at 0.24 and below,
0.13 and 0.15 at 0.35 and 0.5, 0.29 to 0.52 at 0.7 to 1.2 and 0.87 to all of it from 2.8 on."""
WORST = 3
"""Sites that are named."""


def examine(flow: Flow) -> Iterator[Outcome]:
    """The dropouts along the backbone and on the noisiest branch beside it."""
    along = dropouts(flow)
    times = math.prod(1 / (1 - p) if p < 1 else math.inf for p in along.values())
    fan_in = min((_read(flow, site) for site in along), default=1)
    noise = times / fan_in if along else 0.0
    if noise <= NOISE[0]:
        yield Healthy(
            f"{len(along)} dropouts multiply the power of the signal by {times:.3g}, over {fan_in} inputs"
        )
        return
    severe = noise > NOISE[1]
    worst = sorted(along, key=lambda site: -along[site])[:WORST]
    yield Finding(
        CODE,
        NAME,
        Severity.ERROR if severe else Severity.WARNING,
        f"{len(along)} dropouts of up to {max(along.values()):.3g} multiply the power of the signal by {times:.3g}: all but "
        f"{1 / times:.1g} of it is noise, new at every step, and a layer averages it over {fan_in} inputs",
        cause="p is the share that is left out, not the share that is kept",
        sites=tuple(site.place for site in worst),
        evidence={
            "noise": noise,
            "threshold": NOISE[severe],
            "power": times,
            "fan_in": fan_in,
            "p": max(along.values()),
            "cause": "dropout",
        },
        remedies=("lower-dropout",),
    )


def _read(flow: Flow, site: Site) -> int:
    """Inputs of the layer that is given what this dropout leaves; of one in a branch, its features."""
    return (flow.fan_in(site.depth) if site in flow.sites else 0) or site.shape[-1]


def dropouts(flow: Flow) -> dict[Site, float]:
    """p of those at work that the signal cannot get round, and of those on the branch where they are loudest."""
    branches = [
        _at_work(step.site for step in steps if step.branch) for _, steps in sorted(flow.ledgers.items())
    ]
    loudest = max(
        branches, key=lambda found: math.prod(1 / (1 - p + 1e-12) for p in found.values()), default={}
    )
    return _at_work(flow.sites) | loudest


def _at_work(sites: Iterable[Site]) -> dict[Site, float]:
    found: dict[Site, float] = {}
    for site in sites:
        given = dict(site.settings)
        p, training = given.get("p", given.get(1, 0.5)), given.get("training", given.get(2, True))
        if site.kind == "dropout" and training and isinstance(p, float | int):
            found[site] = float(p)
    return found
