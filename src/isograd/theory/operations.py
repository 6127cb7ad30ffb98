"""The sites of a measured flow as operations of theory, with the weights' own scales; None where it has no word."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from isograd.flow import Flow
from isograd.statistics import Parameter, Site, Step
from isograd.theory.blocks import (
    Averaging,
    BatchNorm,
    Dropout,
    Interpolated,
    LayerNorm,
    Linear,
    Residual,
    RMSNorm,
    Scale,
)
from isograd.theory.chain import Operation, Signal, propagate
from isograd.theory.quadrature import NAMES, Phi

SHARPEST = 2.0
"""Standard deviation of attention logits up to which attention averages; sharper, the gradient goes by way of
queries and keys too, for which theory has no word."""
SMALLEST = 1e-30
"""An rms below this, or above its inverse, is beyond what float64 averages of its fourth power hold."""


def is_signal(rms: float) -> bool:
    return SMALLEST < rms < 1 / SMALLEST


def width_of(site: Site) -> float:
    dim = 1 if site.kind == "convolution" or len(site.shape) == 4 else -1
    return float(site.shape[dim]) if len(site.shape) > 1 else math.inf


class Operations:
    """Sites and steps of a flow as operations of theory; None where theory has none."""

    def __init__(self, flow: Flow) -> None:
        self.flow = flow
        self.parameters = {p.name: p for p in flow.parameters}
        self.classes = {m.path: m.kind for m in flow.modules}
        self.rms = [float(v) for v in flow.column("activation_rms")]

    def gaussian(self, site: Site, before: bool) -> bool:
        """Are the units behind this site Gaussian with mean zero, as an activation of theory needs them?"""
        if site.kind in ("linear", "convolution", "normalisation"):
            return True
        return before and site.kind in ("reshape", "dropout")

    def site(self, index: int, before: float, gaussian: bool) -> list[Operation] | None:
        """The operations of one backbone site; `before`: rms of its input."""
        site = self.flow.sites[index]
        if site.kind == "residual add":
            return self._residual(index)
        shape = self.flow.sites[index - 1].shape
        return self._operation(site, before, self.rms[index], gaussian, shape)

    def _operation(
        self, site: Site, before: float, after: float, gaussian: bool, shape: tuple[int, ...]
    ) -> list[Operation] | None:
        match site.kind:
            case "linear" | "convolution":
                return self._linear(site, shape)
            case "activation":
                # Max-pooling sends the gradient back where the unit was largest, and so where its slope is.
                behind = self.flow.sites[site.depth + 1 : site.depth + 2] if site.depth >= 0 else ()
                pooled = any(site.kind == "pooling" for site in behind)
                phi = self._phi(site) if gaussian and not pooled else None
                return None if phi is None else [Interpolated(phi)]
            case "normalisation":
                return self._norm(site, after)
            case "dropout":
                kept = (before / after) ** 2 if is_signal(after) and is_signal(before) else 1.0
                return [Dropout(max(1 - kept, 0.0))]
            case "reshape":
                return [] if site.operation in SAME_VALUES else None
            case _:
                return None

    def _linear(self, site: Site, shape: tuple[int, ...]) -> list[Operation] | None:
        weights = [p for p in self._known(site) if len(p.shape) > 1]
        biases = [p for p in self._known(site) if len(p.shape) == 1]
        if len(weights) != 1 or not weights[0].fan_in or not weights[0].weight_norm > 0:
            return None
        weight, taps = weights[0], 1.0
        if site.kind == "convolution":
            known = _taps(site, weight, shape)
            if known is None:
                return None
            taps = known
        outputs = weight.shape[0] if site.kind == "convolution" else math.prod(weight.shape) // weight.fan_in
        bias = math.sqrt(sum(p.rms**2 for p in biases))
        return [Linear(weight.fan_in, outputs, weight.rms * math.sqrt(taps), bias)]

    def _known(self, site: Site) -> list[Parameter]:
        return [self.parameters[name] for name in site.parameters if name in self.parameters]

    def _phi(self, site: Site) -> Phi | None:
        named = WRITTEN_OUT.get(self.classes.get(site.module, ""))
        if named is not None:
            return named
        return _function(site.operation, site.settings)

    def _norm(self, site: Site, after: float) -> list[Operation] | None:
        """Its output's rms stands for its weight: however it is written, that is what it holds the signal at."""
        if not is_signal(after):
            return None
        if site.operation == "batch_norm":
            values = math.prod(site.shape) // site.shape[1] if len(site.shape) > 1 else 0
            training = _setting(site, "training", 5, False) is True
            return [BatchNorm(after, batch=values)] if training and values > 3 else None
        kind = self.classes.get(site.module, "").lower()
        if site.operation == "rms_norm" or "rmsnorm" in kind:
            return [RMSNorm(after, eps=0.0)]
        return [LayerNorm(after, eps=0.0)] if site.operation == "layer_norm" else None

    # -- residual blocks -------------------------------------------------------------------------------

    def _residual(self, index: int) -> list[Operation] | None:
        flow = self.flow
        split, steps = flow.splits.get(index), flow.ledgers.get(index, ())
        if split is None or not steps or not all(step.branch for step in steps) or not split.skip > 0:
            return None
        branch = self._branch([s for s in reversed(steps) if s.site.kind != "reshape"], index)
        # The share by the skip is its factor, whatever it is written as: a constant times the stream.
        return None if branch is None else [Residual(tuple(branch), skip=split.skip)]

    def _branch(self, steps: Sequence[Step], index: int) -> list[Operation] | None:
        """The operations of a branch, input first, each on what theory expects of the one before it."""
        chain, gaussian = list[Operation](), False
        before, shape = self.rms[index - 1], self.flow.sites[index - 1].shape
        signal = Signal(before**2, width=width_of(self.flow.sites[index - 1])) if is_signal(before) else None
        last: tuple[str, ...] = ()
        for step in self._folded(steps):
            site, after = step.site, step.activation_rms
            if signal is None or not is_signal(after):
                return None
            part = self._step(site, signal, after, gaussian, shape, last)
            if part is None:
                return None
            chain += part
            signal = replace(propagate(part, signal).signal, q=after**2)
            gaussian = self.gaussian(site, gaussian)
            shape, last = site.shape, site.parameters
        return chain or None

    def _folded(self, steps: Sequence[Step]) -> Iterable[Step]:
        """A normalisation or an activation written out in a module of its own counts once, by its last step."""
        for i, step in enumerate(steps):
            module = step.site.module
            kind = self.classes.get(module, "")
            written = "norm" in kind.lower() or kind in WRITTEN_OUT
            if not written:
                yield step
            elif i + 1 == len(steps) or steps[i + 1].site.module != module:
                name = "normalisation" if "norm" in kind.lower() else "activation"
                yield replace(step, site=replace(step.site, kind=name))

    def _step(
        self,
        site: Site,
        signal: Signal,
        after: float,
        gaussian: bool,
        shape: tuple[int, ...],
        last: tuple[str, ...],
    ) -> list[Operation] | None:
        if site.operation == "multi_head_attention_forward":
            return self._packed_attention(site, signal, after)
        if site.kind in ("attention", "product"):
            values = [] if site.parameters == last else self._linear(replace(site, kind="linear"), shape)
            if not site.parameters or values is None:
                return None
            averaged = _averaging(propagate(values, signal).signal, after)
            return None if averaged is None else [*values, averaged]
        if site.operation == "mul" and (site.parameters or site.settings):  # a constant, or LayerScale
            return [Scale(after / signal.rms)]
        return self._operation(site, signal.rms, after, gaussian, shape)

    def _packed_attention(self, site: Site, signal: Signal, after: float) -> list[Operation] | None:
        """torch's own attention: one weight for query, key and value, and one behind them."""
        weights = [p for p in self._known(site) if len(p.shape) == 2]
        if len(weights) != 2:
            return None
        values, out = (Linear(p.shape[1], p.shape[1], p.rms) for p in weights)
        averaged = _averaging(propagate([values, out], signal).signal, after)
        sharp = propagate([values], signal).signal.q > SHARPEST
        return None if averaged is None or sharp else [values, averaged, out]


