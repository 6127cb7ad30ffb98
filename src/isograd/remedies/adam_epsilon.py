"""adam-epsilon: an epsilon that lies below the gradients, so that every layer moves.

What it does
    Asks the training for an epsilon of Adam's at a hundredth of the smallest layer's rms gradient.

When it helps
    Adam steps by g / (|g| + eps): a layer whose gradient lies below eps hardly moves, although Adam is there to make
    all steps alike. A loss in a small unit, a mean over many outputs or a deep layer can bring gradients below the
    default of 1e-8.

Expected effect
    A first step of lr * 0.99 in the layer with the smallest gradient, in place of lr * g / eps.

Safety
    Safe for the model, which is not touched; the training changes. Adam's squares underflow float32 below 1e-19: there
    the loss has to be scaled.

References
    Kingma and Ba 2015, arXiv:1412.6980; Dey et al. 2025, arXiv:2505.01618, on how it scales with width and depth.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from isograd.edit import Edit
from isograd.prescription import Patient, Prescription, Reach, Safety, not_applicable

SLUG = "adam-epsilon"
TREATS = ("UP503", "UP505", "UP507", "optimizer-epsilon")
DEFAULT = 1e-8
LOWEST = 1e-17
"""Below, the square of the gradient is not a normal number of float32 any more."""


def prescribe(patient: Patient) -> Iterator[Prescription]:
    """An epsilon for the smallest gradient that is not exactly zero."""
    sizes = {
        p.name: 10 ** max(p.grad_norm_log10, -300.0) / math.sqrt(max(math.prod(p.shape), 1))
        for p in patient.flow.parameters
        if p.state == "measured" and math.isfinite(p.grad_norm_log10)
    }
    if not sizes:
        yield not_applicable(SLUG, "no finite gradient was measured")
        return
    name, size = min(sizes.items(), key=lambda item: item[1])
    if size > 100 * DEFAULT:
        yield not_applicable(
            SLUG, f"the smallest rms gradient is {size:.1g}, far above the default epsilon of 1e-8"
        )
        return
    if size < LOWEST:
        yield not_applicable(
            SLUG,
            f"the gradient of {name} is {size:.1g}, and its square no number of float32",
            "multiply the loss by a constant: Adam's step does not depend on it",
        )
        return
    eps = 10.0 ** math.floor(math.log10(size) - 2)
    yield Prescription(
        SLUG,
        f"epsilon {eps:g} in Adam",
        (Edit("eps", "configure", arguments={"value": eps}, before="1e-08"),),
        safety=Safety.SAFE,
        reach=Reach.TRAINING,
        treats=TREATS,
        expected=f"the first step of {name} is {1 / (1 + eps / size):.2f} lr, with the default {1 / (1 + DEFAULT / size):.2g} lr",
        references=("Kingma and Ba 2015, arXiv:1412.6980",),
        advice=(f"torch.optim.AdamW(model.parameters(), lr=lr, eps={eps:g})",),
    )
