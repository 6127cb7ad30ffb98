"""exchange-activation: another activation in place of one that takes too much of the gradient.

What it does
    Puts tanh, SELU, ReLU, GELU, SiLU, ELU or leaky ReLU in the place of every sigmoid, tanh, softplus … that the
    whole hidden signal goes through. Modules are replaced, your own as well if they do nothing else; where `forward` calls torch.sigmoid itself, that
    call at that line gives the other function's result, and the line to edit by hand is shown.

When it helps
    The derivative of a sigmoid is at most 1/4, so that no weights in reach make its layers pass the gradient
    on: 20 layers cost a dozen decades. tanh's is 1 at zero, ReLU's is 1 wherever a unit is on. A sigmoid that
    gates a product (LSTM, GLU, squeeze-and-excitation) or is the model's output stays: there it is meant.

Expected effect
    The gain per layer that theory gives for the new function at the present weights. It reaches 1 only with
    weights drawn for the new function: see `critical-initialisation`.

Safety
    Unsafe: the model computes another function.

References
    Glorot and Bengio 2010; Nair and Hinton 2010; Clevert et al. 2016 (ELU); Klambauer et al. 2017 (SELU, with
    LeCun's weights); Hendrycks and Gimpel 2016 (GELU); Ramachandran et al. 2017 (SiLU).
"""

from __future__ import annotations

import linecache
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace

from torch import nn

from isograd.edit import Edit
from isograd.flow import FACTORS, Flow
from isograd.graph.operations import ACTIVATIONS, RECTIFIERS
from isograd.graph.source import where_written
from isograd.layers import Layer, is_chain, layers
from isograd.prescription import Patient, Prescription, Reach, not_applicable
from isograd.remedies.critical_initialisation import biases, gain, weight
from isograd.statistics import Site

SLUG = "exchange-activation"
TREATS = ("activation", "SA301", "VG101", "EG201", "EG202", "NF401", "NF402")
TARGETS = {
    "tanh": ("nn.Tanh", "tanh"),
    "selu": ("nn.SELU", "SELU"),
    "relu": ("nn.ReLU", "ReLU"),
    "gelu": ("nn.GELU", "GELU"),
    "silu": ("nn.SiLU", "SiLU"),
    "elu": ("nn.ELU", "ELU"),
    "leaky_relu": ("nn.LeakyReLU", "leaky ReLU"),
}
"""Function -> its module and what it is called."""
FUSED = "activation_relu_or_gelu"
"""By this number the kernel that `nn.TransformerEncoderLayer` runs in eval() knows its activation; 0: there is none."""
AFFINE = FACTORS | {"add", "radd", "iadd", "sub", "rsub", "isub"}
"""Elementwise calls that are no function by themselves."""
PIECEWISE = {"relu", "leaky_relu", "relu6", "hardtanh", "hardsigmoid"}
"""Linear, piece by piece: without a second derivative."""
ODD = {"sigmoid", "tanh", "hardtanh", "hardsigmoid", "softsign"}
"""S-shaped: tanh is the nearest relative. The rest is one-sided, with ELU the nearest."""


def prescribe(patient: Patient) -> Iterator[Prescription]:
    """One prescription a target, the nearest relative of what is exchanged first."""
    flat = saturating(patient)
    if not flat and (own := own_functions(patient.flow)):
        lines = {site.source: site.operation for site in own if site.source}
        why = f"what stands in the place of an activation is a function of your own: {named(own)}"
        yield not_applicable(SLUG, why, *(_by_hand(source, name, "gelu") for source, name in lines.items()))
        return
    if not flat:
        yield not_applicable(SLUG, "no saturating activation lies on the way of the hidden signal")
        return
    order = ["tanh", "selu", "relu", "gelu", "silu", "elu", "leaky_relu"]
    if differentiated(patient.flow):
        order = ["tanh", "silu", "gelu"]
    elif not set(flat) <= ODD:
        order = ["elu", "relu", "selu", "gelu", "silu", "leaky_relu", "tanh"]
    for target in order:
        if [target] != flat:
            yield exchange(patient, [name for name in flat if name != target], target)


def saturating(patient: Patient) -> list[str]:
    """Functions whose derivative can vanish; without any, what the user's own modules compute."""
    return flat_functions(patient.flow) or own_operations(patient)


def flat_functions(flow: Flow) -> list[str]:
    """Those of the hidden signal whose derivative can vanish.

    Where the loss differentiates the model itself, as that of a differential equation does, what passes back are
    second derivatives: those of piecewise linear functions are zero.
    """
    names = set(functions(flow))
    return sorted(names - RECTIFIERS | (names & PIECEWISE if differentiated(flow) else set()))