def _averaging(values: Signal, after: float) -> Averaging | None:
    """How far an attention averages out what it reads depends on the data: it is told from the forward pass.

    With queries and keys drawn like the values, the logits scatter as much as these have variance.
    """
    return Averaging(min(after**2 / values.q, 1.0)) if 0 < values.q <= SHARPEST else None


def _taps(site: Site, weight: Parameter, shape: tuple[int, ...]) -> float | None:
    """Share of a convolution's taps that lie on its input and not on its padding; None: not a plain one."""
    dims = len(weight.shape) - 2
    plain = site.operation in ("conv1d", "conv2d", "conv3d", "convolution")
    strides, paddings, dilations = (
        _setting(site, name, position, default)
        for name, position, default in (("stride", 3, 1), ("padding", 4, 0), ("dilation", 5, 1))
    )
    if (
        not plain
        or isinstance(paddings, str)
        or _setting(site, "groups", 6, 1) != 1
        or len(shape) != dims + 2
    ):
        return None
    share = 1.0
    for d in range(dims):
        stride, padding, dilation = (_at(value, d) for value in (strides, paddings, dilations))
        size, kernel, outputs = shape[d + 2], weight.shape[d + 2], site.shape[d + 2]
        places = [o * stride - padding + k * dilation for o in range(outputs) for k in range(kernel)]
        share *= sum(0 <= place < size for place in places) / max(len(places), 1)
    return share


