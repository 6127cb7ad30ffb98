"""Why: each candidate cause is changed on a copy of the model, and the flow measured again.

A correlation is not a cause. An intervention changes one property - the activations, the scale of the
weights, a normalisation - and costs one forward and one backward; what it gives back, in decades, is what
that property cost. Properties are changed where they act, in the torch calls themselves, so that
functional code is treated like modules. Nothing here touches the user's model: repairs are remedies.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from isograd import theory
from isograd.diagnosis import Diagnosis, Effect, Finding
from isograd.flow import Flow
from isograd.measure import Loss, measure
from isograd.operations import ACTIVATIONS, WEIGHTED, kind_of_call, parameter_of

FAR = 400.0
"""Decades that stand for a gradient that is exactly zero or not finite: beyond any that is measured."""
PAIR = ("activation", "initialisation")
"""Causes that act together: the gain of a layer is that of its weights times that of its activation."""
CURED = 1.5
"""Decades that may remain after a change that explains everything: no finding begins below 1.6."""
MOST = 0.7
"""Share of the best change's effect that a less invasive one must reach to be blamed instead."""
TELLING = 0.2
"""Share of the decades that a change must give back to be called a cause."""


@dataclass(frozen=True)
class Intervention:
    """One property changed on a copy: weights by `edit`, torch calls by `mode`."""

    cause: str
    """Slug: activation, initialisation, missing-normalisation …"""
    change: str
    """What is done: 'exchange sigmoid for ReLU'."""
    edit: Callable[[nn.Module], None] | None = None
    mode: Callable[[], TorchFunctionMode] | None = None


def explained(diagnosis: Diagnosis, model: nn.Module, loss: Loss) -> Diagnosis:
    """The same diagnosis with the causes of its errors about depth tested by intervention."""
    depth = [f for f in diagnosis.errors if f.code in ("VG101", "EG201", "EG202")]
    if not depth or any(f.code == "VG102" for f in diagnosis.errors):
        return diagnosis
    before = distance(diagnosis.flow)
    effects: list[Effect] = []
    after: dict[str, float] = {}
    for change in _candidates(diagnosis.flow, model):
        after[change.cause] = _try(change, model, loss)
        given = before - after[change.cause]
        note = "" if not math.isnan(given) else "could not be tested on a copy"
        effects.append(Effect(change.change, change.cause, before, after[change.cause], given, note))
    if "activation" in after:
        effects = _shared(effects, _try(_both(diagnosis.flow), model, loss))
    told = {id(f): _told(f, tuple(effects), before) for f in depth}
    return replace(diagnosis, findings=tuple(told.get(id(f), f) for f in diagnosis.findings))


def distance(flow: Flow) -> float:
    """Decades that the signal loses or gains over the hidden sites, in the worse of both directions."""
    if flow.failure is not None or flow.nonfinite is not None:
        return FAR
    lost = [abs(line.lost) for line in (flow, *flow.towers) if not math.isnan(line.lost)]
    return min(max([0.0 if math.isnan(flow.growth) else flow.growth, *lost]), FAR)


def _try(intervention: Intervention, model: nn.Module, loss: Loss) -> float:
    """Distance after the change; NaN where the model or the loss does not let itself be changed."""
    entered = False

    def reached(*_: Any) -> None:
        nonlocal entered
        entered = True

    try:
        changed = copy.deepcopy(model)
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


def _shared(effects: list[Effect], together: float) -> list[Effect]:
    """Activation and initialisation act together: the initialisation gets what it gives back on its own,
    at the best gain there is for the activation in use, and the activation what is left of both.
    """
    pair = {e.cause: e for e in effects if e.cause in PAIR}
    weights = pair["initialisation"]
    if len(pair) < 2 or weights.decades_after < CURED or not together < weights.decades_after:
        return effects
    note = f"what remains of {weights.decades_before - together:.1f} decades that both give back together"
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
    said = ", ".join(f"{_BLAME[e.cause]} {_cost(e, before)}" for e in causes)
    also = f"; so does another way: {others[0].intervention}" if others else ""
    return replace(
        finding,
        cause=f"{said} (measured by exchange on a copy{also})",
        evidence={**finding.evidence, "cause": causes[0].cause, "causes": ",".join(e.cause for e in causes)},
        effects=effects,
        remedies=tuple(dict.fromkeys(_REMEDY[e.cause] for e in (*causes, *others))),
    )


