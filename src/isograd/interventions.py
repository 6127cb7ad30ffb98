"""Changes of one property on a copy of a model, each of which tests one candidate cause.

Weights are changed in place on the copy, by the edits of the remedy where there is one that says the same;
everything else where it acts: in the torch calls themselves, by a `TorchFunctionMode` around the loss, so that
functional code is treated like modules.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from isograd.diagnosis import Diagnosis
from isograd.flow import Flow
from isograd.graph.operations import ACTIVATIONS, kind_of_call, parameter_of
from isograd.layers import multiplied
from isograd.prescription import Patient, Prescription, apply
from isograd.remedies import batch_statistics, reset_norm_epsilon, reset_norm_gain
from isograd.remedies.critical_initialisation import scale
from isograd.remedies.exchange_activation import differentiated, flat_functions
from isograd.remedies.scale_residual_branches import ends


@dataclass(frozen=True)
class Intervention:
    """One property changed on a copy: weights by `edit`, torch calls by `mode`."""

    cause: str
    """Slug: activation, initialisation, missing-normalisation …"""
    change: str
    """What is done: 'exchange sigmoid for ReLU'."""
    edit: Callable[[nn.Module], None] | None = None
    mode: Callable[[], TorchFunctionMode] | None = None


CALLED = {"relu": "ReLU", "silu": "SiLU"}


def _functions(flow: Flow) -> Counter[str]:
    """Activation functions that the hidden signal cannot get round, with their number."""
    return Counter(a.function for a in flow.hidden_activations)


def _flat(flow: Flow) -> tuple[set[str], str]:
    """Functions whose derivative can vanish, and what takes their place."""
    return set(flat_functions(flow)), "silu" if differentiated(flow) else "relu"


def both(flow: Flow) -> Intervention:
    """ReLU in place of what saturates, with the weights at ReLU's critical gain."""
    flat, other = _flat(flow)
    return Intervention(
        "",
        "",
        edit=lambda m: _critical(m, flow, other),
        mode=lambda: _Exchange(flat, getattr(F, other)),
    )


def candidates(flow: Flow, model: nn.Module) -> Iterator[Intervention]:
    """Changes that apply to this model at all, the most specific first, the most invasive last."""
    names = _functions(flow)
    common = names.most_common(1)[0][0] if names else "linear"
    patient = Patient(model, Diagnosis(flow))
    kinds = {s.kind for s in flow.sites} | {s.site.kind for steps in flow.ledgers.values() for s in steps}
    flat, other = _flat(flow)
    dead = {a.function for a in flow.activations if a.bottleneck and a.dead > 0.5}

    if any(seen.rms > 3 or 0 < seen.rms < 0.1 for seen in flow.inputs.values()):
        yield Intervention("unnormalised-input", "inputs standardised", edit=_standardise)
    for remedy, cause, change in (
        (batch_statistics, "norm-statistics", "batch normalisation by the statistics of this batch"),
        (reset_norm_epsilon, "norm-epsilon", "epsilon of the normalisation layers set to 1e-5"),
        (reset_norm_gain, "norm-gain", "gains of the normalisation layers set to 1"),
    ):
        for rx in remedy.prescribe(patient):
            if rx.applicable:
                yield Intervention(cause, change, edit=partial(_made, rx))
    if dead:
        yield Intervention(
            "dead-units",
            f"{', '.join(sorted(dead))} exchanged for leaky ReLU of slope 0.5 and biases set to 0",
            edit=_zero_biases,
            mode=lambda: _Exchange(dead, lambda x: F.leaky_relu(x, 0.5)),
        )
    if any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules()) and not flow.splits:
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
            f"{', '.join(sorted(flat))} exchanged for {CALLED[other]}",
            mode=lambda: _Exchange(flat, getattr(F, other)),
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


def _made(rx: Prescription, model: nn.Module) -> None:
    """The edits of a remedy, on a copy that is thrown away."""
    apply(model, rx, in_place=True)


@torch.no_grad()
def _critical(model: nn.Module, flow: Flow, activation: str) -> None:
    """Scale the weights of every layer to the standard deviation that keeps the gradient at criticality."""
    (sigma_w, sigma_b), times = scale(activation), multiplied(flow, model)
    # by their order: a copied Keras model calls its parameters by other names
    for known, parameter in zip(flow.parameters, model.parameters(), strict=True):
        deviation = sigma_w / math.sqrt(max(known.fan_in, 1)) / times.get(known.name.rpartition(".")[0], 1.0)
        if known.bias:
            nn.init.normal_(parameter, 0.0, sigma_b) if sigma_b else nn.init.zeros_(parameter)
        for weight in parameter.chunk(known.matrices) if known.fan_in and not known.bias else ():
            if (spread := float(weight.float().std())) > 0:
                weight.sub_(weight.mean()).mul_(deviation / spread)
            else:  # constant: nothing to scale, so drawn
                nn.init.normal_(weight, 0.0, deviation)


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
    for name in ends(flow, model):
        for parameter in model.get_submodule(name).parameters(recurse=False):
            parameter.mul_(len(flow.splits) ** -0.5)


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
