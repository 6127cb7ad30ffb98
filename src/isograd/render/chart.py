"""Pictures as self-contained SVG: curves on linear or logarithmic axes, and heat maps.

Drawn by matplotlib without its global state, from the extra `isograd[plot]`.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Curve:
    """One line of a chart."""

    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    """Lower and upper end of a band around the line, both or neither."""
    high: Sequence[float] | None = None
    style: str = "-"
    """`-` measured, `--` expected, `.` points."""


def lines(
    curves: Mapping[str, Curve],
    *,
    x: str,
    y: str,
    title: str = "",
    log: str = "",
    level: Mapping[str, float] | None = None,
) -> str:
    """SVG of curves by name. `log` is "", "x", "y" or "xy"; `level` draws named horizontal lines."""
    figure, axes = _axes(x, y, title)
    for number, (name, curve) in enumerate(curves.items()):
        colour = f"C{number % 10}"
        axes.plot(curve.x, curve.y, curve.style, color=colour, label=_text(name), linewidth=1.4)
        if curve.low is not None and curve.high is not None:
            axes.fill_between(curve.x, curve.low, curve.high, color=colour, alpha=0.15, linewidth=0)
    for name, at in (level or {}).items():
        axes.axhline(at, color="0.5", linestyle=":", linewidth=1)
        axes.annotate(
            _text(name), (1, at), xycoords=("axes fraction", "data"), ha="right", va="bottom", color="0.4"
        )
    if "x" in log:
        axes.set_xscale("log")
    if "y" in log:
        axes.set_yscale("log")
    if len(curves) > 1:
        axes.legend(frameon=False, fontsize="small")
    return _svg(figure)


def heat(
    values: Sequence[Sequence[float]],
    *,
    columns: Sequence[float],
    rows: Sequence[float],
    x: str,
    y: str,
    title: str = "",
    unit: str = "",
    over: Mapping[str, Curve] | None = None,
) -> str:
    """SVG of a table of values (rows x columns; nan stays blank) with curves over it."""
    figure, axes = _axes(x, y, title)
    mesh = axes.pcolormesh(columns, rows, values, shading="nearest", cmap="viridis")
    figure.colorbar(mesh, ax=axes, label=_text(unit))
    for name, curve in (over or {}).items():
        axes.plot(curve.x, curve.y, curve.style, color="white", label=_text(name), linewidth=1.4)
    axes.set_xlim(min(columns), max(columns))
    axes.set_ylim(min(rows), max(rows))
    if over:
        axes.legend(frameon=True, fontsize="small")
    return _svg(figure)


def _axes(x: str, y: str, title: str) -> tuple[Any, Any]:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("pictures need matplotlib: pip install 'isograd[plot]'") from None
    figure: Any = Figure(figsize=(7.2, 4.2), layout="constrained")
    axes: Any = figure.add_subplot()
    axes.set_xlabel(_text(x))
    axes.set_ylabel(_text(y))
    axes.set_title(_text(title), fontsize="medium")
    axes.grid(alpha=0.2)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure, axes


def _text(words: str) -> str:
    """Words as they are: a dollar sign in a module's name would start a formula."""
    return words.replace("$", r"\$")


def _svg(figure: Any) -> str:
    import matplotlib

    out = io.StringIO()
    # Text stays text, and the same data gives the same file.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "isograd"}):
        figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()
