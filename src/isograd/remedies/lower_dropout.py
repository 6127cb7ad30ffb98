"""lower-dropout: dropout leaves out a tenth.

What it does
    Sets p of the dropout modules that leave out more than half to 0.1.

When it helps
    Where the share that is kept was given for the share that is left out, or one dropout stands behind another and what they leave
    out outweighs what they let through.

Expected effect
    The power of the signal grows by 1.1 at each, where it grew by 1 / (1 - p). Four layers of digits behind dropout of 0.9 are
    at 2.22 after 100 steps, and at 0.1 at 0.014 (`python -m gallery.cures lower`).

Safety
    Unsafe: the model is trained on other noise. In eval mode it computes what it did.

References
    Srivastava et al. 2014, Dropout: a simple way to prevent neural networks from overfitting.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from isograd.edit import Edit
from isograd.prescription import Patient, Prescription, Reach, not_applicable
from isograd.symptoms.loud_dropout import dropouts

SLUG = "lower-dropout"
TREATS = ("dropout", "VG112")
USUAL = 0.1
MOST = 0.5
"""What is no more is left as it is."""


def prescribe(patient: Patient) -> Iterator[Prescription]:
    """One edit a module; calls of the function are to be changed by hand."""
    loud = {site: p for site, p in dropouts(patient.flow).items() if p > MOST}
    edits = tuple(
        Edit(f"{name}.p".lstrip("."), "set", arguments={"value": USUAL}, before=f"{module.p:g}")
        for name, module in patient.model.named_modules()
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > MOST
    )
    modules = {edit.place.rpartition(".")[0] for edit in edits}
    by_hand = dict.fromkeys(
        f"{site.source}: p={USUAL:g} in place of {p:g}"
        for site, p in loud.items()
        if site.module not in modules
    )
    if not edits or not loud:
        yield not_applicable(SLUG, f"no dropout module leaves out more than {MOST:.0%}", *by_hand)
        return
    yield Prescription(
        SLUG,
        f"dropout {USUAL:g} for {len(edits)} layers",
        edits,
        reach=Reach.TRAINING,
        treats=TREATS,
        expected="noise is a tenth of the signal at each",
        references=("Srivastava et al. 2014",),
        advice=tuple(by_hand),
    )
