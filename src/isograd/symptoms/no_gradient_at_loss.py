"""VG102 no-gradient-at-loss: the head, the loss and the target do not fit, and learning stops right there.

What it means
    The loss lies flat although nothing is wrong with the layers: the gradient is already lost, or points
    nowhere useful, between the loss and the model's output. It looks like a vanishing gradient, and no
    initialisation, activation or normalisation in the layers can help.

Why it happens
    Softmax over one unit (always 1, so no gradient at all); softmax or sigmoid before a loss that applies
    it again; a bounded output (sigmoid, tanh, softmax, ReLU) for targets outside of its bounds; an
    output that is saturated before a loss that does not undo it, or clipped. Outputs of shape (N, 1) beside targets of
    shape (N,): broadcasting compares each with all, and what is learned is their mean.

Evidence
    Exact facts rather than thresholds: the operation that made the loss's input and its width, the range
    of the targets against the range of that operation, whether rows sum to 1, and whether the gradient at
    the model's output is exactly zero. A saturated softmax or sigmoid is judged together with the logarithm
    behind it, which gives back what it takes: the gradient of both is p - y. Of 29 real programs with a
    flat loss, 27 had one of these faults.

What helps
    Give the loss what it expects: logits to `cross_entropy` and `binary_cross_entropy_with_logits`, a
    linear output for unbounded targets, one sigmoid or two softmax units for two classes.

References
    Wardat et al. 2021, DeepLocalize; Nikanjam et al. 2021, NeuraLint; PyTorch, CrossEntropyLoss.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise

from isograd.diagnosis import Finding, Severity
from isograd.flow import Flow
from isograd.losses import LOGARITHMS, NORMALISED_LOG, OF_LOGITS, REGRESSIONS, misfit
from isograd.statistics import Site
from isograd.symptoms import Healthy, Outcome, Unexamined

CODE = "VG102"
NAME = "no-gradient-at-loss"

OUTPUTS = {"softmax", "sigmoid", "tanh"}
"""Functions that end a model, whoever applies them."""
VIEWS = {"view", "reshape", "squeeze", "unsqueeze", "flatten", "transpose", "permute", "float", "to", "clone"}
SATURATED = -3.0
"""Decades that one output function may cost, with the logarithm behind it: a logit of 7 in a sigmoid, p = 0.999."""
ALIKE = 0.01
"""Share of what differs between the samples that a saturated function of any name leaves: one that only scales its
input, as a temperature does, costs decades too and leaves all of it."""
ROUNDING = -7.0
"""Decades below which probabilities are 0 and 1 to the last digit of float32: a policy that is sure in every state tries
nothing else, so that its advantage, like the gradient of its logits, is zero."""


def examine(flow: Flow) -> Iterator[Outcome]:
    """Facts of every loss call and of the model's output function."""
    if flow.failure is not None or not math.isfinite(flow.loss):
        yield Unexamined("the loss is not finite or the backward failed")
        return
    found = [(call, reason) for call in flow.losses if (reason := misfit(call))]
    for call, (message, cause, remedy) in found:
        yield Finding(
            CODE,
            NAME,
            Severity.ERROR,
            message,
            cause=f"{cause}; the layers are not to blame",
            sites=(call.site.place,),
            evidence={
                "loss": call.function,
                "output": call.source,
                "width": call.width,
                "input_min": call.input_min,
                "input_max": call.input_max,
                "target_min": call.target_min,
                "target_max": call.target_max,
                "cause": "head",
            },
            remedies=(remedy,),
        )
    if not found:
        yield _twice(flow) or _at_output(flow)


def taken(flow: Flow) -> str:
    """What the loss takes: 'logits', 'probabilities', 'log-probabilities', 'values' of any size, '' where unknown."""
    functions = {call.function for call in flow.losses}
    behind = _behind(flow)
    if functions & OF_LOGITS or (behind and behind[0].operation in NORMALISED_LOG):
        return "logits"
    if logarithm(flow) is not None:
        return "probabilities"
    if functions & {"nll_loss", "kl_div"}:
        return "log-probabilities"
    return "values" if functions & REGRESSIONS else ""


