"""Singular values of the Jacobian along the backbone: model, loss -> Spectrum.

The gain that `measure` reports is what happened to one gradient. Singular values are what can happen to
any: `sigma_max` bounds it, `sigma_rms` is what a random direction sees. Right after initialisation gain
and RMS agree; training aligns the gradient with the large directions, and their ratio departs from 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

import msgspec
import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node
from torch.nn.attention import SDPBackend, sdpa_kernel

from isograd.backbone import Graph
from isograd.flow import Site
from isograd.jacobian import Jacobian, Place, Product, estimate
from isograd.traced import Loss, Traced, traced

if TYPE_CHECKING:
    from rich.table import Table

SCHEMA = 1
SAFE_DECADES = 10.0
"""Segments are multiplied in one backward while their gains together stay within this."""
MATH_BACKEND = "attention ran on its MATH backend, the only one that can be differentiated twice"


@dataclass(frozen=True, slots=True)
class SingularValues:
    """Singular values of the Jacobian of one segment, or of all of them together.

    The operator is that of the whole batch. Where samples do not see each other it is block diagonal:
    `sigma_max` is then the largest of any sample. What was not measured is NaN.
    """

    site: Site
    """Where the segment ends in the forward pass; end to end: the model's output."""
    method: str
    """'diagonal' and 'dense' give all singular values; 'golub-kahan' the largest, and the RMS by probes."""
    log10_sigma_max: float
    log10_sigma_rms: float
    """log10 of ||J||_F / sqrt(outputs): what a random gradient is multiplied by."""
    sigma_min: float | None
    """0 where it is below rounding; None where only an iteration was run, which does not know it."""
    condition: float | None
    """sigma_max / sigma_min of the worst sample or None, as above."""
    error: float
    """Relative residual of sigma_max; 0: exact up to rounding."""
    rms_error: float
    """Relative standard error of sigma_rms; 0: exact up to rounding."""
    log10_gain: float
    """What this loss's own gradient was multiplied by."""
    unexamined: str = ""
    """Why sigma_max is missing, where it is."""

    @property
    def sigma_max(self) -> float:
        """Largest singular value; 0 or inf where a float cannot hold it."""
        return _power(self.log10_sigma_max)

    @property
    def sigma_rms(self) -> float:
        """Root mean square of the singular values; 0 or inf where a float cannot hold it."""
        return _power(self.log10_sigma_rms)

    @property
    def gain(self) -> float:
        """Norm of the loss's gradient below over that above."""
        return _power(self.log10_gain)

    @property
    def alignment(self) -> float:
        """gain / sigma_rms: 1 for a random gradient; NaN where no gradient passes at all."""
        return _power(self.log10_gain - self.log10_sigma_rms)


@dataclass(frozen=True, repr=False)
class Spectrum:
    """Singular values of every segment examined, input side first, and of their product."""

    segments: tuple[SingularValues, ...]
    end_to_end: SingularValues | None
    """None where the measurement was interrupted before it."""
    tolerance: float
    notes: tuple[str, ...] = ()
    target: str = ""

    def __repr__(self) -> str:
        from rich.console import Console

        console = Console(width=110, no_color=True, force_terminal=False)
        with console.capture() as captured:
            console.print(self.__rich__())
        return "\n".join(line.rstrip() for line in captured.get().splitlines())

    def __rich__(self) -> Table:
        from rich.table import Table
        from rich.text import Text

        title = Text(f"singular values  {self.target}".rstrip())
        table = Table(box=None, title=title, title_justify="left", caption_justify="left", pad_edge=False)
        table.add_column("segment", overflow="fold")
        for name in ("max", "rms", "min", "condition", "gain", "gain/rms"):
            table.add_column(name, justify="right")
        table.add_column("method")
        for found in self.segments:
            table.add_row(Text(found.site.place), *_cells(found), found.method)
        if self.end_to_end is not None:
            table.add_section()
            table.add_row("end to end", *_cells(self.end_to_end), self.end_to_end.method)
        said = [*self.notes, *(f"{s.site.name}: {s.unexamined}" for s in self._all() if s.unexamined)]
        table.caption = Text("\n".join(said)) if said else None
        return table

    def _all(self) -> tuple[SingularValues, ...]:
        return self.segments if self.end_to_end is None else (*self.segments, self.end_to_end)

    def to_json(self) -> str:
        """Strict JSON as docs/spectrum.md describes it, with null where nothing finite was measured."""
        report = {
            "schema": SCHEMA,
            "target": self.target,
            "tolerance": self.tolerance,
            "segments": [_report(found) for found in self.segments],
            "end_to_end": None if self.end_to_end is None else _report(self.end_to_end),
            "notes": self.notes,
        }
        return msgspec.json.format(msgspec.json.encode(report)).decode() + "\n"


