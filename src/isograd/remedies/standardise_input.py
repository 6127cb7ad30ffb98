"""standardise-input: (x - mean) / std in front of the first layer, with numbers from the data.

What it does
    Wraps the layer that reads the data; where several read them, or something else does first, the model's forward is
    given the standardised argument. The numbers come from the batch that the loss uses: one for each feature of a
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

from collections.abc import Collection, Iterator
from inspect import signature
from typing import Any

from torch import Tensor, nn

from isograd.edit import Edit, Value
from isograd.flow import Flow
from isograd.graph.preserve import preserved
from isograd.prescription import Patient, Prescription, Reach, not_applicable
from isograd.statistics import InputStatistics
from isograd.symptoms.unnormalised_input import alike

SLUG = "standardise-input"
TREATS = ("unnormalised-input", "VG101", "EG201", "EG202", "EG205")
NEAR = (0.1, 3.0)
"""RMS between which an input is in the range that initialisations are made for."""
SPARSE = 0.5
"""Share of the samples that have a feature's median, from which one batch does not tell its scale, as of pixels at the border:
divided by their deviation in 48 digits, three networks ended at 1.5 to 3.2 times their loss on standardised data, and a fourth
diverged; divided by the largest of it, the four at 1.0 to 1.3 times."""
MOST = 64
"""Features that get numbers of their own: more make no readable diff."""


def prescribe(patient: Patient) -> Iterator[Prescription]:
    """A standardisation in front of the layer that reads the data, or of the model's arguments themselves."""
    off = {name: seen for name, seen in patient.flow.inputs.items() if _off(seen)}
    if not patient.flow.inputs:
        yield not_applicable(SLUG, "the model was given no floating-point input")
        return
    if not off:
        yield not_applicable(SLUG, "the inputs have an rms between 0.1 and 3 already, and differ")
        return
    by_hand = "standardise the data instead: x = (x - train.mean(0)) / train.std(0)"
    if any(seen.std == 0 for seen in off.values()):
        yield not_applicable(SLUG, "the input is constant", by_hand)
        return
    reader = _reader(patient.flow, patient.model, off)
    found = signature(patient.model.forward).parameters
    if reader is None and not off.keys() <= found.keys():
        why = (
            "no module reads the data first on the backbone, and they are no argument of the model's forward"
        )
        yield not_applicable(SLUG, why, by_hand)
        return
    edits: list[Edit] = []
    for name, seen in off.items():
        numbers = _numbers(patient, reader or "", "" if reader else name)
        mean, std, dim = numbers or (seen.mean, seen.std, -1)
        arguments: dict[str, Value] = {"mean": mean, "std": std, "dim": dim}
        if reader:
            edits.append(Edit(reader, "wrap", "modules.Standardised", arguments))
        else:
            edits.append(Edit("", "alter", "calls.standardise_argument", {"name": name, **arguments}))
    size = max(seen.rms for seen in off.values())
    where = f"in front of {reader}" if reader else f"as the model's argument {', '.join(off)}"
    yield Prescription(
        SLUG,
        f"input of rms {size:.3g} standardised {where}",
        tuple(edits),
        reach=Reach.TRAINING,
        treats=TREATS,
        expected=f"the first layer is given rms 1; its gradient changes by a factor of {1 / size:.2g}",
        references=("LeCun et al. 1998, Efficient BackProp",),
        advice=(f"the numbers come from one batch; {by_hand}",),
    )


def _off(seen: InputStatistics) -> bool:
    return not NEAR[0] < seen.rms < NEAR[1] or alike(seen)


def _reader(flow: Flow, model: nn.Module, off: Collection[str]) -> str | None:
    """The module of the first weights on the backbone, where only views lie between it and the one input that is off."""
    read = {value for key, value in flow.sites[0].settings if key == "name"}
    if len(off) > 1 or (read and not read <= set(off)):
        return None
    for site in flow.sites:
        if site.kind in ("linear", "convolution", "recurrent"):
            named = site.module and next(model.get_submodule(site.module).children(), None) is None
            return site.module if named else None
        if site.kind not in ("input", "reshape") or site.depth in flow.ledgers:
            return None
    return None


Number = float | tuple[float, ...]


def _numbers(patient: Patient, place: str, argument: str) -> tuple[Number, Number, int] | None:
    """Mean and standard deviation of each feature of what the module at `place` is given; None: not to be had.

    `argument`: its name, '' for the first.
    """
    taken: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = signature(module.forward).bind(*args, **kwargs).arguments if argument else {}
        value = given.get(argument) if argument else next(iter(args), None)
        if isinstance(value, Tensor):
            taken.append(value.detach().double())

    if patient.loss is None:
        return None
    handle = patient.model.get_submodule(place).register_forward_pre_hook(keep, with_kwargs=True)
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
    middle, std = rows.median(0).values, rows.std(0).clamp(min=1e-3 * float(x.std()))
    # A feature that is the same in most samples of this batch may differ more in the next: it is not blown up.
    sparse = (rows == middle).double().mean(0) > SPARSE
    reach = (rows - middle).abs().amax(0)
    common = float(std[~sparse].median()) if bool((~sparse).any()) else float(x.std())
    std = std.where(~sparse, reach.where(reach > 0, common))
    return _plain(rows.mean(0)), _plain(std), dim


def _plain(values: Tensor) -> tuple[float, ...]:
    return tuple(float(f"{value:.6g}") for value in values.tolist())