def logarithm(flow: Flow) -> Site | None:
    """The site of the loss at which the logarithm of the model's output has been taken, on one way or on several."""
    return next(
        (
            site
            for site in _behind(flow)
            if site.operation in LOGARITHMS
            or any(step.site.operation in LOGARITHMS for step in flow.ledgers.get(site.depth, ()))
        ),
        None,
    )


def _behind(flow: Flow) -> list[Site]:
    """The loss's own sites that compute, from the model's output on."""
    return [site for site in flow.sites if site.kind == "loss" and site.operation not in VIEWS]


def _twice(flow: Flow) -> Finding | None:
    """A softmax or sigmoid, and once more in a logarithm right behind it."""
    line = [site for site in flow.sites if site.operation not in VIEWS]
    for output, log in pairwise(line):
        if log.operation in NORMALISED_LOG and output.operation in ("softmax", "sigmoid"):
            return _doubled(output, log)
    return None


def _doubled(output: Site, log: Site) -> Finding:
    return Finding(
        CODE,
        NAME,
        Severity.ERROR,
        f"{log.operation} is taken of the output of {output.operation}: it expects logits",
        cause=f"a {output.operation} before a loss that applies its own function; the layers are not to blame",
        sites=(log.place,),
        evidence={"loss": log.operation, "output": output.operation, "cause": "head"},
        remedies=(f"pass logits: remove the {output.operation}",),
    )


def _at_output(flow: Flow) -> Outcome:
    """The gradient where the loss meets the model: exactly zero, or lost in one saturated function."""
    inside = [i for i, site in enumerate(flow.sites) if site.kind != "loss"]
    if not inside:
        return Unexamined("no backbone between the loss and an input")
    layers = flow.weighted
    head = layers[-1] if layers else inside[-1]
    top = inside[-1]
    log = float(flow.column("grad_norm_log10")[top])
    costs = {i: float(flow.column("decades")[i]) for i in inside if i > head or (i == top and not layers)}
    stopped = top if log == -math.inf else next((i for i, cost in costs.items() if cost == -math.inf), None)
    if stopped is not None and flow.sites[stopped].dtype == "float16":
        return Unexamined("the gradient underflows float16 before it leaves the loss: see NF403")
    if stopped is not None:
        site = flow.sites[stopped]
        one = site.operation in ("softmax", "log_softmax") and site.shape[-1:] == (1,)
        told = flow.column("varying").tolist()
        if log == -math.inf and layers and told[head] == 0 < told[0]:
            return _alike(site)
        return Finding(
            CODE,
            NAME,
            Severity.ERROR,
            f"no gradient leaves the model's output: at {site.place} it is exactly zero",
            cause="softmax over one unit is constant"
            if one
            else "the loss is flat where the output stands: clipped or saturated",
            sites=(site.place,),
            evidence={"output": site.operation, "width": (site.shape or (1,))[-1], "cause": "head"},
            remedies=("one unit per class, or a sigmoid for one unit" if one else "pass logits to the loss",),
        )
    shut = next((i for i in reversed(layers) if _shut(flow, i)), None)
    if shut is not None:
        site, what = flow.sites[shut], "head" if shut == head else "layer"
        return Finding(
            CODE,
            NAME,
            Severity.ERROR,
            f"no gradient passes {site.place}: its weights are zero and frozen",
            cause=f"a {what} of zeros that does not learn",
            sites=(site.place,),
            evidence={"output": site.operation, "cause": "head"},
            remedies=(f"train the {what}, requires_grad_(True), or draw its weights",),
        )
    levels = flow.column("grad_norm_log10").tolist()
    for i in range(top + 1, len(flow.sites)):  # an output function that stands in the loss
        if flow.sites[i].operation in OUTPUTS:
            costs[i] = levels[i - 1] - levels[i]
    for i, cost in costs.items():
        site = flow.sites[i]
        if (
            (site.kind in ("softmax", "activation") or site.operation in OUTPUTS)
            and cost < SATURATED
            and _with_logarithm(flow, i, cost) < SATURATED
        ):
            return Finding(
                CODE,
                NAME,
                Severity.ERROR,
                f"{site.name} at the output is saturated: it alone costs {cost:+.1f} decades",
                cause="a saturated output passes no gradient; the layers before it are not to blame",
                sites=(site.place,),
                evidence={"decades": cost, "threshold": SATURATED, "output": site.operation, "cause": "head"},
                remedies=("pass logits to a loss that is safe in log space", "critical-initialisation"),
            )
    sure = _flat(flow, costs) or _sure(flow)
    return sure or Healthy(f"the gradient at the model's output is not zero (log10 norm {log:.1f})")


