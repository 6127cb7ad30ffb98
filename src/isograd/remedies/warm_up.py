"""warm-up: the learning rate rises linearly over the first steps.

What it does
    Asks the training for a linear warm-up over 2 / (1 - beta_2) steps: 2000 for Adam's default 0.999.

When it helps
    Adam's first steps are all of size lr, as its second moment knows one gradient only. Post-norm transformers, and
    whatever starts with a large curvature, diverge in them.

Expected effect
    The length of step t is lr * t / 2000 until the second moment has forgotten its start.

Safety
    Safe for the model, which is not touched; the training changes.

References
    Ma and Yarats 2021, arXiv:1910.04209 (the rule); Xiong et al. 2020, arXiv:2002.04745; Gilmer et al. 2021,
    arXiv:2110.04369.
"""

from __future__ import annotations

from collections.abc import Iterator

from isograd.anatomy import branches
from isograd.edit import Edit
from isograd.prescription import Patient, Prescription, Reach, Safety, not_applicable

SLUG = "warm-up"
TREATS = ("UP502", "UP506", "TR703", "post-norm", "learning-rate")
STEPS = 2000
"""2 / (1 - 0.999)."""


def prescribe(patient: Patient) -> Iterator[Prescription]:
    """A number of steps, where something asks for it: norms behind residual sums, or first updates too large."""
    post = any(b.after is not None and not b.inside for b in branches(patient.flow, patient.model))
    asked = any(SLUG in f.remedies or f.code in TREATS for f in patient.diagnosis.findings)
    if not post and not asked:
        yield not_applicable(SLUG, "neither post-norm blocks nor first updates that are too large ask for it")
        return
    yield Prescription(
        SLUG,
        f"linear warm-up over {STEPS} steps",
        (Edit("warmup", "configure", arguments={"value": STEPS}),),
        safety=Safety.SAFE,
        reach=Reach.TRAINING,
        treats=TREATS,
        expected=f"step t has length lr x t / {STEPS} at first",
        references=("Ma and Yarats 2021, arXiv:1910.04209",),
        advice=(
            f"torch.optim.lr_scheduler.LinearLR(optimizer, 1 / {STEPS}, total_iters={STEPS}), stepped after each "
            "optimizer.step(); in a run of fewer than 20 times as many steps, a twentieth of the run",
        ),
    )
