"""EG205 far-start: the output starts many times larger than what the targets ask for.

What it means
    Before it can learn anything, the model has to unlearn what its draw of the weights says: it is sure of classes
    that it has not seen, or its outputs scatter far beyond the targets. The gradient is large and points at the size
    of the output; SGD overshoots, and Adam walks back for hundreds of steps. Within the layers nothing is lost.

Why it happens
    One place that is far too loud: a head, an embedding or an input that is not scaled, a temperature near zero, a
    branch that drowns its stream. Or targets that are far smaller than 1. The other way round, targets that lie a hundred times
    further from zero than the outputs are a warning: each step of Adam moves an output by about its rate times the width.

Evidence
    Of classes, the loss over that of equal probabilities, log(classes), or what the scatter of the logits makes of it where
    that is less (ArcFace takes a margin off the right class, and trains); of values, the standard deviation of the outputs
    over the batch, over that of the targets. Both are 1 for a model that says nothing, whatever the loss is multiplied
    with. Weights drawn as usual start at 0.9 to 1.3. A trained model is below 1.

What helps
    The layer named, at the size of the others: std 1/sqrt(fan_in), norm 1 for an embedding. Standardised inputs and targets.

References
    Karpathy 2019, A Recipe for Training Neural Networks ("verify loss @ init"); Zhang et al. 2019, Fixup.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from isograd.diagnosis import Finding, Severity
from isograd.flow import Flow
from isograd.statistics import LossCall, Site
from isograd.symptoms import Healthy, Outcome, Unexamined
from isograd.symptoms.shrunk_output import leave_out

CODE = "EG205"
NAME = "far-start"

FAR = 7.0
"""Times a constant answer. Small language models whose head or embedding is drawn too large lose a fifth of what they learn
in 80 to 150 steps of Adam at 5, half at 8 and all of it at 17. A classifier of digits learns as fast up to 5; at 8 SGD
stays at a third. A regression of the digits learns as well at 4, at 13 it has lost half and at 44 all."""
OUT_OF_REACH = 100.0
"""Largest target over the largest output or 1."""
LOUD = 3.0
"""rms of an input or embedding that is blamed itself, as `scale-embeddings` and `standardise-input` judge it."""


def examine(flow: Flow) -> Iterator[Outcome]:
    """Each loss call on its own."""
    if flow.failure is not None or not math.isfinite(flow.loss):
        yield Unexamined("the loss is not finite or the backward failed")
        return
    yield from (
        _out_of_reach(call)
        for call in flow.losses
        if call.target == "values" and _beyond(call) > OUT_OF_REACH
    )
    known = [call for call in flow.losses if math.isfinite(call.excess)]
    if not known:
        yield Unexamined("no loss was seen whose targets tell what is large")
        return
    far = [call for call in known if call.excess >= FAR]
    if not far:
        worst = max(known, key=lambda call: call.excess)
        yield Healthy(f"{worst.function} starts at {worst.excess:.2g} times a constant answer")
    for call in far:
        yield _far(flow, call)


def _beyond(call: LossCall) -> float:
    """How many times as far from zero the targets lie as the outputs, or as 1; 0: not known."""
    wanted = max(abs(call.target_min), abs(call.target_max))
    given = max(abs(call.input_min), abs(call.input_max), 1.0)
    return wanted / given if math.isfinite(wanted) and math.isfinite(given) else 0.0


def _out_of_reach(call: LossCall) -> Finding:
    return Finding(
        CODE,
        NAME,
        Severity.WARNING,
        f"the targets of {call.function} reach from {call.target_min:.3g} to {call.target_max:.3g}, the outputs from "
        f"{call.input_min:.3g} to {call.input_max:.3g}",
        cause="the targets are not standardised: the output has to grow as far before anything else can be learned",
        sites=(call.site.place,),
        evidence={"beyond": _beyond(call), "threshold": OUT_OF_REACH, "cause": "targets"},
        remedies=("(y - mean) / std in place of the targets y, undone behind the model",),
    )


def _of_classes(call: LossCall) -> bool:
    return call.function in ("cross_entropy", "nll_loss", "binary_cross_entropy_with_logits")


def _far(flow: Flow, call: LossCall) -> Finding:
    site, growth = loudest(flow)
    first = next(iter(flow.weighted), 0)
    given = site is not None and site.depth < first and site.kind in ("input", "elementwise")
    said = (
        f"{call.function} starts at {call.excess:.2g} times that of equal probabilities"
        if _of_classes(call)
        else f"the outputs scatter {call.excess:.2g} times as far as the targets of {call.function}"
    )
    factor = site is not None and site.depth in flow.factors
    told = (
        {"cause": "factor", "causes": "factor"}
        if factor
        else {"cause": "unnormalised-input" if given else "initialisation"}
    )
    return Finding(
        CODE,
        NAME,
        Severity.WARNING if given else Severity.ERROR,
        said,
        cause=f"{site.name} makes the signal {growth:.2g} times as large (read off the backbone)"
        if site is not None
        else "no single place makes the signal large: a branch, the weights, or small targets",
        sites=(site.place if site is not None else call.site.place,),
        evidence={"excess": call.excess, "threshold": FAR, "growth": growth, **told},
        remedies=(leave_out(site),)
        if factor and site is not None
        else ("standardise-input",)
        if given
        else _remedies(site),
    )


def _remedies(site: Site | None) -> tuple[str, ...]:
    weights = ("rescale-weights", "critical-initialisation")
    if site is None:
        return ("scale-embeddings", *weights)
    return ("scale-embeddings",) if site.kind == "embedding" else weights


def loudest(flow: Flow) -> tuple[Site | None, float]:
    """The place along the backbone that makes the signal largest, and how many times; an input that is large itself."""
    rms = flow.column("activation_rms").tolist()
    grown: list[tuple[float, Site]] = []
    before = 1.0  # what is given counts by its size
    for site, size in zip(flow.sites, rms, strict=True):
        if size > 0 and math.isfinite(size) and site.shape:
            grown.append((size / before, site))
            before = size
    growth, site = max(grown, key=lambda one: one[0], default=(math.nan, None))
    return (site, growth) if growth > LOUD else (None, math.nan)
