"""The gradient along time: from the output at one step to the input at each step before it.

A recurrence multiplies the same Jacobian once a step, so that its gradient falls or grows like factor**lag;
attention, and a skip over time, does not. `horizon` measures both in the same way, at the model's input.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.nn.parameter import is_lazy

from isograd.graph.preserve import preserved
from isograd.graph.scaled import ScaledBackward, log10_norms
from isograd.graph.traced import Loss, _eager, unwrapped
from isograd.recurrent.arguments import arguments, opened_for, trainable
from isograd.recurrent.axes import End, Place, output_of, places
from isograd.recurrent.recurrence import Recurrence, recurrences
from isograd.recurrent.unrolled import Unrolled

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
PROBES = 4
"""Random directions at the output that the gradient starts from."""


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


def horizon(
    model: nn.Module,
    inputs: Any,
    *,
    at: int = -1,
    seed: int = 0,
    time: int | None = None,
    probes: int = PROBES,
    each: Callable[[Horizon], None] | None = None,
) -> Horizon:
    """The gradient from the model's output at one time step to its input at every step before.

    `nn.RNN`, `nn.LSTM` and `nn.GRU` run as loops that give the same numbers as their fused kernels, which
    is asserted. Integer inputs are differentiated at their embedding. The backward rescales every gradient
    on its way, so that no lag under- or overflows. The model is left as it was, bit by bit.

    Args:
        model: any module that maps a sequence to a sequence, or to one output for all of it.
        inputs: what the model is called with: a tensor, a tuple or list of arguments, a mapping of keywords.
        at: output step to start from; negative counts from the end. Without steps in the output, -1.
        seed: of the random directions at the output.
        time: axis of the input along which time runs. By default it is found from what runs along it:
            recurrent kernels, attention, convolutions, loops; or the second axis of a batch of tokens.
        probes: random directions; their spread is reported.
        each: called with what is known after every probe.

    Raises:
        TypeError: the model is no module, or returns no float tensor.
        ValueError: which axis is time cannot be told, the output has no such step or does not depend on
            the input.

    Source: Pascanu et al. 2013, On the difficulty of training recurrent neural networks, section 2.
    """
    args, kwargs = arguments(inputs)
    return _along(model, args, kwargs, None, at=at, seed=seed, time=time, probes=probes, each=each)


def horizon_of_loss(
    model: nn.Module,
    loss: Loss,
    *,
    at: int = -1,
    seed: int = 0,
    time: int | None = None,
    probes: int = PROBES,
    each: Callable[[Horizon], None] | None = None,
) -> Horizon:
    """The same for the inputs that `loss(model)` calls the model with; knows which output steps the loss reads.

    Raises:
        TypeError, ValueError: as `horizon`; or the loss does not call the model as a whole.
    """
    model, _ = unwrapped(model)
    calls: list[tuple[tuple[Any, ...], dict[str, Any], Any]] = []

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        calls.append((args, kwargs, result))

    handle = model.register_forward_hook(keep, with_kwargs=True)
    try:
        with preserved(model), _eager():
            value = loss(model)
            if not calls:
                raise ValueError("loss(model) does not call the model itself, so its input is not known")
            args, kwargs, result = calls[0]
            read = _read(value, output_of(result))
    finally:
        handle.remove()
    return _along(model, args, kwargs, read, at=at, seed=seed, time=time, probes=probes, each=each)


def _read(value: Any, output: Tensor) -> Tensor | None:
    """Gradient of the loss by the output; None where it has none."""
    if not isinstance(value, Tensor) or not value.requires_grad or not output.requires_grad:
        return None
    return torch.autograd.grad(value.sum(), output, allow_unused=True)[0]


def _along(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    read: Tensor | None,
    *,
    at: int,
    seed: int,
    time: int | None,
    probes: int,
    each: Callable[[Horizon], None] | None,
) -> Horizon:
    if probes < 1:
        raise ValueError(f"{probes} probes measure nothing; at least one is needed")
    model, notes = unwrapped(model)
    if any(is_lazy(p) for p in [*model.parameters(), *model.buffers()]):
        raise ValueError("the model has lazy layers without a shape: run it once, then measure it")
    with preserved(model), trainable(model), _eager():
        args, kwargs, opened = opened_for(model, args, kwargs)
        with Unrolled(model) as seen:
            result = model(*args, **kwargs)
        output = output_of(result)
        place, end = _connected(places(opened, seen, time), output, at)
        backward = ScaledBackward(get_gradient_edge(output), [place.edge])
        found = Horizon(
            curve=torch.empty(0, dtype=torch.float64),
            spread=torch.empty(0, dtype=torch.float64),
            ahead=torch.empty(0, dtype=torch.float64),
            at=end.at,
            length=place.length,
            probes=0,
            seed=seed,
            source=place.name,
            axis=place.axis,
            output=end.words,
            at_end=end.alone(read),
            recurrences=recurrences(model, seen),
            differing=_differing(place, opened, end.at),
            notes=tuple(notes),
        )
        generator = torch.Generator().manual_seed(seed)
        rows: list[Tensor] = []
        for _ in range(probes):
            (terms,) = backward(end.cotangent(generator))
            rows.append(log10_norms(terms, place.axis, place.length))
            found = _with(found, torch.stack(rows))
            if each is not None:
                each(found)
    return _said(found, output.dtype)


def _differing(place: Place, opened: Mapping[str, Tensor], at: int) -> Tensor | None:
    """Variance over the samples at each step up to `at`, the latest first; of tokens, how many are not the first's."""
    given = opened.get(place.name.removeprefix("embedding of "))
    if given is None or given.ndim < 2 or given.shape[place.axis] != place.length:
        return None
    samples = 1 if place.axis == 0 else 0
    if given.shape[samples] < 2 or (given.is_floating_point() and given.ndim == 2 and samples == 1):
        return None
    steps = given.detach().movedim((place.axis, samples), (0, 1))
    steps = steps.reshape(*steps.shape[:2], -1).double()  # (step, sample, feature)
    apart = steps - steps.mean(1, keepdim=True) if given.is_floating_point() else steps != steps[:, :1]
    return apart.double().square().mean((1, 2))[: at + 1].flip(0).cpu()


