"""clip-gradients: g * min(1, c / norm) before each step, with c from the gradient itself.

What it does
    Asks the training for a maximal gradient norm. c is what the whole gradient's norm would be if every weight's were
    the median weight's, less the decades by which the signal grows, and never more than the norm measured. Where the
    gradient itself explodes, by more than the signal does, no norm of it tells what a usual one is: c is then 1.

When it helps
    Where single batches make gradients far larger than usual, or the first layers' gradient explodes: a step then
    stays as long as a typical one. The direction is kept, and so is the imbalance between layers: it treats the
    symptom, the initialisation or a normalisation the cause.

Expected effect
    No step is longer than lr * c.

Safety
    Safe for the model, which is not touched; the training changes.

References
    Mikolov 2012; Pascanu et al. 2013, arXiv:1211.5063, who take half to ten times the average norm.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from statistics import median

from isograd.edit import Edit
from isograd.prescription import Patient, Prescription, Reach, Safety, not_applicable
from isograd.symptoms.exploding_gradient import ERROR

SLUG = "clip-gradients"
TREATS = ("EG201", "RN602", "TR702", "gradient-spikes")
USUAL = 1.0
"""The norm that most published trainings are clipped at, in the unit of a loss whose mean is taken."""


def prescribe(patient: Patient) -> Iterator[Prescription]:
    """A threshold for the norm over all parameters."""
    measured = [p for p in patient.flow.parameters if math.isfinite(p.grad_norm_log10)]
    levels = [p.grad_norm_log10 for p in measured]
    if not levels:
        yield not_applicable(SLUG, "no finite gradient was measured to take a threshold from")
        return
    top = max(levels)
    total = top + math.log10(sum(10 ** (2 * (level - top)) for level in levels)) / 2
    weights = [p.grad_norm_log10 for p in measured if len(p.shape) > 1] or levels
    typical = median(weights) + math.log10(len(weights)) / 2
    growth = max(patient.flow.growth, 0.0) if math.isfinite(patient.flow.growth) else 0.0
    # The signal's growth is in every weight's gradient, as input times delta; what the gradient's adds is in most.
    exploding = patient.flow.lost - growth >= ERROR
    threshold = min(total, math.log10(USUAL) if exploding else typical - growth)
    if abs(threshold) > 30:
        yield not_applicable(
            SLUG, f"a typical gradient norm is 10^{threshold:.0f}: no clip makes steps of it, the layers do"
        )
        return
    c = float(f"{10**threshold:.3g}")
    yield Prescription(
        SLUG,
        f"gradient norm clipped at {c:g}",
        (Edit("clip_grad_norm", "configure", arguments={"value": c}, before=f"norm 10^{total:.1f}"),),
        safety=Safety.SAFE,
        reach=Reach.TRAINING,
        treats=TREATS,
        expected=f"steps no longer than lr x {c:g}; this batch's gradient is {10 ** min(total - threshold, 300):.3g} times c",
        references=("Pascanu et al. 2013, arXiv:1211.5063",),
        advice=(
            f"between loss.backward() and optimizer.step(): torch.nn.utils.clip_grad_norm_(model.parameters(), {c:g}, "
            "error_if_nonfinite=True)",
        ),
    )