def differentiated(flow: Flow) -> bool:
    """Does the loss differentiate the model?"""
    sites = (*flow.sites, *(step.site for steps in flow.ledgers.values() for step in steps))
    return any(site.operation == "grad" for site in sites)


def functions(flow: Flow) -> list[str]:
    """Activation functions that the hidden signal cannot get round, once each, in the order of the forward."""
    return list(
        dict.fromkeys([a.function for a in flow.hidden_activations] + ["softmax"] * bool(flow.simplices))
    )


def own_functions(flow: Flow) -> list[Site]:
    """Sites of functions that torch has no name for, on the way of the hidden signal: a custom Function, a formula.

    Where parameters take part, their scale is no property of the function: a sum of branches, a state space.
    """
    found = [
        site
        for site in flow.sites[flow.hidden]
        if site.kind in ("elementwise", "custom") and not _parametrised(flow, site)
    ]
    return found if {site.operation for site in found} - AFFINE else []


def own_operations(patient: Patient) -> list[str]:
    """Operations of the user's own activation modules, once each, in the order of the forward."""
    return list(dict.fromkeys(site.operation for sites in _own_modules(patient).values() for site in sites))


def _own_modules(patient: Patient) -> dict[str, list[Site]]:
    """Modules without parameters that work on each element of the hidden signal, by path, with what they do."""
    own = own_functions(patient.flow)
    inside = Counter(site.module for site in patient.flow.sites[patient.flow.hidden])
    found: dict[str, list[Site]] = {}
    for site in own:
        if site.module and _is_activation(patient.model.get_submodule(site.module)):
            found.setdefault(site.module, []).append(site)
    return {
        path: sites
        for path, sites in found.items()
        if len(sites) == inside[path] and {site.operation for site in sites} - AFFINE
    }


def _parametrised(flow: Flow, site: Site) -> bool:
    steps = (step.site for step in flow.ledgers.get(site.depth, ()))
    return float(flow.column("weighted")[site.depth]) == 1 or any(s.parameters for s in (site, *steps))


def named(sites: Sequence[Site]) -> str:
    """Their operations, once each: `neg, exp, add, rdiv`."""
    return ", ".join(dict.fromkeys(site.operation for site in sites))


def exchange(
    patient: Patient, names: Sequence[str], target: str, *arguments: float, slug: str = SLUG
) -> Prescription:
    """`target` in place of the named functions; `not_applicable` where nothing of them can be exchanged."""
    edits, by_hand = exchanges(patient, names, target, *arguments)
    called, old = TARGETS[target][1], _said(patient, names)
    count = sum(not edit.place.endswith(FUSED) for edit in edits)
    if not edits:
        why = f"no call of {old} can be told from a gate or the output by its line"
        return not_applicable(slug, why, *by_hand)
    found = layers(patient.flow, patient.model, dict.fromkeys(names, target))
    title, drawn = f"{called} in place of {old} ({count})", ()
    if target == "selu":  # without these weights it does not normalise itself
        title += " with LeCun's weights"
        drawn = (
            *(weight(la, "nn.init.normal_", {"std": float(f"{la.fan_in**-0.5:.6g}")}) for la in found),
            *biases(found, zero=True),
        )
        found = [_lecun(layer) for layer in found]
    decades = chain(patient.flow, found)
    count = sum(not layer.head for layer in found)
    said = f"{decades:+.1f} decades over {count} layers at these weights"
    return Prescription(
        slug,
        title,
        (*edits, *drawn),
        reach=Reach.ACTIVATION,
        treats=TREATS,
        expected="" if math.isnan(decades) else said,
        decades=decades,
        references=("Glorot and Bengio 2010",),
        advice=tuple(by_hand),
    )


def _said(patient: Patient, names: Sequence[str]) -> str:
    """What is exchanged: functions by their names, the user's own modules by their classes."""
    own = [type(patient.model.get_submodule(path)).__name__ for path in _own_modules(patient)]
    return ", ".join(dict.fromkeys(own if own and names == own_operations(patient) else names))


def target_of(rx: Prescription) -> str:
    """The function that a prescription of this remedy puts in place."""
    called = rx.title.partition(" in place of ")[0]
    return next(name for name, (_, said) in TARGETS.items() if said == called)


