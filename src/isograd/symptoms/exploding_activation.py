"""EG202 exploding-activation: the signal grows from layer to layer on its way forward.

What it means
    Activations at the output side are many times larger than at the input side. The loss starts far too
    high, its gradient is as large, and in half precision the values overflow.

Why it happens
    The weights of each layer are drawn too large, or residual branches add up with nothing to normalise
    them. In a network without normalisation the weights' gradients, activation times error, can look the
    same in every layer while both factors explode: that is why both directions are measured.

Evidence
    log10 of the root mean square at the last site over that at the first, along the backbone; it must grow in the typical
    layer too, so that one large layer is not called an explosion, or as much in one function, which has no scale to be
    set right (an exponential), or by six decades at once. A final normalisation takes the growth away again and is no finding;
    but one branch that is hundreds of times as loud as the stream it is added to, and behind which most others are as much
    quieter, is a warning: little of the network is left beside that block, which hardly moves.

What helps
    An initialisation at the critical gain, residual branches scaled by 1/sqrt(depth), normalisation.

References
    He et al. 2015; Hanin and Rolnick 2018, How to Start Training: The Effect of Initialization and Architecture.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch import Tensor

from isograd.diagnosis import Finding, Severity
from isograd.flow import FACTORS, Flow
from isograd.symptoms import Healthy, Outcome, Unexamined

CODE = "EG202"
NAME = "exploding-activation"

ERROR = 2.7
"""Decades of forward growth: with 2.9 and a loss of 1,100 for ten classes SGD learned nothing (the atlas's
exploding initialisation, `python -m gallery.zoo --cases`); with 2.1 it still did (gallery.border)."""

AT_ONCE = 6.0
"""Decades of one place that no scale of a layer accounts for: a policy's head times 1e5 still learned in 60 steps of
Adam, the exponential of 30 did not."""

DROWNING = 300.0
"""rms of one branch over that of its stream, and of that stream over the branches behind it. With the weights of one of four blocks
too large GPT-2 and Llama are behind by 6 to 8% of their lead after 150 steps at ratios of 20 to 70 (10 times), 16% at 850 (30 times)
and 18 to 21% at 3,000 to 10,000 (100 times)."""


def examine(flow: Flow) -> Iterator[Outcome]:
    """Forward growth over the hidden sites, or from the input to the output if that is more."""
    if flow.failure is not None or not math.isfinite(flow.loss):
        yield Unexamined("the loss is not finite or the backward failed")
        return
    inside = [i for i, site in enumerate(flow.sites) if site.kind != "loss"]
    ends = (flow.hidden, slice(flow.entrance, len(inside)))
    parts = [part for part in ends if len(_steps(flow, part)) > 1]
    if not parts:
        yield Unexamined("fewer than three finite activations along the backbone")
        return
    part = max(parts, key=lambda part: float(_steps(flow, part).sum()))
    steps = _steps(flow, part)
    grown, typical = float(steps.sum()), float(_smoothed(steps).median()) * len(steps)
    if grown < ERROR or (
        typical < grown / 4 and float(steps.max()) < AT_ONCE and _by_function(flow, part) < ERROR
    ):
        said = f"activations change by {grown:+.1f} decades (an error from {ERROR:+.1f})"
        yield _drowning(flow) or Healthy(said)
        return
    first, last = flow.sites[part][0], flow.sites[part][-1]
    rms = flow.column("activation_rms")[part]
    yield Finding(
        CODE,
        NAME,
        Severity.ERROR,
        f"activations grow by {grown:+.1f} decades from {first.name} to {last.name} (rms {float(rms[0]):.2g} to {float(rms[-1]):.2g})",
        sites=(first.place, last.place),
        evidence={"decades": grown, "typical": typical, "threshold": ERROR, "layers": flow.layers},
        remedies=("critical-initialisation", "scale-residual-branches", "insert-normalisation"),
    )


def _drowning(flow: Flow) -> Finding | None:
    """One branch that leaves nothing to be heard of what came before it, nor of most that come after."""
    ratios = {depth: flow.splits[depth].forward_ratio for depth in sorted(flow.splits)}
    loudest = max(ratios, key=lambda depth: ratios[depth] if ratios[depth] < math.inf else 0.0, default=None)
    if loudest is None or not DROWNING < ratios[loudest] < math.inf:
        return None
    behind = [ratio for depth, ratio in ratios.items() if depth > loudest and ratio > 0]
    quiet = [ratio for ratio in behind if ratio < 1 / DROWNING]
    if not quiet or 2 * len(quiet) <= len(behind):
        return None
    site = flow.sites[loudest]
    return Finding(
        CODE,
        NAME,
        Severity.WARNING,
        f"a branch is {ratios[loudest]:.2g} times as loud as the stream it is added to at {site.name}, and {len(quiet)} of the "
        f"{len(behind)} behind it less than {1 / DROWNING:.2g} of it",
        cause="the weights of one residual block are too large",
        sites=(site.place,),
        evidence={
            "branch": ratios[loudest],
            "threshold": DROWNING,
            "quiet": len(quiet),
            "cause": "initialisation",
        },
        remedies=("rescale-weights",),
    )


def _steps(flow: Flow, part: slice) -> Tensor:
    """log10 of the growth from one activation to the next."""
    rms = flow.column("activation_rms")[part]
    return rms[rms.isfinite() & (rms > 0)].log10().diff()


def _by_function(flow: Flow, part: slice) -> float:
    """Decades of the largest growth in a function of single elements that has neither weights nor a factor."""
    rms, sites = flow.column("activation_rms")[part].log10().diff().tolist(), flow.sites[part][1:]
    found = (
        grown
        for grown, site in zip(rms, sites, strict=True)
        if site.kind in ("activation", "elementwise")
        and site.operation not in FACTORS
        and not site.parameters
    )
    return max((grown for grown in found if math.isfinite(grown)), default=0.0)


def _smoothed(steps: Tensor) -> Tensor:
    """Mean of neighbours: a linear layer and its activation count as one step."""
    return (steps[:-1] + steps[1:]) / 2 if len(steps) > 1 else steps
