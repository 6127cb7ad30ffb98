"""VG111 loud-biases: what the biases add is the same for all samples, and drowns what the weights make of them.

What it means
    A layer gives W x + b. Where b is many times as loud as W x, all samples give nearly the same output, and all that
    learns behind it is how to answer their mean: a step that is small enough for what they share is too small for what
    tells them apart. Gradients and gains look right at every site.

Why it happens
    nn.init.normal_(bias) without a std, or one loop that initialises weights and biases alike; a constant from another
    framework or another activation; all gates of an LSTM or GRU opened or shut at once, where the forget gate was meant.

Evidence
    Root mean square of each hidden bias over sigma_w of its weight, which is what a layer makes of an input of size 1; not of
    layers that a normalisation follows, which takes it off again. Told where the median of at least three is above 3, an
    error above 10. And what is left at the head of what differs between the samples, where it falls most behind a layer
    with biases, or a recurrence, whose signal is loud: a warning below 0.01, an error below 0.006.

What helps
    Biases of zero: nn.init.zeros_(layer.bias). Of an LSTM or GRU, chrono initialisation, which sets those of the other
    gates to zero.

References
    Schoenholz et al. 2017, Deep Information Propagation: large sigma_b is the ordered phase, where all inputs become alike.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from statistics import median

from isograd.diagnosis import Finding, Severity
from isograd.flow import Flow
from isograd.symptoms import Healthy, Outcome
from isograd.symptoms.vanishing_gradient import ALIKE, told_apart

CODE = "VG111"
NAME = "loud-biases"

LOUD = (3.0, 10.0)
"""Bias over sigma_w, for a warning and for an error. Chains, CNNs, mixers, vision transformers and residual networks of digits lose
0.02 to all of their lead in 120 steps of Adam at 5, at the best of three rates, and 0.16 to all at 17; before batch
normalisations a hundredth."""
SEVERAL = 3
"""Biases: one or two are gates, or a head that starts at the prior of its classes."""
DROWNED = 0.006
"""Share that is left at the head of what differed between the samples. CNNs, graph networks, RNNs, LSTMs and GRUs of digits lose 0.1 to
all of their lead at 0.0006 to 0.006, a fiftieth to a third at 0.007 to 0.01."""
SIGNAL = 0.85
"""Root mean square where it falls: what is small, Adam makes up for in few steps, and a state of tanh is at most 1."""
WORST = 3
"""Sites that are named."""


def examine(flow: Flow) -> Iterator[Outcome]:
    """Biases beside the weights of their layers, and what tells the samples apart behind them."""
    loud, drowned = _loud(flow), _drowned(flow)
    found = [finding for finding in (loud, drowned) if isinstance(finding, Finding)]
    yield from found or [loud]


def _loud(flow: Flow) -> Outcome:
    weights = {p.name: p for p in flow.parameters if p.fan_in and p.sigma_w > 0}
    normalised = {name for norm in flow.normalisations for name in norm.weights}
    head = max((p.depth for p in weights.values() if not math.isnan(p.depth)), default=math.nan)
    sizes = {
        p.name: p.rms / weight.sigma_w
        for p in flow.parameters
        if p.bias
        and p.state != "frozen"
        and not p.depth >= head
        and (weight := weights.get(_weight_of(p.name)))
        and weight.name not in normalised
    }
    middle = median(sizes.values()) if len(sizes) >= SEVERAL else 0.0
    if middle <= LOUD[0]:
        return Healthy(
            f"{len(sizes)} hidden biases are {middle:.2g} times sigma_w of their weights in the median"
            if len(sizes) >= SEVERAL
            else "fewer than three layers have biases that no normalisation follows"
        )
    severe = middle > LOUD[1]
    return Finding(
        CODE,
        NAME,
        Severity.ERROR if severe else Severity.WARNING,
        f"the biases of {len(sizes)} layers are {middle:.2g} times as large as what their weights make of an input of size 1 (median)",
        cause="the initialisation of the biases: what they add is the same for all samples",
        sites=tuple(sorted(sizes, key=lambda name: -sizes[name])[:WORST]),
        evidence={
            "bias": middle,
            "threshold": LOUD[severe],
            "layers": len(sizes),
            "cause": "initialisation",
        },
        remedies=("zero-biases",),
    )


def _weight_of(bias: str) -> str:
    """Name of the weight that it stands beside: `fc.bias` beside `fc.weight`, `in_proj_bias` beside `in_proj_weight`."""
    return "weight".join(bias.rsplit("bias", 1))


def _drowned(flow: Flow) -> Finding | None:
    """The layer behind which least is left of what differed before it, where next to nothing of it reaches the head."""
    kept, varying = told_apart(flow), flow.column("varying").tolist()
    before = flow.weighted[-1] if flow.weighted else 0
    falls = [(varying[b] / varying[a], b) for a, b in pairwise(i for i in range(before) if varying[i] > 0)]
    _, i = min(falls, default=(1.0, 0))
    if not kept < ALIKE or i == 0:
        return None
    size, site = float(flow.column("activation_rms")[i]), flow.sites[i]
    runs = site.kind == "recurrent"
    if not (size > SIGNAL and (runs or any(p.bias and p.depth == i for p in flow.parameters))):
        return None
    severe = kept < DROWNED
    return Finding(
        CODE,
        NAME,
        Severity.ERROR if severe else Severity.WARNING,
        f"at the head {kept:.0e} of what tells the samples apart is left: behind {site.name} only {varying[i]:.1g} of the "
        "signal differs between them",
        cause="what is added there is the same for all samples, and far louder than they are",
        sites=(site.place,),
        evidence={
            "told_apart": kept,
            "told_apart_threshold": DROWNED if severe else ALIKE,
            "rms": size,
            "loud": SIGNAL,
            "cause": "initialisation",
        },
        remedies=("forget-bias", "chrono-initialisation", "recurrent-initialisation")
        if runs
        else ("zero-biases",),
    )
