"""How far back in time a gradient reaches: the result, read, printed and drawn. `recurrent.along` measures it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from isograd.recurrent.recurrence import Recurrence

if TYPE_CHECKING:
    from rich.console import RenderableType

    from isograd.diagnosis import Finding

LEFT = 0.01
"""Share of the gradient that is left at the horizon."""
BYPASS = 10.0
"""A step that gets this many times more from its own output than any earlier one has a way around the memory:
a residual connection. What it gets says nothing of the memory, and the strongest earlier step is the measure."""
ENDS = 0.1
"""Share of the lags at either end that the factor leaves out: the first touch of the output, the zero state."""
MOST_LAGS = 500
"""Lags that the factor is computed from, evenly spaced where there are more: all pairs of them are compared."""


@dataclass(frozen=True, repr=False, eq=False)
class Horizon:
    """How far back in time the gradient of one output step reaches.

    Gradients are L2 norms over batch and features, from a random direction of norm 1 at the output, on
    average (of the logarithm) over the probes.
    """

    curve: Tensor
    """log10 of the gradient by lag: float64 of shape (at + 1,), lag 0 first; -inf where it is exactly zero."""
    spread: Tensor
    """Its standard deviation over the probes, in decades; NaN with a single probe. Same shape."""
    ahead: Tensor
    """log10 of the gradient at the steps after `at`, the next one first; -inf throughout: the model is causal."""
    at: int
    """The output step that the gradient starts from, in steps of the input."""
    length: int
    """Steps of the input."""
    probes: int
    seed: int
    source: str
    """Where the gradient is read: the input's name, or the embedding of it."""
    axis: int
    """The axis of the source along which time runs."""
    output: str
    """What the gradient starts from."""
    at_end: bool = False
    """The loss reads no output step but the last, or the output has none."""
    recurrences: tuple[Recurrence, ...] = ()
    differing: Tensor | None = None
    """Variance between the samples of what the model was given at each lag; None: one sample, or not known."""
    notes: tuple[str, ...] = ()
    target: str = ""

    @property
    def factor(self) -> float:
        """What one step multiplies the gradient by: the median slope of `curve` over the middle 80% of its reach.

        NaN where fewer than two lags have any gradient. Source: Sen 1968, estimates of the regression
        coefficient based on Kendall's tau.
        """
        return 10 ** self._line[0]

    @property
    def factor_error(self) -> float:
        """Standard error of `factor`; it grows where the curve is no straight line."""
        return self.factor * math.log(10) * self._line[1]

    @property
    def steps(self) -> float:
        """The lag from which on less than 1% of the gradient is left; inf: more is left at the longest lag.

        1% of what the step itself receives, or of the strongest earlier step where the step itself has a
        way around the memory (`BYPASS`). NaN where the gradient is not finite.
        """
        if self.curve.isnan().any():
            return math.nan
        enough = (self.curve >= self.reference + math.log10(LEFT)).nonzero()
        if not len(enough):
            return 0.0
        last = int(enough[-1])
        return math.inf if last == self.at else last + 1.0

    @property
    def reference(self) -> float:
        """log10 of the gradient that counts as 100%."""
        now, before = float(self.curve[0]), self.curve[1:]
        strongest = float(before.max()) if len(before) else -math.inf
        return strongest if strongest > -math.inf and now - strongest > math.log10(BYPASS) else now

    @property
    def reach(self) -> int:
        """The longest lag with any gradient at all: a convolution's receptive field less one."""
        some = (self.curve > -math.inf).nonzero()
        return int(some[-1]) if len(some) else -1

    @property
    def decades(self) -> float:
        """What is left at the longest lag: log10 of it over the reference; -inf where it is exactly zero."""
        return float(self.curve[-1]) - self.reference

    @property
    def covered(self) -> float:
        """Share of the samples' differences that lies within the horizon; of the steps, where it is not known."""
        within = torch.arange(self.at + 1) < self.steps
        return float(self._shares[within].sum())

    @property
    def received(self) -> float:
        """log10 of what the samples' differences receive on average of the gradient that counts as 100%."""
        left = torch.exp2((self.curve - self.reference).clamp(max=300.0) * math.log2(10.0))
        return float((self._shares * left).sum().log10())

    @property
    def _shares(self) -> Tensor:
        """Of what differs between the samples, how much lies at each lag."""
        given = self.differing
        if given is None or not given.sum() > 0:
            given = torch.ones(self.at + 1, dtype=torch.float64)
        return given / given.sum()

    @property
    def _line(self) -> tuple[float, float]:
        """Slope of the curve in decades a step, and its standard error."""
        count = self.reach + 1
        cut = int(ENDS * count)
        lags = torch.arange(cut, count - cut, max(1, count // MOST_LAGS))
        lags = lags[self.curve[lags].isfinite()]
        x, y = lags.double(), self.curve[lags]
        if len(x) < 2:
            return math.nan, math.nan
        # The median of the slopes between all pairs: a convolution before the memory bends the first few lags.
        i, j = torch.triu_indices(len(x), len(x), 1)
        slope = float(((y[j] - y[i]) / (x[j] - x[i])).median())
        rest = y - slope * x
        scatter = (rest - rest.mean()).square().sum() / max(len(x) - 2, 1)
        return slope, math.sqrt(float(scatter / (x - x.mean()).square().sum()))

    @property
    def findings(self) -> tuple[Finding, ...]:
        """What is wrong along time: RN601, RN602, RN603."""
        from isograd.diagnosis import Finding
        from isograd.symptoms import closed_gates, exploding_recurrence, short_horizon

        pages = (short_horizon, exploding_recurrence, closed_gates)
        return tuple(o for page in pages for o in page.judge(self) if isinstance(o, Finding))

    def __repr__(self) -> str:
        from rich.console import Console

        console = Console(width=110, no_color=True, force_terminal=False)
        with console.capture() as captured:
            console.print(self.__rich__())
        return "\n".join(line.rstrip() for line in captured.get().splitlines())

    # How it looks is an edge of the house, imported when it is asked for.

    def __rich__(self) -> RenderableType:
        from isograd.render.horizon import text

        return text(self)

    def _repr_html_(self) -> str:
        return self.to_html()

    def to_html(self) -> str:
        """An HTML fragment without scripts or links: the text, and the curve if matplotlib is there."""
        from isograd.render.horizon import html

        return html(self)

    def to_svg(self) -> str:
        """The curve as a self-contained picture; needs the extra `isograd[plot]`."""
        from isograd.render.horizon import svg

        return svg({self.target or self.source: self})

    def to_json(self) -> str:
        """Strict JSON as docs/horizon.md describes it."""
        from isograd.render.horizon import to_json

        return to_json(self)
