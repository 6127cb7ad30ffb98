"""The law of depth: a gradient through L layers of gain sigma is scaled by sigma^L."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

LN10 = math.log(10)


@dataclass(frozen=True, slots=True)
class Extrapolation:
    """What the law says of a chain of another depth."""

    depth: int
    decades: float
    """log10 of the factor on the norm of the gradient."""
    error: float
    """Standard error of `decades`: of the fitted sigma, and of the luck of the new chain's own layers."""

    @property
    def factor(self) -> float:
        """sigma^depth."""
        return 10.0**self.decades


@dataclass(frozen=True, slots=True)
class Law:
    """One gain per layer, sigma, fitted to a chain, and how well one number describes it."""

    sigma: float
    """Geometric mean of the gains."""
    error: float
    """Standard error of sigma, were the layers independent draws; NaN for one layer."""
    r2: float
    """Share of the cumulated decades' variation along depth that a straight line through 0 explains; below 0
    when the line is worse than a constant. 1: every layer has the same gain."""
    layers: int
    scatter: float
    """Standard deviation of one layer's decades; NaN for one layer."""

    @property
    def decades_per_layer(self) -> float:
        return math.log10(self.sigma)

    def extrapolate(self, depth: int) -> Extrapolation:
        """The same kind of layer, `depth` times, drawn anew."""
        of_sigma = depth * self.scatter / math.sqrt(self.layers)
        of_draw = self.scatter * math.sqrt(depth)
        return Extrapolation(depth, depth * self.decades_per_layer, math.hypot(of_sigma, of_draw))


def law(decades: Sequence[float] | Tensor) -> Law:
    """Fit sigma^L to a ledger.

    Args:
        decades: (layer,) log10 of each layer's gain, in order along the chain.

    Raises:
        ValueError: no layers, or a value that is not finite: a layer that lets nothing through has no logarithm.
    """
    ledger = torch.as_tensor(decades, dtype=torch.float64, device="cpu")
    if ledger.ndim != 1 or len(ledger) == 0:
        raise ValueError(f"a ledger is one number per layer; got shape {tuple(ledger.shape)}")
    if not ledger.isfinite().all():
        raise ValueError(f"layers {(~ledger.isfinite()).nonzero().flatten().tolist()} have no finite gain")
    layers, mean = len(ledger), float(ledger.mean())
    scatter = float(ledger.std()) if layers > 1 else math.nan
    course = ledger.cumsum(0)
    line = mean * torch.arange(1, layers + 1, dtype=torch.float64, device="cpu")
    missed, varied = float((course - line).square().sum()), float((course - course.mean()).square().sum())
    # A chain of one layer, or of gain 1 throughout, has no variation to explain: the line is then exact.
    r2 = 1 - missed / varied if varied > 0 else 1.0
    sigma = 10.0**mean
    return Law(sigma, sigma * LN10 * scatter / math.sqrt(layers), r2, layers, scatter)
