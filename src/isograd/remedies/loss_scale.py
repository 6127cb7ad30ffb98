"""loss-scale: the loss is multiplied before the backward in half precision, and the gradient divided after it.

What it does
    Asks the training for a power of two that lifts the largest gradient of this batch to a quarter of what float16
    holds.

When it helps
    float16 has nothing between 0 and 6e-8: smaller gradients become exactly 0. bfloat16 has the range of float32 and
    needs none.

Expected effect
    Every gradient moves up by log10(scale) decades in the backward; those within 11 decades of the largest are kept.

Safety
    Safe for the model, which is not touched; the training changes, and gradients are the same after unscaling.

References
    Micikevicius et al. 2018, arXiv:1710.03740; PyTorch, torch.amp.GradScaler.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from isograd.edit import Edit
from isograd.prescription import Patient, Prescription, Reach, Safety, not_applicable

SLUG = "loss-scale"
TREATS = ("NF403", "precision")
LARGEST = math.log2(65504)
HEADROOM = 2
"""Powers of two that are left free for a batch with larger gradients; GradScaler finds the rest."""
MOST = 24


def prescribe(patient: Patient) -> Iterator[Prescription]:
    """A start for the gradient scaler, where anything is computed in float16."""
    flow = patient.flow
    if not any(site.dtype == "float16" for site in flow.sites):
        yield not_applicable(
            SLUG, "nothing on the backbone is computed in float16, whose range is what a scale is for"
        )
        return
    levels = [*flow.column("grad_norm_log10").tolist(), *(p.grad_norm_log10 for p in flow.parameters)]
    finite = [level for level in levels if math.isfinite(level)]
    if not finite:
        yield not_applicable(SLUG, "no finite gradient was measured to take a scale from")
        return
    power = math.floor(LARGEST - HEADROOM - max(finite) * math.log2(10))
    power = min(max(power, 0), MOST)
    if power == 0:
        yield not_applicable(SLUG, "the largest gradient leaves no room for a scale above 1 in float16")
        return
    yield Prescription(
        SLUG,
        f"loss scaled by 2^{power}",
        (Edit("loss_scale", "configure", arguments={"value": float(2**power)}),),
        safety=Safety.SAFE,
        reach=Reach.TRAINING,
        treats=TREATS,
        expected=f"gradients lie {power * math.log10(2):.1f} decades higher during the backward",
        references=("Micikevicius et al. 2018, arXiv:1710.03740",),
        advice=(
            f"scaler = torch.amp.GradScaler(init_scale=2.0**{power}); scaler.scale(loss).backward(); scaler.step(optimizer); "
            "scaler.update()",
            "or train in bfloat16, which needs no scale",
        ),
    )