def spectrum(
    model: nn.Module,
    loss: Loss,
    *,
    sites: Sequence[str] | None = None,
    tolerance: float = 1e-2,
    seed: int = 0,
    each: Callable[[SingularValues], None] | None = None,
) -> Spectrum:
    """Singular values of the Jacobian of every backbone segment of `model`, and of all of them together.

    Elementwise segments take one backward, segments of up to 512 outputs are assembled, all others are
    iterated on without a matrix. The model is left as it was.

    Args:
        model: any module, as for `measure`.
        loss: `loss(model)` returns a tensor with one element; its gradient gives `gain`.
        sites: only segments whose site or module matches one of these names or patterns (`h.*`).
        tolerance: relative residual of the largest value, and standard error of the RMS, to stop at.
        seed: of the random probes.
        each: called with every segment's result when it is there.

    Raises:
        TypeError: the model is no module, or the loss returns no tensor.
        ValueError: the loss has more than one element or depends on nothing that can be trained, no
            site has one of the names, or the tolerance is not positive.
    """
    if not tolerance > 0:
        raise ValueError(f"the tolerance is {tolerance:g}; it must be positive, for example 0.01")
    with sdpa_kernel(SDPBackend.MATH), traced(model, loss) as run:
        notes = [*run.notes]
        chain = _Chain(run)
        chosen = [i for i, site in enumerate(chain.sites) if _meant(site, sites)]
        if sites is not None and not chosen:
            known = ", ".join(repr(site.name) for site in chain.sites[:8])
            raise ValueError(f"no site is called {' or '.join(map(repr, sites))}; the first are {known}")
        found: list[SingularValues] = []
        for i in chosen:
            found.append(chain.singular_values(i, i + 1, tolerance, seed))
            if each is not None:
                each(found[-1])
        whole = chain.singular_values(0, len(chain.sites), tolerance, seed) if chain.sites else None
    if any(made.call.kind == "attention" for made in run.trace.made.values()):
        notes.append(MATH_BACKEND)
    coarse = {str(t.dtype).removeprefix("torch.") for p in chain.places for t in p.like if p.eps > 1e-6}
    notes += [f"computed in {name}: digits beyond its precision are rounding" for name in sorted(coarse)]
    return Spectrum(tuple(found), whole, tolerance, tuple(notes))