def _cost(effect: Effect, before: float) -> str:
    if before >= FAR:
        return f"let nothing finite through: changed, {effect.decades_after:.1f} decades remain"
    if effect.given_back >= 0.95 * before:
        return f"cost the {before:.1f} decades"
    return f"cost {effect.given_back:.1f} of the {before:.1f} decades"


_BLAME = {
    "activation": "the activations",
    "initialisation": "the initialisation",
    "missing-normalisation": "missing normalisation",
    "missing-residual": "missing residual connections",
    "batchnorm-without-skips": "batch normalisation without skip connections",
    "dead-units": "dead units",
    "residual-branch-growth": "unscaled residual branches",
    "unnormalised-input": "the unnormalised input",
    "norm-gain": "the gains of the normalisation layers",
    "norm-epsilon": "the epsilon of the normalisation layers",
    "precision": "the number format",
}

_REMEDY = {
    "activation": "exchange-activation",
    "initialisation": "critical-initialisation",
    "missing-normalisation": "insert-normalisation",
    "missing-residual": "insert-residual",
    "batchnorm-without-skips": "insert-residual",
    "dead-units": "zero-biases",
    "residual-branch-growth": "scale-residual-branches",
    "unnormalised-input": "standardise-input",
    "norm-gain": "reset-norm-gain",
    "norm-epsilon": "reset-norm-epsilon",
    "precision": "loss-scale",
}


# -- candidates ------------------------------------------------------------------------------------


SELF_GATED = {"relu", "leaky_relu", "gelu", "elu", "silu", "selu", "celu", "mish", "hardswish", "relu6"}
"""Activations that pass about half of their input unchanged: exchanging them for ReLU tests nothing."""


def _functions(flow: Flow) -> Counter[str]:
    """Activation functions that the hidden signal cannot get round, with their number."""
    hidden = set(flow.sites[flow.hidden])
    return Counter(
        a.function for a in flow.activations if a.bottleneck and (a.site.depth < 0 or a.site in hidden)
    )


def _both(flow: Flow) -> Intervention:
    """ReLU in place of what saturates, with the weights at ReLU's critical gain."""
    flat = set(_functions(flow)) - SELF_GATED
    return Intervention(
        "", "", edit=lambda m: _critical(m, flow, "relu"), mode=lambda: _Exchange(flat, F.relu)
    )


