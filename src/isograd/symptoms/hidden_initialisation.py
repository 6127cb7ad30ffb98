"""VG110 hidden-initialisation: every gain looks right, and the weights are not: too large for their normalisations, or around a mean.

What it means
    A normalisation right behind a layer divides the scale of its weights out again, so that signal and gradient look
    right at every site. The gradient of the weights themselves is as many times smaller as they are too large, and a
    step of the usual size turns them as many times less: the layers stay nearly as they were drawn, and only what
    stands behind the last normalisation learns. Weights that have a mean make nearly the same sum of their inputs in every unit:
    hundreds of channels carry one, normalised or not.

Why it happens
    nn.init.normal_(weight) without a std, which is 1 whatever the fan-in; nn.init.uniform_(weight) or torch.rand, which
    lie between 0 and 1; a checkpoint converted with a factor.

Evidence
    Of the weights whose result a normalisation is given as it is: root mean square times sqrt(fan_in), which is sqrt(2)
    after He and 0.58 as torch draws them; told where most of the model's weights stand there and the median is above 3: a
    warning, as a higher rate makes up for it. And, of them or of all hidden weights
    of a chain, the singular value that their mean makes over the largest that their scatter does, above 1.5 for a warning and
    above 2 for an error; not where a LayerNorm takes the mean over the units away, nor of one input channel, nor where a skip
    leads past layers that are not normalised themselves.
    Unlike all other findings this one is not of the function that the model computes, but of how it can be trained.

What helps
    He's, Xavier's or orthogonal weights: nn.init.kaiming_normal_(layer.weight). For what is too large alone, a higher rate.

References
    van Laarhoven 2017, L2 Regularization versus Batch and Weight Normalization; Li and Arora 2020, An Exponential
    Learning Rate Schedule for Deep Learning; Marchenko and Pastur 1967.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from statistics import median

from isograd.diagnosis import Finding, Severity
from isograd.flow import Flow
from isograd.statistics import Normalisation, Parameter
from isograd.symptoms import Healthy, Outcome

CODE = "VG110"
NAME = "hidden-initialisation"

LOUD = 3.0
"""sigma_w. Batch-normalised CNNs, plain, residual and depthwise separable, lose 1 to 53% of their lead in 150 steps of Adam or SGD
at 1.7, 10 to 86% at 5.8 and 44 to 93% at 17; layer-normalised MLPs 1 to 15% at 5.8 and 8 to 34% at 17. A warning: a rate
that is as many times higher makes up for it (a VGG of N(0, 1) reaches 0.92 with the best of SGD, its twin 0.95)."""
EQUAL = 1000.0
"""The same of what scatters by its rounding alone."""
WORST = 3
"""Weights that are named."""
COHERENT = (1.5, 2.0)
"""What the mean makes, for a warning and for an error: the CNNs lose 4 to 37% at 0.9, 55 to 93% at 3, and no rate makes up for it (a
VGG of U(0, 1) or U(0, 0.05) reaches 0.32 at most, its twin 0.95); chains of ReLU and tanh without normalisation lose 72 to 81% at 6.9.
The same CNNs stand at 0 to 0.8 when they are trained."""


def examine(flow: Flow) -> Iterator[Outcome]:
    """Size and mean of the weights that a normalisation follows."""
    multiply = {p.name: p for p in flow.parameters if p.fan_in and p.state != "frozen"}
    behind = {name: n for n in flow.normalisations if not n.fixed for name in n.weights if name in multiply}
    if 2 * len(behind) <= len(multiply):
        behind.clear()
    size = {name: multiply[name].sigma_w for name in behind}
    loud, alike = _loud(size), _alike(_means(flow, multiply, behind))
    yield from (finding for finding in (loud, alike) if finding is not None)
    if loud is None and alike is None:
        middle = (
            f"sigma_w is {median(size.values()):.2g} in the median before {len(size)} normalisations"
            if size
            else ""
        )
        yield Healthy(middle or "normalisations follow less than half of the weights, and those have no mean")


def _loud(size: dict[str, float]) -> Finding | None:
    if len(size) < 2 or not (middle := median(size.values())) > LOUD:
        return None
    return Finding(
        CODE,
        NAME,
        Severity.WARNING,
        f"{len(size)} weights that a normalisation follows are far too large: sigma_w {middle:.2g} in the median",
        cause="the initialisation, which the normalisations hide: a step hardly turns the weights",
        sites=_largest(size),
        evidence={"sigma_w": middle, "threshold": LOUD, "weights": len(size), "cause": "initialisation"},
        remedies=("rescale-weights", "critical-initialisation"),
    )


def _alike(mean: dict[str, float]) -> Finding | None:
    if len(mean) < 2 or not (middle := median(mean.values())) > COHERENT[0]:
        return None
    severe = middle > COHERENT[1]
    return Finding(
        CODE,
        NAME,
        Severity.ERROR if severe else Severity.WARNING,
        f"the mean of {len(mean)} weights outweighs their scatter {middle:.2g} times in the median: all units of a layer "
        "carry nearly the same"
        if middle < EQUAL
        else f"all elements of each of {len(mean)} weights are equal: all units of a layer are one, and stay one",
        cause="the initialisation: the weights are drawn around a mean that is not zero",
        sites=_largest(mean),
        evidence={
            "coherence": middle,
            "threshold": COHERENT[severe],
            "weights": len(mean),
            "cause": "initialisation",
        },
        remedies=("critical-initialisation",),
    )


def _largest(seen: dict[str, float]) -> tuple[str, ...]:
    return tuple(sorted(seen, key=lambda name: -seen[name])[:WORST])


def _means(flow: Flow, multiply: dict[str, Parameter], behind: dict[str, Normalisation]) -> dict[str, float]:
    """Coherence of the weights whose units nothing tells apart again: a skip would, and a mean that is taken over units."""
    if behind:
        mixing = [name for name in behind if _mixes(multiply[name])]
        found = {name: multiply[name].coherence for name in mixing if not _centred(behind[name])}
        return found if 2 * len(found) > len(mixing) else {}
    if flow.splits or any(_centred(norm) for norm in flow.normalisations):
        return {}
    head = max((p.depth for p in multiply.values() if not math.isnan(p.depth)), default=math.nan)
    return {name: p.coherence for name, p in multiply.items() if _mixes(p) and p.depth < head}


def _centred(norm: Normalisation) -> bool:
    """Does it take the mean over the units away, at each position? Over channels and positions together it does not."""
    over = [len(value) for _, value in norm.site.settings if isinstance(value, tuple)]
    return norm.site.operation == "layer_norm" and over == [1]


def _mixes(weight: Parameter) -> bool:
    """Does it add up several channels? A depthwise filter has one, and its mean makes it a blur."""
    return weight.shape[1] > 1 if len(weight.shape) > 1 else False
