"""What a series of readings is held against: its own past, without what is recent."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from statistics import median

from isograd.monitor.seen import spread

WINDOW = 64
"""Readings that a baseline is taken from: its median and MAD hold against a third of outliers."""


class Baseline:
    """Median and spread of what came before the last `recent` values, and the median of those."""

    def __init__(self, values: Sequence[float], recent: int, window: int = WINDOW) -> None:
        self._before = before = values[-window - recent : -recent]
        self.enough = len(before) >= window // 2
        self.level = median(before) if self.enough else math.nan
        self.largest = max(before) if self.enough else math.nan
        self.now = median(values[-recent:]) if self.enough else math.nan

    @cached_property
    def spread(self) -> float:
        return spread(self._before) if self.enough else math.nan

    @property
    def noise(self) -> float:
        """The spread; 0 as long as too little is known for one."""
        return self.spread if self.enough else 0.0

    @property
    def rise(self) -> float:
        return self.now - self.level

    @property
    def deviations(self) -> float:
        """The rise in units of the spread."""
        if self.spread > 0:
            return self.rise / self.spread
        return math.copysign(math.inf, self.rise) if self.rise else 0.0
