"""Singular values of the Jacobian along the backbone: model, loss -> Spectrum.

The gain that `measure` reports is what happened to one gradient. Singular values are what can happen to
any: `sigma_max` bounds it, `sigma_rms` is what a random direction sees. Right after initialisation gain
and RMS agree; training aligns the gradient with the large directions, and their ratio departs from 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from isograd.graph.backbone import Graph
from isograd.graph.preserve import copied
from isograd.graph.readings import log10
from isograd.graph.traced import Loss, Traced, traced, unwrapped
from isograd.spectra.distribution import Distribution
from isograd.spectra.jacobian import Jacobian, Place, Product
from isograd.spectra.singular import estimate
from isograd.statistics import Site

if TYPE_CHECKING:
    from rich.console import RenderableType

SAFE_DECADES = 10.0
"""Segments are multiplied in one backward while their gains together stay within this."""
HALVES = (torch.bfloat16, torch.float16)
MATH_BACKEND = "attention ran on its MATH backend, the only one that can be differentiated twice"
FIXED_MASK = "dropout kept the mask of this one forward: the Jacobian is that of the thinned network"


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
    distribution: Distribution | None = None
    """Mean of the logarithms, quantiles and share of zeros; None where only the RMS could be measured."""
    unexamined: str = ""
    """Why all but the RMS is missing, where it is."""

    @property
    def sigma_max(self) -> float:
        """Largest singular value; 0 or inf where a float cannot hold it."""
        return _power(self.log10_sigma_max)

    @property
    def sigma_rms(self) -> float:
        """Root mean square of the singular values; 0 or inf where a float cannot hold it."""
        return _power(self.log10_sigma_rms)

    @property
    def log10_sigma_mean(self) -> float:
        """Mean of log10 over the singular values that are not zero; NaN where it is not known."""
        return math.nan if self.distribution is None else self.distribution.log10_mean

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
    whole: str = "end to end"
    """What `end_to_end` goes over, where only a range of the backbone was asked for."""

    def __repr__(self) -> str:
        from isograd.render.spectrum import text

        return text(self)

    def __rich__(self) -> RenderableType:
        from isograd.render.spectrum import table

        return table(self)

    @property
    def examined(self) -> tuple[SingularValues, ...]:
        """The segments, and all of them together last."""
        return self.segments if self.end_to_end is None else (*self.segments, self.end_to_end)

    def to_json(self) -> str:
        """Strict JSON as docs/spectrum.md describes it, with null where nothing finite was measured."""
        from isograd.render.spectrum import to_json

        return to_json(self)

    def to_svg(self) -> str:
        """Singular values along the depth and how they are distributed, one self-contained SVG.

        Raises:
            ValueError: matplotlib is not installed.
        """
        from isograd.render.spectrum import svg

        return svg(self)

    def to_html(self) -> str:
        """The pictures and the table as an HTML fragment that needs no other file."""
        from isograd.render.spectrum import html

        return html(self)


def spectrum(
    model: nn.Module,
    loss: Loss,
    *,
    sites: Sequence[str] | None = None,
    start: str | None = None,
    end: str | None = None,
    tolerance: float = 1e-2,
    seed: int = 0,
    each: Callable[[SingularValues, int], None] | None = None,
) -> Spectrum:
    """Singular values of the Jacobian of every backbone segment of `model`, and of all of them together.

    Elementwise segments take one backward, segments of up to 512 outputs are assembled, all others are
    iterated on without a matrix. The model is left as it was.

    Args:
        model: any module, as for `measure`. One in half precision is measured in float32 on a copy.
        loss: `loss(model)` returns a tensor with one element; its gradient gives `gain`.
        sites: only segments whose site or module matches one of these names or patterns (`h.*`); of an
            empty list none, which leaves `end_to_end`.
        start: begin with the first segment that has this name or pattern, instead of at the input.
        end: stop after the last segment that has it, instead of at the output. `end_to_end` is then the
            product from `start` to `end`.
        tolerance: relative residual of the largest value, and standard error of the RMS, to stop at.
        seed: of the random probes.
        each: called with every segment's result when it is there, and how many there will be.

    Raises:
        TypeError: the model is no module, or the loss returns no tensor.
        ValueError: the loss has more than one element or depends on nothing that can be trained, no
            site has one of the names, or the tolerance is not positive.
    """
    if not tolerance > 0:
        raise ValueError(f"the tolerance is {tolerance:g}; it must be positive, for example 0.01")
    with _prepared(model, loss) as (run, notes):
        chain = _Chain(run)
        first, last = chain.span(start, end)
        chosen = [i for i in range(first, last) if sites is None or chain.meant(i, sites)]
        if sites and not chosen:
            raise chain.unknown(sites)
        found: list[SingularValues] = []
        for i in chosen:
            found.append(chain.singular_values(i, i + 1, tolerance, seed))
            if each is not None:
                each(found[-1], len(chosen))
        whole = chain.singular_values(first, last, tolerance, seed) if first < last else None
        coarse = {str(t.dtype).removeprefix("torch.") for p in chain.places for t in p.like if p.eps > 1e-6}
        notes += [f"computed in {name}: digits beyond its precision are rounding" for name in sorted(coarse)]
    span = f"{start or 'input'} to {end or 'output'}"
    return Spectrum(
        tuple(found), whole, tolerance, tuple(notes), whole="end to end" if start is end is None else span
    )


@contextmanager
def _prepared(model: nn.Module, loss: Loss) -> Iterator[tuple[Traced, list[str]]]:
    """A forward whose backward can be differentiated, in no less than single precision, and what to say of it."""
    inner, notes = unwrapped(model)
    with ExitStack() as stack:
        stack.enter_context(_differentiable_twice(inner))
        halves = {str(p.dtype).removeprefix("torch.") for p in inner.parameters() if p.dtype in HALVES}
        run = None
        if halves:
            run = _upcast(inner, loss, stack)
            how = "computed in float32, on a copy" if run else "could not be computed in float32"
            notes.append(f"the model's {' and '.join(sorted(halves))} was {how}")
        run = run or stack.enter_context(traced(inner, loss))
        kinds = {made.call.kind for made in run.trace.made.values()}
        notes += [MATH_BACKEND] * ("attention" in kinds) + [FIXED_MASK] * ("dropout" in kinds)
        yield run, notes


@contextmanager
def _differentiable_twice(model: nn.Module) -> Iterator[None]:
    """Fused attention and cuDNN's recurrences have a backward that cannot be differentiated."""
    fused = torch.backends.cudnn.enabled
    with sdpa_kernel(SDPBackend.MATH):
        if any(isinstance(module, nn.RNNBase) for module in model.modules()):
            torch.backends.cudnn.enabled = False
        try:
            yield
        finally:
            torch.backends.cudnn.enabled = fused