def _candidates(flow: Flow, model: nn.Module) -> Iterator[Intervention]:
    """Changes that apply to this model at all, the most specific first, the most invasive last."""
    names = _functions(flow)
    common = names.most_common(1)[0][0] if names else "linear"
    norms = [m for m in model.modules() if _is_norm(m)]
    kinds = {s.kind for s in flow.sites} | {s.site.kind for steps in flow.ledgers.values() for s in steps}
    flat = set(names) - SELF_GATED
    dead = {a.function for a in flow.activations if a.bottleneck and a.dead > 0.5}

    if any(seen.rms > 3 or 0 < seen.rms < 0.1 for seen in flow.inputs.values()):
        yield Intervention("unnormalised-input", "inputs standardised", edit=_standardise)
    if any(not 1e-8 <= _epsilon(m) <= 1e-2 for m in norms):
        yield Intervention(
            "norm-epsilon", "epsilon of the normalisation layers set to 1e-5", edit=_reset_epsilon
        )
    if any(_gain_off(m) for m in norms):
        yield Intervention("norm-gain", "gains of the normalisation layers set to 1", edit=_reset_gains)
    if dead:
        yield Intervention(
            "dead-units",
            f"{', '.join(sorted(dead))} exchanged for leaky ReLU of slope 0.5 and biases set to 0",
            edit=_zero_biases,
            mode=lambda: _Exchange(dead, lambda x: F.leaky_relu(x, 0.5)),
        )
    if any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in norms) and not flow.splits:
        yield Intervention(
            "batchnorm-without-skips",
            "batch normalisation taken out and the weights scaled to the critical gain",
            edit=lambda m: _critical(m, flow, common),
            mode=lambda: _WithoutBatchNorm(),
        )
    yield Intervention(
        "initialisation",
        f"weights scaled to the critical gain for {common}, biases to its variance",
        edit=lambda m: _critical(m, flow, common),
    )
    if flat:
        yield Intervention(
            "activation",
            f"{', '.join(sorted(flat))} exchanged for ReLU",
            mode=lambda: _Exchange(flat, F.relu),
        )
    if flow.splits:
        yield Intervention(
            "residual-branch-growth",
            "last layer of each residual branch scaled by 1/sqrt(number of branches)",
            edit=lambda m: _scale_branches(m, flow),
        )
    if "normalisation" not in kinds:
        yield Intervention(
            "missing-normalisation",
            "each linear layer and convolution normalised over its features",
            mode=lambda: _Normalise(sum(p.fan_in > 0 for p in flow.parameters)),
        )
    if not flow.splits:
        yield Intervention(
            "missing-residual",
            "a skip connection around each layer that keeps its width",
            mode=lambda: _Skip(max(flow.layers, 1)),
        )


# -- edits of a copy's weights ---------------------------------------------------------------------


EPSILONS = ("eps", "variance_epsilon", "epsilon")


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower() and next(module.children(), None) is None


def _gain_off(module: nn.Module) -> bool:
    gain = getattr(module, "weight", None)
    return (
        isinstance(gain, Tensor)
        and gain.ndim == 1
        and not 0.3 < float(gain.detach().float().square().mean().sqrt()) < 3
    )


@torch.no_grad()
def _critical(model: nn.Module, flow: Flow, activation: str) -> None:
    """Scale the weights of every layer to the standard deviation that keeps the gradient at criticality."""
    sigma_w, sigma_b = _sigma(activation)
    parameters = dict(model.named_parameters())
    for known in flow.parameters:
        parameter, deviation = parameters[known.name], sigma_w / math.sqrt(max(known.fan_in, 1))
        if known.bias:
            nn.init.normal_(parameter, 0.0, sigma_b) if sigma_b else nn.init.zeros_(parameter)
        elif known.fan_in and (spread := float(parameter.float().std())) > 0:
            parameter.sub_(parameter.mean()).mul_(deviation / spread)
        elif known.fan_in:  # constant: nothing to scale, so drawn
            nn.init.normal_(parameter, 0.0, deviation)


def _sigma(activation: str) -> tuple[float, float]:
    """Critical standard deviations of weights (times sqrt(fan_in)) and biases.

    Where there is none (softplus), or only deep in saturation (the sigmoid's 10.1), no initialisation
    makes the network trainable; then the better of Xavier's and He's.
    """
    if activation not in ACTIVATIONS:
        return 1.0, 0.0
    try:
        point = theory.critical(activation)
        if point.sigma_w <= 2:
            return point.sigma_w, math.sqrt(point.sigma_b2)
    except ValueError:
        pass
    return min((1.0, math.sqrt(2)), key=lambda s: abs(math.log(theory.gain(activation, sigma_w=s)))), 0.0


@torch.no_grad()
def _reset_gains(model: nn.Module) -> None:
    for module in model.modules():
        gain, shift = getattr(module, "weight", None), getattr(module, "bias", None)
        if _is_norm(module) and isinstance(gain, Tensor) and gain.ndim == 1:
            nn.init.ones_(gain)
            if isinstance(shift, Tensor):
                nn.init.zeros_(shift)


def _epsilon(module: nn.Module) -> float:
    return next(
        (float(v) for v in (getattr(module, n, None) for n in EPSILONS) if isinstance(v, float)), 1e-5
    )


