"""Is one thing better than another, by scores taken in pairs?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Difference:
    """Second minus first, by Student's paired t: the mean with its 95% interval."""

    mean: float
    low: float
    high: float
    p: float
    """Two-sided."""
    size: float
    """Cohen's d of paired scores: the mean over the standard deviation of the differences."""
    n: int

    @property
    def better(self) -> bool:
        """Is the second higher, surely?"""
        return self.low > 0

    @property
    def exceeds(self) -> bool:
        """Is the second higher at 5%, by the one-sided test? A question with one direction asks for no more."""
        return self.mean > 0 and self.p / 2 < 1 - CONFIDENCE

    @property
    def worse(self) -> bool:
        return self.high < 0


def paired(first: Sequence[float], second: Sequence[float]) -> Difference:
    """Compare scores pair by pair, pairs with the same seed and data.

    Differences that are all the same leave no doubt: the interval is that one number.

    Raises:
        ValueError: fewer than two pairs, or not as many of the second as of the first.
    """
    differences = [b - a for a, b in zip(first, second, strict=True)]
    n = len(differences)
    if n < 2:
        raise ValueError("an interval needs two pairs at least")
    mean, spread = fmean(differences), stdev(differences)
    if spread == 0:
        size = math.copysign(math.inf, mean) if mean else 0.0
        return Difference(mean, mean, mean, 0.0 if mean else 1.0, size, n)
    error = spread / math.sqrt(n)
    margin = t_quantile(CONFIDENCE, n - 1) * error
    p = 1 - t_within(abs(mean) / error, n - 1)
    return Difference(mean, mean - margin, mean + margin, p, mean / spread, n)


def t_within(t: float, freedom: int) -> float:
    """P(|T| < t) of Student's t with a whole number of degrees of freedom (Abramowitz and Stegun 26.7.3, 26.7.4)."""
    angle = math.atan(t / math.sqrt(freedom))
    cosine, odd = math.cos(angle), freedom % 2
    term, total = 1.0, 0.0
    for i in range(freedom // 2):
        total += term
        term *= cosine**2 * ((2 * i + 2) / (2 * i + 3) if odd else (2 * i + 1) / (2 * i + 2))
    if odd:
        return 2 / math.pi * (angle + math.sin(angle) * cosine * total)
    return math.sin(angle) * total


def t_quantile(share: float, freedom: int) -> float:
    """The t with P(|T| < t) = share, by bisection."""
    low, high = 0.0, 1e6
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if t_within(middle, freedom) < share else (low, middle)
    return high