def exchanges(
    patient: Patient, names: Sequence[str], target: str, *arguments: float
) -> tuple[list[Edit], list[str]]:
    """The edits that put `target` in place of the named functions, and the lines to change by hand."""
    edits: dict[str, Edit] = {}
    by_hand: list[str] = []
    calls: dict[tuple[str, str], list[str]] = {}
    hidden = patient.flow.hidden_activations
    called = Counter((a.site.module, a.function) for a in patient.flow.activations)
    seen = Counter((a.site.module, a.function) for a in hidden)
    elsewhere = {  # a call that each run of the model makes stands where it stands in all of them
        (a.site.module, a.function, a.site.source)
        for a in patient.flow.activations
        if a not in hidden
        and called[a.site.module, a.function] > patient.flow.calls * max(seen[a.site.module, a.function], 1)
    }
    gating = {(path, function) for path, function, _ in elsewhere}
    for site, function in [
        *((a.site, a.function) for a in hidden),
        *((s, "softmax") for s in patient.flow.simplices),
    ]:
        path = site.module
        if function not in names:
            continue
        module = patient.model.get_submodule(path)
        attribute = _attribute(module, function)
        if path and _is_activation(module):
            if (path, function) in gating:
                by_hand.append(
                    f"{path}: a gate or the output goes through it too; give the layers one of their own"
                )
                continue
            kept = {"negative_slope": arguments[0]} if target == "leaky_relu" and arguments else {}
            edits[path] = Edit(path, "replace", TARGETS[target][0], {**kept}, before=repr(module))
        elif attribute and not arguments:
            place = f"{path}.{attribute}".lstrip(".")
            of = f"nn.functional.{target}"
            edits[place] = Edit(place, "set", of, before=function, source=site.source)
            if hasattr(module, FUSED):
                fused = f"{path}.{FUSED}".lstrip(".")
                edits[fused] = Edit(fused, "set", arguments={"value": 0}, before=str(getattr(module, FUSED)))
        elif not site.source:  # exchanged before, or called from generated code
            by_hand.append(f"{path or 'the model'}: the line that calls {function} is not known")
        elif (path, function, site.source) in elsewhere:
            by_hand.append(_by_hand(site.source, function, target, "a call here gates or is the output: "))
        else:
            calls.setdefault((path, function), []).append(site.source)
    for path, sites in _own_modules(patient).items():
        if {site.operation for site in sites} <= set(names):
            edits[path] = Edit(
                path, "replace", TARGETS[target][0], before=repr(patient.model.get_submodule(path))
            )
    for (path, function), sources in calls.items():
        lines = tuple(sorted({line_of(source) for source in sources}))
        for source in dict.fromkeys(sources):
            by_hand.append(_by_hand(source, function, target))
        given = {"of": function, "to": target, "lines": lines, **({"extra": arguments} if arguments else {})}
        before, source = f"{function}(…)", sources[0]
        edits[f"{path}:{function}"] = Edit(path, "alter", "calls.exchange_calls", given, None, before, source)
    return list(edits.values()), list(dict.fromkeys(by_hand))


def chain(flow: Flow, found: list[Layer]) -> float:
    """Decades that theory expects of a plain chain at the weights that it has; NaN where it is none."""
    if not is_chain(flow, found):
        return math.nan
    total = 0.0
    hidden = [la for la in found if not la.head and la.sigma_w > 0]
    for name, count in Counter(la.activation for la in hidden).items():
        # log gain is all but linear in log sigma_w over the scatter of one kind of layer: one average is enough
        mean = sum(math.log(la.sigma_w) for la in hidden if la.activation == name) / count
        factor = gain(name, float(f"{math.exp(mean):.3g}"))
        total += count * math.log10(factor) if factor > 0 else -math.inf
    return total


def _lecun(layer: Layer) -> Layer:
    return replace(layer, sigma_w=1.0)


def _is_activation(module: nn.Module) -> bool:
    """A module that does nothing else."""
    leaf = next(module.children(), None) is None and next(module.parameters(), None) is None
    return leaf and not isinstance(module, nn.RNNBase)


def _attribute(module: nn.Module, function: str) -> str:
    """Attribute of the module that holds the function: `activation` of nn.TransformerEncoderLayer."""
    for name, value in vars(module).items():
        if not name.startswith("_") and callable(value) and getattr(value, "__name__", "") == function:
            return name
    return ""


def line_of(source: str) -> str:
    """`net.py:17`: the same from wherever the script is started."""
    return source.replace("\\", "/").rpartition("/")[2]


def _by_hand(source: str, function: str, target: str, why: str = "") -> str:
    where = where_written(source)
    if where != source:
        return f"{where}: {why}activation={target!r} in place of {function}"
    file, _, number = source.rpartition(":")
    text = linecache.getline(file, int(number)).strip() if number.isdigit() else ""
    new = f"torch.{target}" if target in ("tanh", "relu", "selu") else f"torch.nn.functional.{target}"
    said = f"{text}: " if text and function in ACTIVATIONS else ""
    return f"{source}: {why}{said}{new} in place of {function}"
