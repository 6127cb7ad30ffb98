"""standardise-input: (x - mean) / std in front of the first layer, with numbers from the data.

What it does
    Wraps the layer that reads the data. The numbers come from the batch that the loss uses: one for each feature of a
    vector and each channel of an image as long as there are at most 64, else one for all.

When it helps
    Every initialisation counts on inputs of variance 1. Larger ones saturate the first layer and make its gradient,
    and the first step, as much larger; a mean that all samples share makes one eigenvalue of the curvature large.

Expected effect
    rms 1 at the first layer. Its parameters' gradient shrinks by the factor by which the input was too large.

Safety
    Unsafe: another function. Better estimates come from the whole training set.

References
    LeCun et al. 1998, Efficient BackProp, section 4.3.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from isograd.flow import Flow
from isograd.graph.preserve import preserved
from isograd.prescription import Edit, Patient, Prescription, Reach, Value, not_applicable

SLUG = "standardise-input"
TREATS = ("unnormalised-input",)
NEAR = (0.1, 3.0)
"""RMS between which an input is in the range that initialisations are made for."""
MOST = 64
"""Features that get numbers of their own: more make no readable diff."""


def prescribe(patient: Patient) -> Iterator[Prescription]:
    """A standardisation in front of the layer that reads the data."""
    off = {name: seen for name, seen in patient.flow.inputs.items() if not NEAR[0] < seen.rms < NEAR[1]}
    if not patient.flow.inputs:
        yield not_applicable(SLUG, "the model was given no floating-point input")
        return
    if not off:
        yield not_applicable(SLUG, "the inputs have an rms between 0.1 and 3 already")
        return
    place = _reader(patient.flow, patient.model)
    seen = next(iter(off.values()))
    by_hand = "standardise the data instead: x = (x - train.mean(0)) / train.std(0)"
    if place is None or seen.std == 0:
        why = "the input is constant" if seen.std == 0 else "no module reads the data first on the backbone"
        yield not_applicable(SLUG, why, by_hand)
        return
    mean, std, dim = _numbers(patient, place) or (seen.mean, seen.std, -1)
    arguments: dict[str, Value] = {"mean": mean, "std": std, "dim": dim}
    yield Prescription(
        SLUG,
        f"input of rms {seen.rms:.3g} standardised in front of {place}",
        (Edit(place, "wrap", "modules.Standardised", arguments),),
        reach=Reach.TRAINING,
        treats=TREATS,
        expected=f"the first layer is given rms 1; its gradient changes by a factor of {1 / seen.rms:.2g}",
        references=("LeCun et al. 1998, Efficient BackProp",),
        advice=(f"the numbers come from one batch; {by_hand}",),
    )


def _reader(flow: Flow, model: nn.Module) -> str | None:
    """The module of the first weights on the backbone, where only views lie between it and the data."""
    for site in flow.sites:
        if site.kind in ("linear", "convolution", "recurrent"):
            named = site.module and next(model.get_submodule(site.module).children(), None) is None
            return site.module if named else None
        if site.kind not in ("input", "reshape"):
            return None
    return None


Number = float | tuple[float, ...]


def _numbers(patient: Patient, place: str) -> tuple[Number, Number, int] | None:
    """Mean and standard deviation of each feature of what the module at `place` is given; None: not to be had."""
    taken: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], Tensor):
            taken.append(args[0].detach().double())

    if patient.loss is None:
        return None
    handle = patient.model.get_submodule(place).register_forward_pre_hook(keep)
    try:
        with preserved(patient.model):  # with gradients: a loss may differentiate the model itself
            patient.loss(patient.model)
    finally:
        handle.remove()
    if not taken or taken[0].ndim < 2 or len(taken[0]) < 2:
        return None
    x, dim = taken[0], 1 if taken[0].ndim > 3 else -1
    if x.shape[dim] > MOST:
        return None
    rows = x.movedim(dim, -1).flatten(0, -2)
    whole = float(x.std())
    # A feature that hardly varies in this batch may in the next: it is not blown up.
    std = rows.std(0).clamp(min=1e-3 * whole)
    return _plain(rows.mean(0)), _plain(std), dim


def _plain(values: Tensor) -> tuple[float, ...]:
    return tuple(float(f"{value:.6g}") for value in values.tolist())