def _with(blank: Horizon, logs: Tensor) -> Horizon:
    """logs: (probe, step)."""
    mean = logs.mean(0)
    spread = logs.std(0) if len(logs) > 1 else torch.full((logs.shape[1],), math.nan, dtype=torch.float64)
    spread = torch.where(mean.isfinite(), spread, math.nan)
    past = slice(None, blank.at + 1)
    return replace(
        blank,
        curve=mean[past].flip(0),
        spread=spread[past].flip(0),
        ahead=mean[blank.at + 1 :],
        probes=len(logs),
    )


def _said(found: Horizon, dtype: torch.dtype) -> Horizon:
    """Notes on what the numbers are."""
    notes = list(found.notes)
    if found.curve.isnan().any():
        notes.append(f"the gradient is not finite at {int(found.curve.isnan().sum())} steps")
        return replace(found, notes=tuple(notes))
    if found.reference < float(found.curve[0]):
        times = 10 ** (float(found.curve[0]) - found.reference)
        notes.append(
            f"the step itself receives {times:.0f} times more than any before it, by a way around the memory: "
            "the strongest earlier step counts as 100%"
        )
    if found.reach < found.at:
        tiny = math.log10(torch.finfo(dtype).tiny)
        least = float(found.curve[found.reach]) if found.reach >= 0 else -math.inf
        if least - float(found.curve.max()) < tiny / 2:
            notes.append(
                f"beyond lag {found.reach} one operation's own values leave the range of "
                f"{str(dtype).removeprefix('torch.')}: try model.double()"
            )
        else:
            notes.append(f"beyond lag {found.reach} the gradient is exactly zero: no path leads further back")
    if dtype in (torch.float16, torch.bfloat16):
        notes.append(f"computed in {str(dtype).removeprefix('torch.')}: 2 digits")
    return replace(found, notes=tuple(notes))


def _connected(candidates: Sequence[Place], output: Tensor, at: int) -> tuple[Place, End]:
    """The first place that the output depends on, and the output's step."""
    for place in candidates:
        if output.requires_grad and ScaledBackward(get_gradient_edge(output), [place.edge]).connected:
            return place, place.end(output, at)
    raise ValueError(
        "the output does not depend on the input: it was computed under no_grad, detached, or from other data"
    )
