"""All cases, in a fixed order."""

from __future__ import annotations

from functools import cache

from benchmarks.twins.blocks import blocks
from benchmarks.twins.case import Case
from benchmarks.twins.chains import chains
from benchmarks.twins.recurrent import recurrent


@cache
def cases() -> tuple[Case, ...]:
    """Every pair: chains, recurrences, networks with skips."""
    return (*chains(), *recurrent(), *blocks())