def _setting(site: Site, name: str, position: int, default: object) -> object:
    """An argument of the site's call, however it was given."""
    given = dict(site.settings)
    return given.get(name, given.get(position, default))


def _at(value: object, dim: int) -> int:
    each = cast("tuple[int, ...]", value if isinstance(value, tuple) else (value,))
    return int(each[dim if len(each) > 1 else 0])


@functools.lru_cache(maxsize=256)
def _function(operation: str, settings: tuple[tuple[str | int, object], ...]) -> Phi | None:
    """The activation with the settings of its call; the same object each time, so that its averages are kept."""
    telling = [(key, value) for key, value in settings if not isinstance(value, bool)]  # in place or not
    if operation == "gelu":
        return "gelu_tanh" if "tanh" in dict(telling).values() else "gelu"
    if not telling or operation == "relu6":  # its limits are told to hardtanh, under whose name it is called
        return operation if operation in NAMES else None
    function = cast("Callable[..., Tensor] | None", getattr(F, operation, None))
    named = {key: value for key, value in telling if isinstance(key, str)}
    if function is None or set(named) & {"dim", "generator"}:
        return None
    return _set(function, [value for key, value in telling if isinstance(key, int)], named)


def _set(
    function: Callable[..., Tensor], given: Sequence[object], named: dict[str, object]
) -> Callable[[Tensor], Tensor]:
    def phi(x: Tensor) -> Tensor:
        return function(x, *given, **named)

    phi.__name__ = getattr(function, "__name__", "the activation")
    return phi


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


WRITTEN_OUT: dict[str, Phi] = {
    "NewGELUActivation": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
    "FastGELUActivation": "gelu_tanh",
    "QuickGELUActivation": _quick_gelu,
}
"""Activations that transformers writes out in elementary operations, by their class."""
SAME_VALUES = set(
    "view reshape flatten unflatten permute transpose contiguous squeeze unsqueeze clone".split()
)
"""Calls that leave all values, and none twice."""
