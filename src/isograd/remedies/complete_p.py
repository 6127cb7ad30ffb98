"""complete-p: every residual branch times 1/L, so that depth changes neither the flow nor the learning rate.

What it does
    Puts the factor 1/L on each residual branch, L the number of blocks, as a constant of the model, and asks the
    training for an Adam epsilon that is smaller by the same factor. Weights are drawn as for a shallow model: with no
    further 1/sqrt(2L).

When it helps
    Where a model is to be made deeper: with 1/L all of its layers go on learning features at any depth, and the learning
    rate of a shallow model stays the best one. With 1/sqrt(L) it does not, though the flow at the start is as good.

Expected effect
    Signal and gradient change by a factor of at most e over any depth. Each branch's gradient is smaller by L, which
    Adam makes up for as long as its epsilon lies below.

Safety
    Unsafe: another function. The parameter is called `parametrizations.weight.original` from then on.

References
    Dey et al. 2025, Don't be lazy: CompleteP enables compute-efficient deep transformers, arXiv:2505.01618, table 1 with
    alpha = 1, and a base model of one block.
"""

from __future__ import annotations

from collections.abc import Iterator

from isograd.edit import Edit
from isograd.prescription import Patient, Prescription, Reach, not_applicable
from isograd.remedies.adam_epsilon import DEFAULT
from isograd.remedies.scale_residual_branches import blocks, multiplied, without_skips

SLUG = "complete-p"
TREATS = ("residual-branch-growth", "EG201", "EG202", "UP502")


def prescribe(patient: Patient) -> Iterator[Prescription]:
    """One factor, and an epsilon."""
    if why := without_skips(patient.flow):
        yield not_applicable(SLUG, why)
        return
    depth = blocks(patient.flow)
    if depth < 2:
        yield not_applicable(SLUG, "a single block has no depth to scale by")
        return
    try:
        edits = multiplied(patient, 1 / depth)
    except ValueError as error:
        yield not_applicable(SLUG, str(error), f"write x + f(x) / {depth} for x + f(x)")
        return
    eps = float(f"{DEFAULT / depth:.3g}")
    yield Prescription(
        SLUG,
        f"{len(edits)} residual branches times 1/{depth}",
        (*edits, Edit("eps", "configure", arguments={"value": eps}, before=f"{DEFAULT:g}")),
        reach=Reach.RESIDUAL,
        treats=TREATS,
        expected=f"{len(edits)} branches of variance v change signal and gradient by (1 + v / {depth**2})^{len(edits) / 2:g}",
        references=("Dey et al. 2025, arXiv:2505.01618",),
        advice=(
            "hidden learning rate, in units of a model of width n0: lr * n0 / n, at any depth; hidden weight decay * n / n0",
        ),
    )
