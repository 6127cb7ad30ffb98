"""Numbers as they are printed, with a true minus sign."""

from __future__ import annotations

import math
from typing import cast

from isograd.flow import Flow


def decades(value: float) -> str:
    """`−41.2`; 'zero' where no gradient arrived at all; '' where nothing was measured."""
    if math.isnan(value):
        return ""
    if math.isinf(value):
        return "zero" if value < 0 else "∞"
    return minus(f"{value + 0.0:.1f}") if abs(value) >= 0.05 else "0.0"


def signal(value: float) -> str:
    """Three significant digits: `0.0512`, `1.4e+30`; '' where nothing was measured."""
    if math.isnan(value):
        return ""
    return minus(f"{value:.3g}".replace("inf", "∞"))


def ratio(value: float) -> str:
    """Two significant digits."""
    return "" if math.isnan(value) else f"{value:.2g}"


def value(given: float | int | str) -> str:
    """One entry of the evidence."""
    return signal(given) or "not measured" if isinstance(given, float) else str(given)


def minus(text: str) -> str:
    return text.replace("-", "−")


def column(flow: Flow, name: str) -> list[float]:
    """A column of the flow, input first."""
    return cast(list[float], flow.column(name).tolist())
