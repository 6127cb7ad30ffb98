"""How singular values are distributed: exactly, or by quadrature with what that leaves open."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

LEVELS = 64
LARGEST_ERROR = 0.05
"""Decades: a mean of logarithms that is known no better is not reported."""
Quadrature = tuple[Tensor, Tensor, Tensor, Tensor]
"""Nodes and weights, (block, node), of a Gauss rule, and of the one of half as many steps."""


@dataclass(frozen=True, slots=True)
class Distribution:
    """The singular values of an operator, all blocks together."""

    log10_mean: float
    """Mean of log10 over the values that are not zero; NaN where that is not known to `LARGEST_ERROR`."""
    log10_mean_error: float
    """Standard error of it, and twice what the last half of the steps changed; 0: exact."""
    zero: float | None
    """Share of singular values that are zero up to rounding; None: an iteration does not know it."""
    quantiles: tuple[float, ...]
    """log10 of the singular values at the levels 1/128, 3/128, … 127/128; -inf: zero; NaN: not known."""
    error: float
    """A quantile's true level is no further from its own than this, besides the grid; 0: exact."""

    @staticmethod
    def exact(values: Tensor) -> Distribution:
        """Of singular values that are all known."""
        positive = values[values > 0]
        mean = float(positive.log10().mean()) if len(positive) else math.nan
        zero = 1 - len(positive) / len(values)
        return Distribution(mean, 0.0, zero, _quantiles(values, torch.ones_like(values)), 0.0)

    def shifted(self, decades: float) -> Distribution:
        """Of the same values times 10**decades."""
        return Distribution(
            self.log10_mean + decades,
            self.log10_mean_error,
            self.zero,
            tuple(q + decades for q in self.quantiles),
            self.error,
        )


def pooled(runs: Sequence[Quadrature], dimension: int) -> Distribution:
    """Of an operator of `dimension` singular values a block, on which quadratures were run.

    A Gauss rule's cumulative weight is at no point further from the truth than the weight of the node
    there (the inequality of Chebyshev, Markov and Stieltjes), for the probe it was run on; to that come two
    standard errors of the probes. What lies under the lowest node is the end of a Lanczos process that
    tells nothing about its place: those quantiles are not known.
    """
    nodes, weights = _both(runs, 0)
    # A share p has the standard error sqrt(2 p (1 - p) / n) over random signs: at most this, for two of them.
    spread = math.sqrt(2 / (dimension * _probes(runs)))
    lowest = torch.cat([run[1].gather(1, run[0].argmin(1, keepdim=True)).flatten() for run in runs])
    resolution = torch.cat([run[1].scatter(1, run[0].argmin(1, keepdim=True), 0.0).amax(1) for run in runs])
    unknown = float(lowest.mean()) + spread
    quantiles = [
        q if (i + 0.5) / LEVELS > unknown else math.nan for i, q in enumerate(_quantiles(nodes, weights))
    ]
    # At the hard edge of a square matrix the rule converges like 1/steps, so that what the second half of
    # the steps changed is about what is left; twice that is on the safe side.
    fine, coarse = (_mean(*_both(runs, rule)) for rule in (0, 2))
    error = math.hypot(standard_error(runs, dimension), 2 * (fine - coarse))
    known = error <= LARGEST_ERROR
    return Distribution(
        fine if known else math.nan,
        error if known else math.nan,
        None,
        tuple(quantiles),
        float(resolution.mean()) + spread,
    )


def standard_error(runs: Sequence[Quadrature], dimension: int) -> float:
    """Of the mean of log10 over random signs, in decades: sqrt(2 Var[log10 sigma] / n) for one probe.

    An upper estimate: of u'Au, signs leave the diagonal of A without variance.
    """
    nodes, weights = _both(runs, 0)
    positive = nodes > 0
    logs, share = nodes[positive].log10(), weights[positive] / weights[positive].sum()
    variance = float((share * (logs - (share * logs).sum()).square()).sum())
    return math.sqrt(2 * variance / (dimension * _probes(runs)))


def _probes(runs: Sequence[Quadrature]) -> int:
    return sum(len(run[0]) for run in runs)


def _both(runs: Sequence[Quadrature], rule: int) -> tuple[Tensor, Tensor]:
    """All nodes and weights of one of the two rules."""
    nodes = torch.cat([run[rule].flatten() for run in runs])
    return nodes, torch.cat([run[rule + 1].flatten() for run in runs])


def _mean(nodes: Tensor, weights: Tensor) -> float:
    positive = nodes > 0
    if not positive.any():
        return math.nan
    return float((weights[positive] * nodes[positive].log10()).sum() / weights[positive].sum())


def _quantiles(values: Tensor, weights: Tensor) -> tuple[float, ...]:
    values, order = values.cpu().sort()
    reached = weights.cpu()[order].cumsum(0)
    levels = (torch.arange(LEVELS, dtype=torch.float64) + 0.5) / LEVELS * reached[-1]
    at = torch.searchsorted(reached, levels).clamp(max=len(values) - 1)
    return tuple(values[at].log10().tolist())