class _Chain:
    """The backbone between the model's output and its input as places with Jacobians between them."""

    def __init__(self, run: Traced) -> None:
        segments = run.line.segments[run.line.exit :]
        # Input side first, as everywhere a user sees them.
        self.places = _places(run.graph, [segment.nodes[0] for segment in segments[::-1]], run.value)
        self.sites = [segment.site for segment in segments[-2::-1]]
        self.log10_gains = self._gains()

    def _gains(self) -> list[float]:
        """What each segment does to this loss's gradient, which is scaled to norm 1 before each."""
        gains: list[float] = []
        gradient = list(self.places[-1].like)
        for below, above in zip(self.places[-2::-1], self.places[:0:-1], strict=True):
            length = float(above.pack(gradient, 1).norm())
            unit = above.unpack(above.pack(gradient, 1) / length) if length > 0 else gradient
            gradient = Jacobian(above, below).vjp(unit)
            after = float(below.pack(gradient, 1).norm())
            gains.append(_log10(after) if length > 0 else math.nan)
        return gains[::-1]

    def singular_values(self, start: int, end: int, tolerance: float, seed: int) -> SingularValues:
        """Of the Jacobian from place `start` to place `end`, counted from the input."""
        product = Product(self._factors(start, end))
        found, why = estimate(product, tolerance, seed)
        return SingularValues(
            site=self.sites[end - 1],
            method=found.method,
            log10_sigma_max=_log10(found.largest) + product.log10,
            log10_sigma_rms=_log10(found.rms) + product.log10,
            sigma_min=None if found.smallest is None else _power(_log10(found.smallest) + product.log10),
            condition=found.condition,
            error=found.error,
            rms_error=found.rms_error,
            log10_gain=sum(self.log10_gains[start:end]),
            unexamined=why,
        )

    def _factors(self, start: int, end: int) -> list[Jacobian]:
        """Output side first: as few backwards as can neither under- nor overflow, each divided by its gain."""
        factors: list[Jacobian] = []
        top, scale = end, 0.0
        for i in reversed(range(start, end)):
            gain = self.log10_gains[i] if math.isfinite(self.log10_gains[i]) else 0.0
            if top > i + 1 and abs(scale + gain) > SAFE_DECADES:
                factors.append(Jacobian(self.places[top], self.places[i + 1], scale))
                top, scale = i + 1, 0.0
            scale += gain
        return [*factors, Jacobian(self.places[top], self.places[start], scale)]


def _places(graph: Graph, tops: Sequence[Node], value: Tensor) -> list[Place]:
    """A split or a fused LSTM has several outputs: all that carry gradient are one vector."""
    used: dict[Node, set[int]] = {top: set() for top in tops}
    for above in graph.order:
        for child, number in above.next_functions:
            if child in used:
                used[child].add(number)
    edges = [[GradientEdge(top, number) for number in sorted(used[top] or {0})] for top in tops]
    flat = [edge for group in edges for edge in group]
    found = iter(torch.autograd.grad(value, flat, retain_graph=True, allow_unused=True))
    places: list[Place] = []
    for group in edges:
        pairs: list[tuple[GradientEdge, Tensor | None]] = [(edge, next(found)) for edge in group]
        kept = [(edge, g) for edge, g in pairs if g is not None]
        places.append(Place(tuple(edge for edge, _ in kept), tuple(g for _, g in kept)))
    return places


def _meant(site: Site, patterns: Sequence[str] | None) -> bool:
    return patterns is None or any(
        fnmatchcase(name, pattern) for pattern in patterns for name in (site.name, site.module)
    )


def _log10(value: float) -> float:
    return math.log10(value) if value > 0 else (-math.inf if value == 0 else math.nan)


def _power(log10: float) -> float:
    return math.inf if log10 > 308 else 10**log10


def _cells(found: SingularValues) -> list[str]:
    largest, rms = _number(found.log10_sigma_max), _number(found.log10_sigma_rms)
    return [
        largest + (f" ±{found.error:.0%}" if found.error >= 0.005 else ""),
        rms + (f" ±{found.rms_error:.0%}" if found.rms_error >= 0.005 else ""),
        "" if found.sigma_min is None else f"{found.sigma_min:.3g}",
        "" if found.condition is None else f"{found.condition:.3g}",
        _number(found.log10_gain),
        _number(found.log10_gain - found.log10_sigma_rms),
    ]


def _number(log10: float) -> str:
    """A power of ten where a float would be 0 or inf: `1e-250.4`."""
    if math.isnan(log10):
        return ""
    return f"1e{log10:.1f}" if 300 < abs(log10) < math.inf else f"{_power(log10):.3g}"


def _report(found: SingularValues) -> dict[str, object]:
    site = asdict(found.site)
    numbers = ("sigma_max", "sigma_rms", "gain", "alignment")
    rest = {name: value for name, value in asdict(found).items() if name != "site"}
    return {"site": site.pop("name"), **site, **rest, **{name: getattr(found, name) for name in numbers}}
