"""Singular values as a table, as JSON, and as pictures: along the depth, and how they are distributed."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

import msgspec
from rich.console import Console
from rich.table import Table
from rich.text import Text

from isograd.render import chart

if TYPE_CHECKING:
    from isograd.spectrum import SingularValues, Spectrum

SCHEMA = 1
PRE = (
    "<pre style=\"font-family:Menlo,Consolas,'DejaVu Sans Mono',monospace;"
    'line-height:1.35;white-space:pre;overflow-x:auto">{code}</pre>\n'
)
WIDTH = 120
COLUMNS = ("max", "rms", "geo", "min", "condition", "gain", "gain/rms")


def table(spectrum: Spectrum) -> Table:
    """One row a segment, input side first, and end to end below."""
    title = Text(f"singular values  {spectrum.target}".rstrip())
    drawn = Table(box=None, title=title, title_justify="left", caption_justify="left", pad_edge=False)
    drawn.add_column("segment", overflow="fold")
    for name in COLUMNS:
        drawn.add_column(name, justify="right", no_wrap=True)
    drawn.add_column("method", no_wrap=True)
    for found in spectrum.segments:
        drawn.add_row(Text(found.site.place), *_cells(found), found.method)
    if spectrum.end_to_end is not None:
        drawn.add_section()
        drawn.add_row(Text(spectrum.whole), *_cells(spectrum.end_to_end), spectrum.end_to_end.method)
    said = [
        *spectrum.notes,
        *dict.fromkeys(f"{s.site.name}: {s.unexamined}" for s in spectrum.examined if s.unexamined),
    ]
    drawn.caption = Text("\n".join(said)) if said else None
    return drawn


def text(spectrum: Spectrum) -> str:
    """The table without colours."""
    console = Console(width=WIDTH, no_color=True, force_terminal=False, file=io.StringIO())
    with console.capture() as captured:
        console.print(table(spectrum))
    return "\n".join(line.rstrip() for line in captured.get().splitlines())


def to_json(spectrum: Spectrum) -> str:
    """Strict JSON: null where nothing finite was measured."""
    report = {
        "schema": SCHEMA,
        "target": spectrum.target,
        "tolerance": spectrum.tolerance,
        "segments": [_report(found) for found in spectrum.segments],
        "end_to_end": None if spectrum.end_to_end is None else _report(spectrum.end_to_end),
        "notes": spectrum.notes,
    }
    return msgspec.json.format(msgspec.json.encode(report)).decode() + "\n"


def svg(spectrum: Spectrum) -> str:
    """All pictures, one above the other, in one self-contained SVG."""
    return _stacked(_pictures(spectrum))


def html(spectrum: Spectrum) -> str:
    """The pictures and the table; everything the user named is escaped."""
    console = Console(record=True, file=io.StringIO(), width=WIDTH, force_jupyter=False)
    console.print(table(spectrum))
    written = console.export_html(code_format=PRE, inline_styles=True)
    return "".join(f"{_embedded(picture)}\n" for picture in _pictures(spectrum)) + written


# -- pictures ------------------------------------------------------------------------------------------


def _pictures(spectrum: Spectrum) -> list[str]:
    return [_along_the_depth(spectrum), *_distributions(spectrum)]


def _along_the_depth(spectrum: Spectrum) -> str:
    segments = spectrum.segments
    depth = list(range(1, len(segments) + 1))
    curves = {
        "largest": [s.log10_sigma_max for s in segments],
        "RMS": [s.log10_sigma_rms for s in segments],
        "geometric mean": [s.log10_sigma_mean for s in segments],
        "smallest": [_log10(s.sigma_min) for s in segments],
        "gain of this loss": [s.log10_gain for s in segments],
    }
    return chart.lines(
        {
            name: chart.Curve(depth, _finite(values), style="--" if name.startswith("gain") else "-o")
            for name, values in curves.items()
            if any(math.isfinite(v) for v in values)
        },
        x="segment of the backbone, from the input",
        y="log10 of the singular value",
        title=f"Singular values of the Jacobian  {spectrum.target}".rstrip(),
        level={"isometry": 0.0},
    )


def _distributions(spectrum: Spectrum) -> list[str]:
    """Density over the logarithm: of the whole, and segment by segment as far as they are told apart."""
    named = {spectrum.whole: spectrum.end_to_end} if spectrum.end_to_end is not None else {}
    few = spectrum.segments if len(spectrum.segments) <= 8 else ()
    named |= {f"{i}  {s.site.name}": s for i, s in enumerate(few, 1)}
    curves = {
        name: density(found.distribution.quantiles)
        for name, found in named.items()
        if found.distribution is not None
    }
    curves = {name: curve for name, curve in curves.items() if curve.x}
    if not curves:
        return []
    return [
        chart.lines(
            curves,
            x="log10 of the singular value",
            y="share of them per decade",
            title="Spectral density (what is zero or not known is left out)",
        )
    ]


def density(quantiles: Sequence[float], points: int = 200) -> chart.Curve:
    """Density over log10 from quantiles at equal levels, smoothed by a Gaussian kernel.

    Its width is Silverman's rule and at least 0.01 decades; the area is the share of values that are known
    and not zero.
    """
    known = sorted(q for q in quantiles if math.isfinite(q))
    if len(known) < 2:
        return chart.Curve([], [])
    mean = sum(known) / len(known)
    deviation = math.sqrt(sum((q - mean) ** 2 for q in known) / len(known))
    inner = (known[3 * len(known) // 4] - known[len(known) // 4]) / 1.34
    width = max(0.9 * min(deviation, inner or deviation) * len(known) ** -0.2, 0.01)
    low, high = known[0] - 3 * width, known[-1] + 3 * width
    x = [low + (high - low) * i / (points - 1) for i in range(points)]
    norm = 1 / (len(quantiles) * width * math.sqrt(2 * math.pi))
    return chart.Curve(x, [norm * sum(math.exp(-0.5 * ((at - q) / width) ** 2) for q in known) for at in x])


def _embedded(picture: str) -> str:
    """An SVG inside of another document has no declaration of its own."""
    return picture[picture.index("<svg") :]


def _stacked(pictures: Sequence[str]) -> str:
    sizes = [_size(picture) for picture in pictures]
    width, height = max(w for w, _ in sizes), sum(h for _, h in sizes)
    parts: list[str] = []
    top = 0.0
    for picture, (_, own) in zip(pictures, sizes, strict=True):
        parts.append(_embedded(picture).replace("<svg", f'<svg y="{top:g}"', 1))
        top += own
    box = f'width="{width:g}pt" height="{height:g}pt" viewBox="0 0 {width:g} {height:g}"'
    inside = "\n".join(re.sub(r'(width|height)="([\d.]+)pt"', r'\1="\2"', part, count=2) for part in parts)
    return f'<?xml version="1.0" encoding="utf-8"?>\n<svg xmlns="http://www.w3.org/2000/svg" {box}>\n{inside}\n</svg>\n'


def _size(picture: str) -> tuple[float, float]:
    """Width and height in points."""
    found = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', picture)
    assert found is not None
    return float(found[1]), float(found[2])


# -- numbers -------------------------------------------------------------------------------------------


def _cells(found: SingularValues) -> list[str]:
    largest, rms = _number(found.log10_sigma_max), _number(found.log10_sigma_rms)
    return [
        largest + (f" ±{found.error:.0%}" if found.error >= 0.005 else ""),
        rms + (f" ±{found.rms_error:.0%}" if found.rms_error >= 0.005 else ""),
        _number(found.log10_sigma_mean),
        "" if found.sigma_min is None else f"{found.sigma_min:.3g}",
        "" if found.condition is None else f"{found.condition:.3g}",
        _number(found.log10_gain),
        _number(found.log10_gain - found.log10_sigma_rms),
    ]


def _number(log10: float) -> str:
    """A power of ten where a float would be 0 or inf: `1e-250.4`."""
    if math.isnan(log10):
        return ""
    if 300 < abs(log10) < math.inf:
        return f"1e{log10:.1f}"
    return f"{10**log10:.3g}" if log10 < math.inf else "inf"


def _log10(value: float | None) -> float:
    return math.nan if value is None or not 0 < value < math.inf else math.log10(value)


def _finite(values: Sequence[float]) -> list[float]:
    return [v if math.isfinite(v) else math.nan for v in values]


def _report(found: SingularValues) -> dict[str, object]:
    site = asdict(found.site)
    numbers = ("sigma_max", "sigma_rms", "gain", "alignment")
    rest = {name: value for name, value in asdict(found).items() if name != "site"}
    return {"site": site.pop("name"), **site, **rest, **{name: getattr(found, name) for name in numbers}}
