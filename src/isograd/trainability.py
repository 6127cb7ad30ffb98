"""How deep a network of one kind may be and still train: the phase diagram over sigma_w and depth.

A signal and a gradient survive about xi = 1 / |log chi_1| layers, and networks have been found to train to about
six times that depth (Schoenholz et al. 2017, Deep Information Propagation, arXiv:1611.01232). The
prediction costs milliseconds. Beside it stands the accuracy of networks that were really trained, if a
trial is given.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import asdict, dataclass

from isograd import theory, trials
from isograd.theory.quadrature import activation

DEPTH_SCALES = 6
"""Depth scales over which a network still trains (Schoenholz et al. 2017, figure 5)."""
SIGMA_W = tuple(round(0.9 + 0.1 * k, 1) for k in range(21))
DEPTHS = (2, 4, 8, 16, 24, 32, 48, 64, 96, 128)


@dataclass(frozen=True, slots=True)
class Point:
    """One place of the phase diagram: what a trial is given."""

    phi: str
    """Name of the activation."""
    sigma_w: float
    """Standard deviation of the weights times sqrt(fan_in)."""
    sigma_b2: float
    """Variance of the biases."""
    depth: int
    """Hidden layers."""


@dataclass(frozen=True, slots=True)
class Column:
    """What theory says of one sigma_w, at the fixed point that a deep network settles at."""

    sigma_w: float
    q: float
    """Pre-activation variance there."""
    gain: float
    """Factor per layer on the norm of the gradient."""
    depth_scale: float
    """xi in layers; infinite at a critical point."""

    @property
    def deepest(self) -> float:
        """Layers to which a network is expected to train."""
        return DEPTH_SCALES * self.depth_scale

    @property
    def phase(self) -> str:
        """'ordered': gradients vanish; 'chaotic': they explode; 'critical'."""
        if math.isinf(self.depth_scale):
            return "critical"
        return "ordered" if self.gain < 1 else "chaotic"


@dataclass(frozen=True, repr=False)
class Trainability:
    """Predicted depths over sigma_w and, where networks were trained, their scores. Prints itself."""

    phi: str
    sigma_b2: float
    columns: tuple[Column, ...]
    depths: tuple[int, ...]
    scores: tuple[tuple[float, ...], ...] = ()
    """Of trained networks, (sigma_w, depth); NaN where none was trained or its training failed. Empty
    without a trial."""
    failed: tuple[str, ...] = ()
    """Trials that raised, and what."""

    @property
    def critical(self) -> Column:
        """The column that trains deepest."""
        return max(self.columns, key=lambda c: c.depth_scale)

    def agreement(self, enough: float) -> float:
        """Share of the trained networks of which theory says rightly whether they reach the score `enough`.

        NaN without trained networks.
        """
        said = [
            (depth <= column.deepest) == (score >= enough)
            for column, row in zip(self.columns, self.scores, strict=False)
            for depth, score in zip(self.depths, row, strict=True)
            if not math.isnan(score)
        ]
        return sum(said) / len(said) if said else math.nan

    def __repr__(self) -> str:
        lines = [
            f"{self.phi}, sigma_b^2 {self.sigma_b2:g}: trains to about {DEPTH_SCALES} xi layers",
            f"{'sigma_w':>8}{'gain':>9}{'xi':>9}{'deepest':>9}  phase"
            + ("  trained to" if self.scores else ""),
        ]
        for i, c in enumerate(self.columns):
            trained = f"{self._reached(i):>12}" if self.scores else ""
            lines.append(
                f"{c.sigma_w:>8.3g}{c.gain:>9.4f}{_layers(c.depth_scale):>9}{_layers(c.deepest):>9}  {c.phase:<8}{trained}"
            )
        return "\n".join((*lines, *self.failed))

    def _reached(self, index: int) -> str:
        """The deepest network that scored more than half as well as the best of all."""
        best = max((s for row in self.scores for s in row if not math.isnan(s)), default=math.nan)
        deep = [d for d, s in zip(self.depths, self.scores[index], strict=True) if s > best / 2]
        return str(max(deep)) if deep else "none"

    def to_json(self) -> str:
        """Everything, with null for what is not finite."""

        def plain(value: float) -> float | None:
            return value if math.isfinite(value) else None

        columns = [
            {name: plain(v) for name, v in asdict(c).items()} | {"phase": c.phase} for c in self.columns
        ]
        found = {
            "phi": self.phi,
            "sigma_b2": self.sigma_b2,
            "depth_scales": DEPTH_SCALES,
            "columns": columns,
            "depths": self.depths,
            "scores": [[plain(score) for score in row] for row in self.scores],
            "failed": self.failed,
        }
        return json.dumps(found, indent=1) + "\n"

    def to_svg(self) -> str:
        """The phase diagram: scores where networks were trained, else predicted decades, under the curve of 6 xi.

        Raises:
            ValueError: matplotlib is not installed.
        """
        from isograd.render import chart

        x = [c.sigma_w for c in self.columns]
        top = float(max(self.depths))
        curve = chart.Curve(x, [min(c.deepest, top) for c in self.columns], style="--")
        values = self.scores or [[d * math.log10(c.gain) for d in self.depths] for c in self.columns]
        return chart.heat(
            list(zip(*values, strict=True)),
            columns=x,
            rows=[float(d) for d in self.depths],
            x="sigma_w",
            y="hidden layers",
            title=f"{self.phi}, sigma_b² = {self.sigma_b2:g}",
            unit="score of the trained network" if self.scores else "decades of gradient, expected",
            over={f"{DEPTH_SCALES} ξ": curve},
        )

    def _repr_html_(self) -> str:
        return self.to_svg()


def trainability(
    phi: theory.Phi,
    *,
    sigma_w: Sequence[float] = SIGMA_W,
    sigma_b2: float = 0.05,
    depths: Sequence[int] = DEPTHS,
    train: Callable[[Point], float] | None = None,
    map: trials.Map | Executor | None = None,
    store: str | os.PathLike[str] | None = None,
    progress: trials.Progress | None = None,
) -> Trainability:
    """The depth to which networks of one kind train, over the scale of their weights.

    Args:
        phi: activation, a name of `theory.NAMES` or any elementwise function.
        sigma_w: standard deviations of the weights times sqrt(fan_in), rising.
        sigma_b2: variance of the biases.
        depths: hidden layers, rising.
        train: trains the network of one `Point` and returns its score, higher is better; a picklable
            closure of the point alone, so that trials may run anywhere. Without it there is only theory.
        map: where trials run, see `isograd.trials`: processes of this machine, an executor, any `map`.
        store: a file of JSON lines that makes the trials resumable.
        progress: called with (done, all) trials.

    Raises:
        ValueError: an unknown activation, or a scale that is not positive.
        trials.Interrupted: Ctrl-C during the trials; those that were done are in `store`.

    Example:
        >>> trainability("tanh", sigma_w=[1.0, 1.76], depths=[10]).columns[0].phase
        'ordered'
    """
    name = activation(phi).name
    columns = tuple(_column(phi, scale, sigma_b2) for scale in sigma_w)
    found = Trainability(name, sigma_b2, columns, tuple(depths))
    if train is None:
        return found
    points = [Point(name, scale, sigma_b2, depth) for scale in sigma_w for depth in depths]
    results = trials.run(train, points, map=map, store=store, progress=progress)
    failed = [
        f"failed: {r.error} at sigma_w {p.sigma_w:g}, depth {p.depth}"
        for p, r in zip(points, results, strict=True)
        if isinstance(r, trials.Failed)
    ]
    scores = [math.nan if isinstance(r, trials.Failed) else float(r) for r in results]
    width = len(found.depths)
    rows = tuple(tuple(scores[i : i + width]) for i in range(0, len(scores), width))
    return Trainability(name, sigma_b2, columns, found.depths, rows, tuple(failed))


def _column(phi: theory.Phi, sigma_w: float, sigma_b2: float) -> Column:
    point = theory.fixed_point(phi, sigma_w=sigma_w, sigma_b2=sigma_b2)
    return Column(sigma_w, point.q, point.gain, point.depth_scale)


def _layers(value: float) -> str:
    return "any" if math.isinf(value) else f"{value:.1f}"
