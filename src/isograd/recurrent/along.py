"""The gradient along time: from the output at one step to the input at each step before it.

A recurrence multiplies the same Jacobian once a step, so that its gradient falls or grows like factor**lag;
attention, and a skip over time, does not. `horizon` measures both in the same way, at the model's input.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.nn.parameter import is_lazy

from isograd.graph.preserve import preserved
from isograd.graph.scaled import ScaledBackward, log10_norms
from isograd.graph.traced import Loss, _eager, unwrapped
from isograd.horizon import Horizon
from isograd.recurrent.arguments import arguments, opened_for, trainable
from isograd.recurrent.axes import End, Place, output_of, places
from isograd.recurrent.recurrence import recurrences
from isograd.recurrent.unrolled import Unrolled

PROBES = 4
"""Random directions at the output that the gradient starts from."""


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