def _upcast(model: nn.Module, loss: Loss, stack: ExitStack) -> Traced | None:
    """The same loss of a float32 copy; None where it does not run in that or does not use what it is given."""
    precise = copied(model)._apply(_single)
    own = {id(p) for p in precise.parameters()}
    precise.register_forward_pre_hook(lambda _, args, kwargs: _cast((args, kwargs)), with_kwargs=True)
    attempt = ExitStack()
    try:
        run = attempt.enter_context(traced(precise, loss))
        if any(id(getattr(node, "variable", None)) in own for node in run.graph.order):
            stack.push(attempt.pop_all())
            return run
    except Exception:  # as it is, the model then runs or shows the user's own error
        pass
    attempt.close()
    return None


def _single(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in HALVES else tensor


def _cast(arguments: Any) -> Any:
    return pytree.tree_map_only(Tensor, _single, arguments)


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
            gains.append(log10(after) if length > 0 else math.nan)
        return gains[::-1]

    def meant(self, i: int, patterns: Sequence[str]) -> bool:
        """Does segment i end at a site, or in a module, of one of these names?"""
        site = self.sites[i]
        return any(fnmatchcase(name, pattern) for pattern in patterns for name in (site.name, site.module))

    def span(self, start: str | None, end: str | None) -> tuple[int, int]:
        """Segments from the first of name `start` to the last of name `end`: a half-open range."""
        bounds = [0, len(self.sites)]
        for which, name in enumerate((start, end)):
            if name is not None:
                found = [i for i in range(len(self.sites)) if self.meant(i, [name])]
                if not found:
                    raise self.unknown([name])
                bounds[which] = found[-1] + 1 if which else found[0]
        if bounds[0] >= bounds[1] and self.sites:
            raise ValueError(f"{start!r} comes after {end!r} in the forward pass: exchange the two")
        return bounds[0], bounds[1]

    def unknown(self, names: Sequence[str]) -> ValueError:
        """Nothing is called so, and what there is."""
        known = ", ".join(repr(site.name) for site in self.sites[:8])
        more = f" and {len(self.sites) - 8} more" if len(self.sites) > 8 else ""
        return ValueError(
            f"no site is called {' or '.join(map(repr, names))}; there are, from the input, {known}{more}"
        )

    def singular_values(self, start: int, end: int, tolerance: float, seed: int) -> SingularValues:
        """Of the Jacobian from place `start` to place `end`, counted from the input."""
        product = Product(self._factors(start, end))
        found = estimate(product, tolerance, seed)
        return SingularValues(
            site=self.sites[end - 1],
            method=found.method,
            log10_sigma_max=log10(found.largest) + product.log10,
            log10_sigma_rms=log10(found.rms) + product.log10,
            sigma_min=None if found.smallest is None else _power(log10(found.smallest) + product.log10),
            condition=found.condition,
            error=found.error,
            rms_error=found.rms_error,
            log10_gain=sum(self.log10_gains[start:end]),
            distribution=found.distribution and found.distribution.shifted(product.log10),
            unexamined=found.unexamined,
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


def _power(log10: float) -> float:
    return math.inf if log10 > 308 else 10**log10
