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
from dataclasses import asdict, dataclass, replace

from torch import nn

from isograd import theory, trials
from isograd.flow import Flow
from isograd.graph.traced import Loss
from isograd.measure import measure
from isograd.theory.operations import Operations
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
    own: Point | None = None
    """Where the model lies that was given; its sigma_w is among the columns."""

    @property
    def critical(self) -> Column:
        """The column that trains deepest."""
        return max(self.columns, key=lambda c: c.depth_scale)

    @property
    def trains(self) -> bool | None:
        """Is the model that was given shallow enough? None: none was given."""
        if self.own is None:
            return None
        return self.own.depth <= self._column(self.own.sigma_w).deepest

    def _column(self, sigma_w: float) -> Column:
        return next(c for c in self.columns if c.sigma_w == sigma_w)

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
        if self.own is not None:
            column = self._column(self.own.sigma_w)
            way = "within" if self.trains else "beyond"
            lines.append(
                f"this model: sigma_w {self.own.sigma_w:.3g}, {self.own.depth} layers, "
                f"{way} the {_layers(column.deepest)} to which it is expected to train"
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
            "own": None if self.own is None else asdict(self.own) | {"trains": self.trains},
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
        over = {f"{DEPTH_SCALES} ξ": chart.Curve(x, [min(c.deepest, top) for c in self.columns], style="--")}
        if self.own is not None:
            over["this model"] = chart.Curve([self.own.sigma_w], [min(self.own.depth, top)], style="o")
        values = self.scores or [[d * math.log10(c.gain) for d in self.depths] for c in self.columns]
        return chart.heat(
            list(zip(*values, strict=True)),
            columns=x,
            rows=[float(d) for d in self.depths],
            x="sigma_w",
            y="hidden layers",
            title=f"{self.phi}, sigma_b² = {self.sigma_b2:g}",
            unit="score of the trained network" if self.scores else "decades of gradient, expected",
            over=over,
        )

    def _repr_html_(self) -> str:
        return self.to_svg()


def trainability(
    of: theory.Phi | nn.Module,
    loss: Loss | None = None,
    *,
    sigma_w: Sequence[float] = SIGMA_W,
    sigma_b2: float | None = None,
    depths: Sequence[int] = DEPTHS,
    train: Callable[[Point], float] | None = None,
    map: trials.Map | Executor | None = None,
    store: str | os.PathLike[str] | None = None,
    progress: trials.Progress | None = None,
) -> Trainability:
    """The depth to which networks of one kind train, over the scale of their weights.

    Args:
        of: an activation, that is a name of `theory.NAMES` or any elementwise function; or, with its `loss`, a
            model that is a plain chain of layers with one activation, whose kind is read off.
        loss: `loss(model)`, as for `measure`.
        sigma_w: standard deviations of the weights times sqrt(fan_in), rising; a model's own is added.
        sigma_b2: variance of the biases; by default the model's own, or 0.05.
        depths: hidden layers, rising.
        train: trains the network of one `Point` and returns its score, higher is better; a picklable
            closure of the point alone, so that trials may run anywhere. Without it there is only theory.
        map: where trials run, see `isograd.trials`: processes of this machine, an executor, any `map`.
        store: a file of JSON lines that makes the trials resumable.
        progress: called with (done, all) trials.

    Raises:
        ValueError: an unknown activation, a scale that is not positive, or a model that is no plain chain.
        trials.Interrupted: Ctrl-C during the trials; those that were done are in `store`.

    Example:
        >>> trainability("tanh", sigma_w=[1.0, 1.76], depths=[10]).columns[0].phase
        'ordered'
    """
    own: Point | None = None
    if loss is not None and isinstance(of, nn.Module):
        phi, own = _read(measure(of, loss))
        sigma_w, depths = sorted({*sigma_w, own.sigma_w}), sorted({*depths, own.depth})
        sigma_b2 = own.sigma_b2 if sigma_b2 is None else sigma_b2
    else:
        phi, sigma_b2 = of, 0.05 if sigma_b2 is None else sigma_b2
    name = activation(phi).name
    columns = tuple(_predicted(phi, scale, sigma_b2) for scale in sigma_w)
    found = Trainability(name, sigma_b2, columns, tuple(depths), own=own)
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
    return replace(found, scores=rows, failed=tuple(failed))


def _read(flow: Flow) -> tuple[theory.Phi, Point]:
    """The activation and the scales of a plain chain, as they are in its hidden layers.

    Raises:
        ValueError: it has skips, normalisation, several activations, or a layer that theory has no word for.
    """
    operations = Operations(flow)
    hidden = range(*flow.hidden.indices(len(flow.sites)))
    rms = [float(v) for v in flow.column("activation_rms")]
    chain = [operations.site(i, rms[i - 1], gaussian=True) for i in hidden]
    steps = [step for part in chain if part is not None for step in part]
    layers = [step for step in steps if isinstance(step, theory.Linear)]
    functions = dict.fromkeys(step.phi for step in steps if isinstance(step, theory.Elementwise))
    if None in chain or len(layers) + sum(isinstance(s, theory.Elementwise) for s in steps) < len(steps):
        raise ValueError(
            "the model is no plain chain of layers and one activation, of which alone the depth is known: "
            "isograd.extrapolate(model, loss, depths) carries its own gain to other depths"
        )
    if not layers or len(functions) != 1:
        raise ValueError(f"need hidden layers with one kind of activation; found {len(functions)} kinds")
    phi = next(iter(functions))
    sigma_w = math.sqrt(sum(s.fan_in * s.weight_std**2 for s in layers) / len(layers))
    sigma_b2 = sum(s.bias_std**2 for s in layers) / len(layers)
    return phi, Point(activation(phi).name, sigma_w, sigma_b2, flow.layers - 1 or 1)


def _predicted(phi: theory.Phi, sigma_w: float, sigma_b2: float) -> Column:
    point = theory.fixed_point(phi, sigma_w=sigma_w, sigma_b2=sigma_b2)
    return Column(sigma_w, point.q, point.gain, point.depth_scale)


def _layers(value: float) -> str:
    return "any" if math.isinf(value) else f"{value:.1f}"
