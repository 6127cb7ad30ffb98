"""Functions of the user's own in the place of an activation, by what they compute: sin(30 x), clamp(40 x).

Nobody knows their names. As modules without parameters they can be called, and theory finds the size of weights at which
such a function keeps the gradient.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor, nn

from isograd import theory
from isograd.flow import Flow

SATURATED = 2.0
"""A critical sigma_w beyond this lies deep in saturation (the sigmoid's 10.1): nothing trains there."""
PROBE = torch.linspace(-3.0, 3.0, 61, dtype=torch.float64)
"""What a function is known by."""
FAR = torch.tensor([-2e3, -1e3, 1e3, 2e3], dtype=torch.float64)
"""Where what saturates has long done so."""


@dataclass(frozen=True)
class _Function:
    """Known by its values: modules that compute the same are one."""

    values: tuple[float, ...]
    phi: Callable[[Tensor], Tensor] = field(compare=False)


def slopes(flow: Flow, model: nn.Module) -> dict[str, float]:
    """By the module of a layer, the constant that the function behind it is at the critical point: 1 / sigma_w.

    Only where no biases are needed there, and the function works on each element by itself. What saturates is to be
    exchanged instead: at weights that are small enough for clamp(40 x) each step of Adam is forty times too large.
    """
    found = {layer: _slope(function) for layer, function in _behind(flow, model)}
    return {layer: slope for layer, slope in found.items() if slope}


def _behind(flow: Flow, model: nn.Module) -> Iterator[tuple[str, _Function]]:
    """Layers with a module right behind them that holds nothing and does nothing but one elementwise operation."""
    sites = Counter(site.module for site in flow.sites)
    for layer, site in pairwise(flow.sites):
        own = site.kind in ("elementwise", "custom") and site.module not in ("", layer.module)
        if not own or layer.kind not in ("linear", "convolution") or site.depth in flow.ledgers:
            continue
        module = model.get_submodule(site.module)
        holds = (*module.children(), *module.parameters(), *module.buffers())
        if holds or sites[site.module] != 1:
            continue
        try:
            phi = copy.deepcopy(module)  # it may keep what it is given
            with torch.no_grad():
                yield layer.module, _Function(tuple(phi(PROBE.clone()).tolist()), phi)
        except Exception:  # it asks for more than a vector, or cannot be copied: nothing is known of it
            continue


@lru_cache(256)
def _slope(function: _Function) -> float:
    """0: there is none."""
    try:
        low, lower, high, higher = function.phi(FAR.clone()).tolist()
        if low == lower and high == higher:
            return 0.0
        point = theory.critical(function.phi)
    except (ValueError, TypeError, RuntimeError):
        return 0.0
    return 1 / point.sigma_w if point.sigma_w <= SATURATED and point.sigma_b2 == 0 else 0.0
