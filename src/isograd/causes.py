"""Why: each candidate cause is changed on a copy of the model, and the flow measured again.

A correlation is not a cause. An intervention changes one property - the activations, the scale of the
weights, a normalisation - and costs one forward and one backward; what it gives back, in decades, is what
that property cost. Properties are changed where they act, in the torch calls themselves, so that
functional code is treated like modules. Nothing here touches the user's model: repairs are remedies.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from isograd.diagnosis import FAR, Diagnosis, Effect, Finding
from isograd.flow import Flow
from isograd.graph.preserve import copied
from isograd.graph.traced import Loss
from isograd.interventions import Intervention, both, candidates
from isograd.measure import measure
from isograd.remedies.exchange_activation import named, own_functions
from isograd.symptoms.vanishing_gradient import FORGOTTEN, damped, spared, stuck

PAIR = ("activation", "initialisation")
"""Causes that act together: the gain of a layer is that of its weights times that of its activation."""
CURED = 1.5
"""Decades that may remain after a change that explains everything: no finding begins below 1.6."""
MOST = 0.7
"""Share of the best change's effect that a less invasive one must reach to be blamed instead."""
OWN = "left out of the product of gains"
"""What no exchange can test, and is read off the backbone."""
TELLING = 0.2
"""Share of the decades that a change must give back to be called a cause."""


def explained(diagnosis: Diagnosis, model: nn.Module, loss: Loss) -> Diagnosis:
    """The same diagnosis with the causes of its errors about depth tested by intervention."""
    depth = [f for f in diagnosis.errors if f.code in ("VG101", "EG201", "EG202") and f.cause != FORGOTTEN]
    if not depth or any(f.code in ("VG102", "RN604") for f in diagnosis.errors):
        return diagnosis
    before = distance(diagnosis.flow)
    effects = list(_own(diagnosis.flow, before))
    after: dict[str, float] = {}
    for change in candidates(diagnosis.flow, model):
        after[change.cause] = _try(change, model, loss)
        given = before - after[change.cause]
        note = "" if not math.isnan(given) else "could not be tested on a copy"
        effects.append(Effect(change.change, change.cause, before, after[change.cause], given, note))
    if "activation" in after:
        effects = _shared(effects, _try(both(diagnosis.flow), model, loss))
    told = {id(f): _told(f, tuple(effects), before) for f in depth}
    return replace(diagnosis, findings=tuple(told.get(id(f), f) for f in diagnosis.findings))


def distance(flow: Flow) -> float:
    """Decades that the signal loses or gains over the hidden sites, in the worse of both directions."""
    if flow.failure is not None or flow.nonfinite is not None or stuck(flow):
        return FAR
    lines = [line for line in (flow, *flow.towers) if not (math.isnan(line.lost) or spared(line))]
    lost = [abs(line.lost) for line in lines]
    return min(max([0.0 if math.isnan(flow.growth) else flow.growth, *lost]), FAR)


def _try(intervention: Intervention, model: nn.Module, loss: Loss) -> float:
    """Distance after the change; NaN where the model or the loss does not let itself be changed."""
    entered = False

    def reached(*_: Any) -> None:
        nonlocal entered
        entered = True

    try:
        changed = copied(model)
        changed.register_forward_pre_hook(reached)
        if intervention.edit is not None:
            intervention.edit(changed)
        mode = intervention.mode

        def exchanged(m: nn.Module) -> Tensor:
            with mode() if mode is not None else nullcontext():
                return loss(m)

        flow = measure(changed, exchanged)
    except Exception:  # a shape that no longer fits, a model that cannot be copied: untested, and said
        return math.nan
    if not entered and not any(p.state == "measured" for p in flow.parameters):
        return math.nan  # the loss closes over its own model
    return distance(flow)


def _own(flow: Flow, before: float) -> Iterator[Effect]:
    """What functions of the user's own cost, in the place of an activation: nobody knows what to exchange them for.

    And what constants cost that the signal is multiplied by.
    """
    if not flow.lost < 0:
        return
    damping = damped(flow)
    if damping:
        cost = min(-sum(math.log10(flow.factors[site.depth]) for site in damping), before)
        where = dict.fromkeys(site.source or site.name for site in damping)
        yield Effect(f"the factors at {', '.join(where)} {OWN}", "factor", before, before - cost, cost)
    sites = own_functions(flow)
    if not sites:
        return
    column = flow.column("decades").nan_to_num(0.0)
    cost = min(-float(sum(column[site.depth] for site in sites)), before)
    if cost <= 0:
        return
    source = next((site.source for site in sites if site.source), "")
    called = f"{named(sites)} ({source})" if source else named(sites)
    yield Effect(f"{called} {OWN}", "activation", before, before - cost, cost)