def _reset_epsilon(model: nn.Module) -> None:
    for module in filter(_is_norm, model.modules()):
        for name in EPSILONS:
            if hasattr(module, name):
                setattr(module, name, 1e-5)


@torch.no_grad()
def _zero_biases(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)


def _standardise(model: nn.Module) -> None:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        def standard(x: Any) -> Any:
            if not isinstance(x, Tensor) or not x.is_floating_point() or x.numel() < 2:
                return x
            dims = 0 if x.ndim == 2 and len(x) > 1 else tuple(range(x.ndim))
            return (x - x.mean(dims, keepdim=True)) / (x.std(dims, keepdim=True) + 1e-6)

        return tuple(map(standard, args)), {key: standard(value) for key, value in kwargs.items()}

    model.register_forward_pre_hook(hook, with_kwargs=True)


@torch.no_grad()
def _scale_branches(model: nn.Module, flow: Flow) -> None:
    """Scale the last layer with parameters of every residual branch by 1/sqrt(branches)."""
    modules = dict(model.named_modules())
    factor = len(flow.splits) ** -0.5
    scaled: set[str] = set()
    for depth in flow.splits:
        for step in flow.ledgers.get(depth, ()):
            module = modules.get(step.site.module)
            if step.site.kind not in (*WEIGHTED, "normalisation") or module is None:
                continue
            if step.site.module not in scaled:
                scaled.add(step.site.module)
                for parameter in module.parameters(recurse=False):
                    parameter.mul_(factor)
            break


# -- edits of torch calls --------------------------------------------------------------------------


class _Calls(TorchFunctionMode):
    """Base: sees every torch call by name; `change` returns the call's result."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = getattr(func, "__name__", "").strip("_")
        return self.change(name, func, args, kwargs or {})

    def change(
        self, name: str, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        raise NotImplementedError


class _Exchange(_Calls):
    """Another activation function in place of the named ones."""

    def __init__(self, names: set[str], other: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.names, self.other = names, other

    def change(
        self, name: str, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if name in self.names and args and isinstance(args[0], Tensor):
            return self.other(args[0])
        return func(*args, **kwargs)


class _WithoutBatchNorm(_Calls):
    def change(
        self, name: str, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        return args[0] if name == "batch_norm" else func(*args, **kwargs)


class _Normalise(_Calls):
    """Zero mean and unit variance over the features behind every layer but the head."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.left = layers

    def change(
        self, name: str, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        out = func(*args, **kwargs)
        kind = kind_of_call(name, args, kwargs)
        if kind in ("linear", "convolution") and isinstance(out, Tensor) and out.ndim > 1:
            self.left -= 1
            if self.left > 0:
                return F.layer_norm(out, out.shape[-1:] if kind == "linear" else out.shape[1:])
        return out


class _Skip(_Calls):
    """h + f(h) / sqrt(depth) around every layer, with its activation, that keeps the shape."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.scale = depth**-0.5
        self.entered: dict[int, tuple[Tensor, Tensor]] = {}
        """Input of the layer that a tensor came from, by the tensor's id; the tensor is held with it."""

    def change(
        self, name: str, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        out = func(*args, **kwargs)
        if not args or not isinstance(out, Tensor):
            return out
        came_from = self.entered.get(id(args[0]))
        if kind_of_call(name, args, kwargs) in ("linear", "convolution"):
            x = next((a for a in args if isinstance(a, Tensor) and parameter_of(a) is None), None)
            if x is not None:
                self.entered[id(out)] = (x, out)
        elif came_from is not None and name in ACTIVATIONS and came_from[0].shape == out.shape:
            return came_from[0] + out * self.scale
        elif came_from is not None and name in BETWEEN:
            self.entered[id(out)] = (came_from[0], out)
        return out


BETWEEN = {"batch_norm", "layer_norm", "group_norm", "rms_norm", "add", "dropout"}
"""Calls that may stand between a layer and its activation."""
