"""A horizon as text, as JSON, as a picture and as an HTML fragment."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import msgspec
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

import isograd
from isograd.render import chart, numbers
from isograd.render.html import PRE

if TYPE_CHECKING:
    from isograd.horizon import Horizon

SCHEMA = 1
"""Raised when a field changes its meaning or goes; a new field does not raise it."""
LAGS = (0, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)
SEVERITY_STYLE = {"error": "bold red", "warning": "yellow", "info": "cyan"}


def text(found: Horizon) -> RenderableType:
    """What a terminal shows."""
    parts: list[RenderableType] = [Text(f"horizon  {found.target}".rstrip(), "bold")]
    parts.append(
        Text(f"  from {found.output} to {found.source}, {found.length} steps along axis {found.axis}")
    )
    parts.append(Text(f"  {verdict(found)}", "bold"))
    parts.append(Text(f"  {per_step(found)}"))
    if (found.ahead > -math.inf).any():
        strongest = float(found.ahead.max()) - found.reference
        parts.append(
            Text(f"  not causal: the steps after it receive up to {numbers.decades(strongest)} decades")
        )
    parts += [Text(), _curve(found)]
    if found.recurrences:
        parts += [Text(), _recurrences(found)]
    for finding in found.findings:
        severity = finding.severity.name.lower()
        head = Text("\n").append(f"{finding.code} {finding.name}  ", "bold")
        head.append(severity, SEVERITY_STYLE[severity]).append(f"\n  {finding.message}")
        parts.append(head)
        parts += [Text(f"  try    {remedy}") for remedy in _remedies(finding.remedies)]
    parts += [Text(f"note   {note}", "dim") for note in found.notes]
    return Group(*parts)


def verdict(found: Horizon) -> str:
    """`1% of the gradient is left after 9 steps`."""
    if found.reach < 0:
        return "no gradient reaches any step"
    if math.isinf(found.steps):
        left = 10 ** min(found.decades, 300.0)
        return f"more than 1% of the gradient is left at the longest lag, {found.at}: {numbers.signal(left)} of it"
    return f"1% of the gradient is left after {found.steps:.0f} of {found.at} steps"


def per_step(found: Horizon) -> str:
    """`x0.616 ± 0.0002 per step`."""
    if math.isnan(found.factor):
        return "no gradient at two lags or more, so no factor per step"
    again = f" ± {found.factor_error:.1g}" if found.factor_error > 0 else ""
    spread = found.spread[found.spread.isfinite()]
    probes = f"{found.probes} probe{'s' if found.probes > 1 else ''}"
    if len(spread):
        probes += f", which differ by {float(spread.median()):.2g} decades"
    return f"×{numbers.signal(found.factor)}{again} per step (seed {found.seed}, {probes})"


def _curve(found: Horizon) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False)
    lags = [lag for lag in LAGS if lag < found.at] + [found.at]
    for _ in range(len(lags) + 1):
        table.add_column(justify="right")
    table.add_row("  lag", *map(str, lags))
    table.add_row("  decades", *(numbers.decades(float(found.curve[lag]) - found.reference) for lag in lags))
    return table


def _recurrences(found: Horizon) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 1))
    table.add_column("  recurrent matrix", overflow="fold")
    for name in ("kind", "size", "steps", "spectral radius", "norm", "gate that keeps (widest)"):
        table.add_column(name, justify="right")
    for r in found.recurrences:
        gate = "" if math.isnan(r.gate) else f"{r.gate:.2f} ({r.gate_widest:.2f})"
        row = (r.kind, str(r.hidden), str(r.steps), _measured(r.radius), _measured(r.norm), gate)
        table.add_row(Text(f"  {r.name}"), *row)
    return table


def _measured(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.3g}"


def _remedies(slugs: tuple[str, ...]) -> list[str]:
    from isograd.render.remedies import in_words

    return [in_words(slug) for slug in slugs]


def svg(found: Mapping[str, Horizon], title: str = "") -> str:
    """Curves of one or more horizons by name, each over what counts as 100% of it."""
    curves: dict[str, chart.Curve] = {}
    for name, one in found.items():
        lags = [lag for lag in range(one.at + 1) if one.curve[lag] > -math.inf]
        curves[name] = chart.Curve(lags, [float(one.curve[lag]) - one.reference for lag in lags])
    return chart.lines(
        curves,
        x="lag: steps back in time",
        y="decades of the gradient",
        title=title or (next(iter(found)) if len(found) == 1 else ""),
        level={"1% is left": -2.0},
    )


def html(found: Horizon) -> str:
    """A `<pre>` with inline styles, and the curve where matplotlib is installed; no script and no link."""
    console = Console(record=True, file=io.StringIO(), width=110, force_jupyter=False)
    console.print(text(found), soft_wrap=True)
    words = console.export_html(code_format=PRE, inline_styles=True)
    try:
        picture = found.to_svg()
    except ValueError:  # without the extra `plot` the words are still worth having
        return words
    return f'{words}<div style="max-width:46em">{picture[picture.index("<svg") :]}</div>\n'


def to_json(found: Horizon) -> str:
    """Strict JSON: null where nothing finite was measured, and null for a gradient that is exactly zero."""
    names = ("target", "source", "axis", "output", "length", "at", "probes", "seed")
    report: dict[str, Any] = {"schema": SCHEMA, "version": isograd.__version__}
    report |= {name: getattr(found, name) for name in names}
    report |= {
        "steps": found.steps,
        "factor": found.factor,
        "factor_error": found.factor_error,
        "decades": found.decades,
        "reference": found.reference,
        "reach": found.reach,
        "curve": found.curve.tolist(),
        "spread": found.spread.tolist(),
        "ahead": found.ahead.tolist(),
        "recurrences": [asdict(r) for r in found.recurrences],
        "findings": [
            {
                "code": f.code,
                "name": f.name,
                "severity": f.severity.name.lower(),
                "message": f.message,
                "evidence": f.evidence,
                "remedies": f.remedies,
            }
            for f in found.findings
        ],
        "notes": found.notes,
    }
    return msgspec.json.format(msgspec.json.encode(report)).decode() + "\n"