def _shared(effects: list[Effect], together: float) -> list[Effect]:
    """Activation and initialisation act together: the initialisation gets what it gives back on its own,
    at the best gain there is for the activation in use, and the activation what is left of both.
    """
    pair = {e.cause: e for e in effects if e.cause in PAIR}
    weights = pair["initialisation"]
    if len(pair) < 2 or weights.decades_after < CURED or not together < weights.decades_after:
        return effects
    note = (
        f"what remains of {weights.decades_before - together:.1f} decades that both give back together"
        if weights.decades_before < FAR
        else f"with the weights at its gain, {together:.1f}"
    )
    rest = replace(pair["activation"], given_back=weights.decades_after - together, note=note)
    return [rest if e.cause == "activation" else e for e in effects]


def _told(finding: Finding, effects: tuple[Effect, ...], before: float) -> Finding:
    """The finding with its cause: the least invasive change that gives back most of what any does.

    A residual connection or a normalisation cures almost anything, so that what they give back is no
    sign that their absence was the fault: the effects come in the order in which they are to be blamed.
    """
    tested = [e for e in effects if not math.isnan(e.given_back)]
    telling = [e for e in tested if e.given_back > max(TELLING * before, 0.3)]
    if not telling:
        names = "; ".join(e.intervention for e in tested)
        if finding.cause:
            return replace(finding, effects=effects)
        why = (
            f"none of the changes tried on a copy gives it back: {names}"
            if names
            else "no change could be tried on a copy"
        )
        return replace(finding, cause=why, effects=effects)
    most = max(e.given_back for e in telling)
    first = next(e for e in telling if e.given_back >= MOST * most or e.decades_after < CURED or e.note)
    causes = [first]
    if first.cause in PAIR and any(e.note for e in effects if e.cause in PAIR):
        causes = sorted((e for e in telling if e.cause in PAIR), key=lambda e: -e.given_back)
    others = [e for e in telling if e not in causes and e.given_back >= MOST * most]
    own = first.intervention.endswith(OWN)
    blamed = {**_BLAME, first.cause: first.intervention.removesuffix(f" {OWN}")} if own else _BLAME
    said = ", ".join(f"{blamed[e.cause]} {_cost(e, before)}" for e in causes)
    how = "read off the backbone" if own else "measured by exchange on a copy"
    also = f"; so does another way: {others[0].intervention}" if others else ""
    return replace(
        finding,
        cause=f"{said} ({how}{also})",
        evidence={**finding.evidence, "cause": causes[0].cause, "causes": ",".join(e.cause for e in causes)},
        effects=effects,
        remedies=tuple(dict.fromkeys(_REMEDY[e.cause] for e in (*causes, *others))),
    )


def _cost(effect: Effect, before: float) -> str:
    if before >= FAR:
        return f"let nothing through: changed, {effect.decades_after:.1f} decades remain"
    if effect.given_back >= 0.95 * before:
        return f"cost the {before:.1f} decades"
    return f"cost {effect.given_back:.1f} of the {before:.1f} decades"


_BLAME = {
    "factor": "constant factors",
    "activation": "the activations",
    "initialisation": "the initialisation",
    "missing-normalisation": "missing normalisation",
    "missing-residual": "missing residual connections",
    "batchnorm-without-skips": "batch normalisation without skip connections",
    "dead-units": "dead units",
    "residual-branch-growth": "unscaled residual branches",
    "unnormalised-input": "the unnormalised input",
    "norm-statistics": "the running statistics of batch normalisation in eval mode",
    "norm-gain": "the gains of the normalisation layers",
    "norm-epsilon": "the epsilon of the normalisation layers",
    "precision": "the number format",
}

_REMEDY = {
    "factor": "leave the factors out, or scale the branches instead: x + f(x) with a whole skip",
    "activation": "exchange-activation",
    "initialisation": "critical-initialisation",
    "missing-normalisation": "insert-normalisation",
    "missing-residual": "insert-residual",
    "batchnorm-without-skips": "insert-residual",
    "dead-units": "zero-biases",
    "residual-branch-growth": "scale-residual-branches",
    "unnormalised-input": "standardise-input",
    "norm-statistics": "batch-statistics",
    "norm-gain": "reset-norm-gain",
    "norm-epsilon": "reset-norm-epsilon",
    "precision": "loss-scale",
}
