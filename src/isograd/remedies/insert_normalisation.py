"""insert-normalisation: LayerNorm, RMSNorm, BatchNorm or GroupNorm where the signal is not held.

What it does
    Puts a normalisation behind each hidden linear layer and convolution of a chain, before its activation; in a
    residual network at the entrance of each branch, with one more before the head. Never behind the head, inside an
    attention or a recurrence, or where a normalisation stands already. Frozen layers are left as they are.

When it helps
    Where the weights' scale and the activation do not hold the signal's variance, so that signal and gradient
    grow or shrink from layer to layer. Before that, look at the initialisation: it costs nothing at run time.

Expected effect
    The scale of the weights cancels. A layer's gain becomes sqrt(E phi'^2 / E phi^2) with LayerNorm and RMSNorm: 1 for
    ReLU, but 0.39 for a sigmoid, whose mean all samples share. BatchNorm takes that mean off: sqrt(E phi'^2 / Var phi),
    1.02 for a sigmoid and 1.21 for ReLU, which then explodes with depth unless there are skip connections.

Safety
    Unsafe: the model computes another function. BatchNorm makes samples depend on their batch.

References
    Ioffe and Szegedy 2015, arXiv:1502.03167; Ba et al. 2016, arXiv:1607.06450; Wu and He 2018, arXiv:1803.08494; Zhang
    and Sennrich 2019, arXiv:1910.07467; Yang et al. 2019, arXiv:1902.08129.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from isograd import theory
from isograd.anatomy import Branch, Layer, branches, expected, hidden, in_words, layers
from isograd.edit import Edit
from isograd.prescription import Patient, Prescription, Reach, not_applicable

SLUG = "insert-normalisation"
TREATS = ("missing-normalisation", "EG201", "EG202", "VG101")
REFERENCES = {
    "LayerNorm": "Ba et al. 2016, arXiv:1607.06450",
    "RMSNorm": "Zhang and Sennrich 2019, arXiv:1910.07467",
    "BatchNorm": "Ioffe and Szegedy 2015, arXiv:1502.03167",
    "GroupNorm": "Wu and He 2018, arXiv:1803.08494",
}
FEWEST = 8
"""Values that a BatchNorm takes its statistics over: below, the noise of the estimate does more than the norm."""


def prescribe(patient: Patient) -> Iterator[Prescription]:
    """One prescription for each kind of normalisation that fits, the one that theory expects most of first."""
    flow, model = patient.flow, patient.model
    bare = [layer for layer in hidden(flow, model) if not layer.normalised and not layer.frozen]
    streams = [b for b in branches(flow, model) if b.entrance and not b.inside and b.after is None]
    if not bare and not streams:
        yield not_applicable(SLUG, _why_not(patient))
        return
    found = [
        rx for kind in REFERENCES if (rx := _variant(kind, bare, streams, patient)) is not None and rx.edits
    ]
    yield from sorted(found, key=lambda rx: math.inf if math.isnan(rx.decades) else abs(rx.decades))


def _why_not(patient: Patient) -> str:
    if any(site.kind == "recurrent" for site in patient.flow.sites):
        return "the signal passes through a recurrence, which a normalisation behind it does not reach"
    if not hidden(patient.flow, patient.model) and not patient.flow.splits:
        return "no linear layer or convolution lies on the backbone between input and head"
    return "no layer or residual branch of the backbone lacks a normalisation where one could be put"


def groups_of(channels: int) -> int:
    """Groups for so many channels: 32 at most (Wu and He 2018), each of at least 4 channels."""
    return max(n for n in range(1, 33) if channels % n == 0 and (n == 1 or channels // n >= 4))


def _variant(kind: str, bare: list[Layer], streams: list[Branch], patient: Patient) -> Prescription | None:
    convolutional = any(layer.dims for layer in bare) or any(b.convolutional for b in streams)
    if (kind == "GroupNorm") != convolutional and kind in ("GroupNorm", "LayerNorm", "RMSNorm"):
        return None
    if kind == "BatchNorm" and (streams or not all(_batched(layer) for layer in bare)):
        return None
    edits = [_behind(kind, layer) for layer in bare] + list(_entrances(kind, streams, patient))
    chain = [] if streams else hidden(patient.flow, patient.model)
    places = {layer.place for layer in bare}
    batch = min((math.prod(layer.site.shape) // layer.features for layer in bare), default=math.inf)
    norm = {"BatchNorm": theory.BatchNorm(batch=batch), "RMSNorm": theory.RMSNorm()}.get(
        kind, theory.LayerNorm()
    )
    decades, spread = expected(
        patient.flow, chain, lambda layer: _inserted(layer, norm if layer.place in places else None)
    )
    where = f"behind {len(bare)} layers" if bare else ""
    at = f"at the entrance of {len({b.entrance for b in streams})} residual branches" if streams else ""
    return Prescription(
        SLUG,
        f"{kind} {' and '.join(part for part in (where, at) if part)}",
        tuple(edits),
        reach=Reach.NORMALISATION,
        treats=TREATS,
        expected=in_words(decades, spread, len(chain))
        if chain
        else "the gradient grows like a power of depth",
        decades=decades,
        references=(REFERENCES[kind],),
        advice=(
            "a model with BatchNorm behaves differently in eval(): call train() and eval() in the training loop",
        )
        if kind == "BatchNorm"
        else (),
    )


def _inserted(layer: Layer, norm: theory.Operation | None) -> list[theory.Operation]:
    first, *rest = layer.operations()
    return [first, *rest] if norm is None else [first, norm, *rest]


def _batched(layer: Layer) -> bool:
    flat = layer.dims > 0 or len(layer.site.shape) == 2
    return flat and math.prod(layer.site.shape) // layer.features >= FEWEST


def _behind(kind: str, layer: Layer) -> Edit:
    if layer.dims and kind != "BatchNorm":
        groups = {"groups": groups_of(layer.features), "channels": layer.features}
        return Edit(layer.place, "wrap", "modules.GroupNormed", {**groups})
    if kind == "BatchNorm":
        sizes = {"features": layer.features, "dims": layer.dims}
        return Edit(layer.place, "wrap", "modules.BatchNormed", {**sizes})
    of = "modules.RMSNormed" if kind == "RMSNorm" else "modules.LayerNormed"
    return Edit(layer.place, "wrap", of, {"features": layer.features})


def _entrances(kind: str, streams: list[Branch], patient: Patient) -> Iterator[Edit]:
    """A norm at each branch, once for a module that several layers share, and one before the head."""
    of = "modules.PreRMSNorm" if kind == "RMSNorm" else "modules.PreLayerNorm"
    for entrance, branch in {b.entrance: b for b in streams}.items():
        shape = branch.entered
        if branch.convolutional:
            sizes = {"groups": groups_of(shape[1]), "channels": shape[1]}
            yield Edit(entrance, "wrap", "modules.PreGroupNorm", {**sizes})
        else:
            yield Edit(entrance, "wrap", of, {"features": shape[-1]})
    everything = layers(patient.flow, patient.model)
    if streams and everything and not any(b.convolutional for b in streams):
        head = everything[-1]
        width = streams[-1].addition.shape[-1]
        after = not any(_norm_before(head, patient))
        if head.site.kind == "linear" and head.fan_in == width and after:
            yield Edit(head.place, "wrap", of, {"features": width})


def _norm_before(head: Layer, patient: Patient) -> Iterator[bool]:
    """Sites between the last residual sum and the head: is one a normalisation?"""
    for site in reversed(patient.flow.sites[: head.index]):
        if site.kind == "residual add":
            return
        yield site.kind == "normalisation"
