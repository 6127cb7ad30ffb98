"""batch-statistics: batch normalisations divide by what they see, not by what they once saw.

What it does
    Switches the batch normalisations that stand in eval mode back to training mode.

When it helps
    In eval mode a batch normalisation divides by running statistics. Before any training these are 0 and 1, whatever
    the signal is; after a change of the data or a broken checkpoint they are those of something else. The signal then
    shrinks or grows in every layer as if there were no normalisation.

Expected effect
    Unit variance behind every batch normalisation, before its gain and shift.

Safety
    Unsafe: the model computes another function. A model that is frozen in eval mode on purpose needs statistics that
    fit instead: run it over its data once in training mode with momentum None.

References
    Ioffe and Szegedy 2015, Batch Normalization.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from isograd.edit import Edit
from isograd.prescription import Patient, Prescription, Reach, not_applicable

SLUG = "batch-statistics"
TREATS = ("norm-statistics", "VG101", "EG201", "EG202", "VG106")


def prescribe(patient: Patient) -> Iterator[Prescription]:
    """One edit a layer."""
    fixed = {n.site.module for n in patient.flow.normalisations if n.fixed}
    edits = tuple(
        Edit(f"{name}.training".lstrip("."), "set", arguments={"value": True}, before="False")
        for name, module in patient.model.named_modules()
        if name in fixed and isinstance(module, nn.modules.batchnorm._BatchNorm)
    )
    if not edits:
        yield not_applicable(SLUG, "no batch normalisation runs on statistics of the past")
        return
    yield Prescription(
        SLUG,
        f"statistics of the batch for {len(edits)} batch normalisations",
        edits,
        reach=Reach.TRAINING,
        treats=TREATS,
        expected="unit variance behind each",
        references=("Ioffe and Szegedy 2015, arXiv:1502.03167",),
        advice=("in the training loop: model.train()",),
    )
