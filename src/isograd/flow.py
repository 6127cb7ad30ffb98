"""What one forward and one backward measured: sites x statistics, on the backbone and per parameter.

A `Flow` is plain data. It keeps no tensor of the model, no graph and no module, so it can be
stored, compared and diagnosed after the model is gone.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from itertools import takewhile
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from isograd.statistics import (
    Activation,
    Attention,
    Failure,
    InputStatistics,
    LossCall,
    ModuleSignal,
    NonFinite,
    Normalisation,
    Parameter,
    Site,
    Split,
    Step,
)

if TYPE_CHECKING:
    from isograd.horizon import Horizon
    from isograd.theory.network import Expectation

FACTORS = {"mul", "rmul", "imul", "div", "truediv", "itruediv", "neg"}
"""Elementwise operations that multiply."""
ADDED = {"add", "iadd"}
"""Those that add."""
SAME = 1e-3
"""Decades between what a multiplication does to the signal and to the gradient: none where it is by one number."""


@dataclass(frozen=True)
class Flow:
    """Sites along the backbone in forward order, input first, with what was measured at each.

    Every column is float64 of shape (site,). NaN means *not measured*, never zero.
    """

    sites: tuple[Site, ...]
    columns: dict[str, Tensor]
    """grad_norm_log10   log10 L2 norm of the gradient at the site's output
    gain              norm at the next site towards the input over norm here
    decades           log10(gain); adds up exactly to `Flow.decades`; NaN for loss sites and the input
    activation_rms    root mean square of the site's output
    forward_gain      activation_rms over that of the site before it
    distinct          share of it, in root mean squares, that belongs to one token of one sample alone
    varying           share of it that differs between the samples
    weighted          1 where the segment multiplies by weights: a layer in the sense of sigma^L"""
    splits: dict[int, Split] = field(default_factory=dict[int, Split])
    """Residual segments by the depth of the site that ends them."""
    ledgers: dict[int, tuple[Step, ...]] = field(default_factory=dict[int, tuple[Step, ...]])
    """What happens inside a segment, by the depth of the site that ends it."""
    activations: tuple[Activation, ...] = ()
    normalisations: tuple[Normalisation, ...] = ()
    attentions: tuple[Attention, ...] = ()
    choices: tuple[Attention, ...] = ()
    """Softmaxes that mix no values and that all of the signal passes through: discrete codes, capsules."""
    parameters: tuple[Parameter, ...] = ()
    modules: tuple[ModuleSignal, ...] = ()
    """The model's tree in registration order, the root first."""
    layers: int = 0
    """Backbone segments that multiply by weights between the input and the output: L of sigma^L."""
    loss: float = math.nan
    losses: tuple[LossCall, ...] = ()
    cut: bool = False
    """The model was given data, and no gradient path leads from the loss to any of it."""
    outputs: tuple[Site, ...] = ()
    """The model's own results, where the model was called as a whole, and"""
    calls: int = 1
    """how often it was: once for each network of a pair, or for each kind of points of a differential equation."""
    towers: tuple[Flow, ...] = ()
    """The same for the model's other inputs (a decoder's tokens, a second tower): sites and columns."""
    inputs: dict[str, InputStatistics] = field(default_factory=dict[str, InputStatistics])
    """Statistics of the float inputs, by name."""
    cuts: tuple[str, ...] = ()
    """Where the gradient of parameters that it does not reach was cut off: `detach at net.py:17`, in the order of the forward."""
    unregistered: tuple[str, ...] = ()
    """Parameters of no module and no optimizer that plain lists and dicts of the model hold: `encoders[0].weight`."""
    nonfinite: NonFinite | None = None
    failure: Failure | None = None
    notes: tuple[str, ...] = ()
    """Things said about the measurement: 'unwrapped from torch.compile'."""
    unexamined: dict[str, str] = field(default_factory=dict[str, str])
    """What could not be measured, and why."""

    horizon: Horizon | None = None
    """The gradient along time, where something recurs in the model; None: not measured."""

    @property
    def loops(self) -> bool:
        """Does one line of code run again and again, or a recurrent kernel? Then time may run along it."""
        sites = [*self.sites, *(step.site for steps in self.ledgers.values() for step in steps)]
        lines = Counter((site.module, site.operation, site.source) for site in sites)
        return any(site.kind == "recurrent" for site in sites) or max(lines.values(), default=0) >= 8

    def column(self, name: str) -> Tensor:
        """A column, or NaN at every site when it was not measured."""
        if name in self.columns:
            return self.columns[name]
        return torch.full((len(self.sites),), math.nan, dtype=torch.float64)

    @property
    def decades(self) -> float:
        """log10 of the gradient norm at the input side over that at the output side."""
        measured = self.column("decades")
        measured = measured[~measured.isnan()]
        return float(measured.sum()) if len(measured) else math.nan

    @property
    def sigma(self) -> float:
        """Geometric mean gain per layer: 10 ** (decades / layers)."""
        return per_layer(self.decades, self.layers)

    @cached_property
    def factors(self) -> dict[int, float]:
        """Constants that the signal is multiplied by, by the depth of the site: they scale signal and gradient alike."""
        found: dict[int, float] = {}
        rms, levels = self.column("activation_rms").tolist(), self.column("grad_norm_log10").tolist()
        for i, site in enumerate(self.sites[1:], 1):
            alone = site.operation in FACTORS and site.shape and not site.parameters and i not in self.ledgers
            times = rms[i] / rms[i - 1] if alone and rms[i - 1] > 0 else math.nan
            if times > 0 and abs(levels[i - 1] - levels[i] - math.log10(times)) < SAME:
                found[i] = times
        return found

    @property
    def entrance(self) -> int:
        """The site where the input is complete: behind the positions and types that are added to an embedding, scaled or not."""
        before = list(takewhile(lambda site: site.kind in ("elementwise", "dropout"), self.sites[1:]))
        return max((i for i, site in enumerate(before, 1) if site.operation.strip("_") in ADDED), default=0)

    @property
    def weighted(self) -> list[int]:
        """The sites that multiply by weights, in forward order."""
        return [i for i, flag in enumerate(self.column("weighted").tolist()) if flag == 1]

    @property
    def hidden(self) -> slice:
        """The sites between the input layer and the head.

        A layer that changes the width rescales the gradient once, whatever the depth; verdicts about
        depth leave out an input layer and a head that do so, a dropout before that head, and all that comes after.
        """
        weighted = self.weighted
        if not weighted:
            return slice(1, len(self.sites))
        first, last = weighted[0], weighted[-1]
        end = last + 1
        if self._resizes(last):
            end = last
            while end > 1 and self.sites[end - 1].kind == "dropout":
                end -= 1
        return slice(first + 1 if self._resizes(first) else 1, end)

    def _resizes(self, index: int) -> bool:
        site, before = self.sites[index], self.sites[index - 1]
        if site.kind not in ("linear", "convolution"):
            return False
        dim = 1 if site.kind == "convolution" else -1
        return len(site.shape) != len(before.shape) or site.shape[dim] != before.shape[dim]

    @property
    def hidden_activations(self) -> list[Activation]:
        """Those that the hidden signal cannot get round. One that makes a result of the model is none of them."""
        hidden, results = set(self.sites[self.hidden]), set(self.outputs)
        return [
            a
            for a in self.activations
            if a.carries and (a.site in hidden or (a.site.depth < 0 and a.site not in results))
        ]

    def fan_in(self, behind: int = -1) -> int:
        """Of the first layer with weights behind this site; 0: there is none, or it is not known."""
        layer = next((i for i in self.weighted if i > behind), -1)
        return max((p.fan_in for p in self.parameters if p.depth == layer), default=0)

    @property
    def simplices(self) -> list[Site]:
        """Softmaxes over all features between two layers: what the next one reads are numbers around 1 / width.

        Not where a normalisation or a factor gives them their size back, nor where they are groups of choices.
        """
        found: list[Site] = []
        for site in (choice.site for choice in self.choices if choice.site in self.sites[self.hidden]):
            behind = next((i for i in self.weighted if i > site.depth), -1)
            fan_in = {p.fan_in for p in self.parameters if p.depth == behind and p.fan_in}
            resized = any(later.kind == "normalisation" for later in self.sites[site.depth :])
            resized = resized or any(later.kind == "elementwise" for later in self.sites[site.depth : behind])
            if site.shape[-1] in fan_in and not resized and site.depth > self.weighted[0]:
                found.append(site)
        return found

    @property
    def lost(self) -> float:
        """Decades that depth costs: negative where the gradient vanishes, -inf where it is exactly zero.

        The sum over the hidden sites or that over all, whichever is smaller: a head drawn small on purpose
        is no vanishing gradient, nor is a factor moved from one layer into the next.
        """
        measured = self._counted(self.lost_part)
        return float(measured.sum()) if len(measured) else math.nan

    @property
    def lost_over(self) -> int:
        """Number of layers that `lost` is summed over."""
        whole = self.lost_part != self.hidden
        return self.layers if whole else int((self.column("weighted")[self.hidden] == 1).sum())

    @property
    def lost_part(self) -> slice:
        """The sites that `lost` is summed over."""
        everything = slice(1, len(self.sites))
        hidden, ends = self._counted(self.hidden), self._counted(everything)
        smaller = len(hidden) and len(ends) and abs(float(ends.sum())) < abs(float(hidden.sum()))
        return everything if smaller else self.hidden

    def _counted(self, part: slice) -> Tensor:
        """Decades of a part, without those that are none of depth.

        The gain of a fused recurrent kernel mixes layers and time, that of a pooling tells over how many
        positions it spreads the gradient.
        """
        decades = self.column("decades")[part]
        other = torch.tensor(
            [site.kind in ("recurrent", "pooling") for site in self.sites[part]], dtype=torch.bool
        )
        return decades[~decades.isnan() & ~other]

    @cached_property
    def expected(self) -> Expectation:
        """What theory expects of random weights of the sizes found, site by site, where it applies."""
        from isograd.theory.network import expectation  # theory reads flows

        return expectation(self)

    @property
    def growth(self) -> float:
        """Decades by which the root mean square of the activations changes over the hidden sites."""
        rms = self.column("activation_rms")[self.hidden]
        rms = rms[~rms.isnan() & (rms > 0)]
        return float(rms[-1].log10() - rms[0].log10()) if len(rms) > 1 else math.nan

    @property
    def typical(self) -> float:
        """Median decades of a layer times their number: what a gain that is the same everywhere costs.

        Equal to `lost` where the gradient grows or shrinks exponentially, far below it where the growth
        is a power of depth, as along a healthy residual stream, or happens in one place.
        """
        layers = self.decades_by_layer
        return float(layers.median()) * len(layers) if len(layers) else math.nan

    @property
    def decades_by_layer(self) -> Tensor:
        """Decades of each layer of the hidden sites: everything from one weighted site to the next."""
        decades, weighted = self.column("decades")[self.hidden], self.column("weighted")[self.hidden]
        if not (weighted == 1).any():
            return decades[:0]
        layer = weighted.cumsum(0).clamp(min=1) - 1
        sums = torch.zeros(int(layer.max()) + 1, dtype=torch.float64)
        return sums.index_add(0, layer.long(), decades.nan_to_num(0.0, neginf=-math.inf, posinf=math.inf))

    @property
    def spread(self) -> float:
        """Standard deviation, in decades, that the finite width alone gives the gradient.

        What theory says of this network, where it applies to all of its depth; at least that of a critical net:
        Var[log ||J^T v||^2] is about c * sum(1/width), with c = 5 for ReLU and its like and 2 for linear and
        smooth functions (`isograd.theory`). Residual segments pass most of the gradient by.
        """
        rectified = any(site.operation in ("relu", "leaky_relu", "hardtanh") for site in self.sites)
        total = 0.0
        for i in range(*self.hidden.indices(len(self.sites))):
            site = self.sites[i]
            if site.kind in ("linear", "convolution") and len(site.shape) > 1:
                total += 1.0 / site.shape[1 if site.kind == "convolution" else -1]
        critical = math.sqrt((5.0 if rectified else 2.0) * total) / 2 / math.log(10)
        part = self.expected.over(self.lost_part)
        # What theory expects to vanish does not vanish by luck.
        lucky = part is not None and part.whole and abs(part.decades) <= 2 * part.spread
        return max(critical, part.spread) if part is not None and lucky else critical


def per_layer(decades: float, layers: int) -> float:
    """Gain that, in each of so many layers, makes so many decades; inf beyond what a float holds."""
    if not layers:
        return math.nan
    return 10 ** (decades / layers) if not decades / layers > 308 else math.inf