def _alike(site: Site) -> Finding:
    """The head gives all samples the very same numbers: a loss of distances between samples has no slope there."""
    return Finding(
        CODE,
        NAME,
        Severity.ERROR,
        f"no gradient leaves the model's output: at {site.place} it is exactly zero, and all samples have the same output",
        cause="the layers lose what tells the samples apart, and the loss compares them with each other",
        sites=(site.place,),
        evidence={"output": site.operation, "told_apart": 0.0, "cause": "initialisation"},
        remedies=("critical-initialisation",),
    )


def _flat(flow: Flow, costs: dict[int, float]) -> Finding | None:
    """A saturated function behind the head that is no activation by name: the squashing of a capsule, a ratio."""
    inside = [i for i, site in enumerate(flow.sites) if site.kind != "loss"]
    told = flow.column("varying").tolist()
    for i, cost in costs.items():
        left = told[inside[-1]] / told[i - 1] if told[i - 1] > 0 else math.nan
        if cost < SATURATED and i in inside and left < ALIKE:
            site = flow.sites[i]
            return Finding(
                CODE,
                NAME,
                Severity.ERROR,
                f"{site.name} behind the head is saturated: it alone costs {cost:+.1f} decades, and the output keeps "
                f"{left:.1g} of what differs between the samples",
                cause="what the head gives is too large for the function behind it",
                sites=(site.place,),
                evidence={
                    "decades": cost,
                    "threshold": SATURATED,
                    "told_apart": left,
                    "told_apart_threshold": ALIKE,
                    "output": site.operation,
                    "cause": "initialisation",
                },
                remedies=("critical-initialisation",),
            )
    return None


def _sure(flow: Flow) -> Finding | None:
    """A softmax or sigmoid that is certain of everything, beside another result that does get a gradient.

    Certain by what it says: a term of the loss whose weight is still zero gets no gradient either.
    """
    for site in flow.sites:
        inside = flow.ledgers.get(site.depth, ())
        heads = [step.level for step in inside if step.site.kind == "linear" and step.level > -math.inf]
        for step in inside:
            beside = step.level - max(heads, default=math.nan)
            certain = step.activation_rms > -ROUNDING * math.log(10)
            if step.site.operation in NORMALISED_LOG and certain and beside < ROUNDING:
                got = "nothing" if beside == -math.inf else f"10^{beside:.0f} of it"
                return Finding(
                    CODE,
                    NAME,
                    Severity.ERROR,
                    f"{step.site.name} is certain of everything: where another result gets a gradient, it gets {got}",
                    cause="the logits are so large that no sample is in doubt; the layers before the head are not to blame",
                    sites=(step.site.place,),
                    evidence={
                        "decades": beside,
                        "threshold": ROUNDING,
                        "output": step.site.operation,
                        "cause": "initialisation",
                    },
                    remedies=("critical-initialisation",),
                )
    return None


def _shut(flow: Flow, index: int) -> bool:
    """Weights of zero pass no gradient before their first step; frozen ones never do."""
    weights = [p for p in flow.parameters if p.name in flow.sites[index].parameters and len(p.shape) > 1]
    shut = bool(weights) and all(p.weight_norm == 0 and p.state == "frozen" for p in weights)
    return shut and float(flow.column("decades")[index]) == -math.inf


def _with_logarithm(flow: Flow, index: int, cost: float) -> float:
    """Decades that an output function costs together with the logarithm of the loss.

    From the logarithm's output to the function's input. A mean on the way spreads the gradient over its elements,
    which costs half a decade for each decade of them and is no loss.
    """
    log = logarithm(flow)
    if log is None or index == 0:
        return cost
    levels = flow.column("grad_norm_log10")
    elements = math.prod(flow.sites[index].shape) / math.prod(log.shape)
    return float(levels[index - 1] - levels[log.depth]) + 0.5 * math.log10(max(elements, 1.0))
