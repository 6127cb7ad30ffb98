"""lower-learning-rate: a learning rate below the one at which the loss stops falling.

What it does
    Tries steps of doubling length on a copy, with the same batch, until the loss no longer falls; about 15 forward
    passes for each optimizer. Asks the training for half of that with SGD, and for a tenth with Adam.

When it helps
    Where the first updates are too large, the loss spikes or diverges, and the flow itself is healthy.

Expected effect
    The rate found is 2 / lambda, lambda the curvature along the gradient; half of it is where a quadratic is lowest
    along the line. Adam goes on in one direction for about 1 / (1 - beta_1) = 10 steps, hence a tenth.

Safety
    Safe for the model, which is not touched; the training changes. One batch decides: curvature rises during training.

References
    arXiv:2601.16979 (critical sharpness); Smith 2017, arXiv:1506.01186 (range test); Cohen et al. 2021, arXiv:2103.00065.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from isograd.edit import Edit
from isograd.prescription import Patient, Prescription, Reach, Safety, not_applicable
from isograd.rates import Direction, adam, critical_rate, gradient_descent

SLUG = "lower-learning-rate"
TREATS = ("UP502", "UP506", "TR702", "TR703", "learning-rate")
OPTIMIZERS: dict[str, tuple[Direction, float]] = {"SGD": (gradient_descent, 2.0), "AdamW": (adam, 10.0)}
"""How each steps, and by how much its rate stays below the critical one."""


def prescribe(patient: Patient) -> Iterator[Prescription]:
    """A rate for SGD, and one for the Adam family."""
    if patient.loss is None:
        yield not_applicable(
            SLUG, "the rate is found by trying steps, which needs a loss: prescribe(…, loss=loss)"
        )
        return
    for name, (direction, below) in OPTIMIZERS.items():
        try:
            found = critical_rate(patient.model, patient.loss, direction)
        except ValueError as error:
            yield not_applicable(SLUG, f"for {name}, {error}")
            continue
        if not 0 < found.rate < math.inf:
            yield not_applicable(
                SLUG, f"for {name}, no step was found beyond which the loss of this batch rises again"
            )
            continue
        rate = float(f"{found.rate / below:.2g}")
        yield Prescription(
            SLUG,
            f"{name} at a learning rate of at most {rate:g}",
            (
                Edit("optimizer", "configure", arguments={"value": name}),
                Edit("lr", "configure", arguments={"value": rate}),
            ),
            safety=Safety.SAFE,
            reach=Reach.TRAINING,
            treats=TREATS,
            expected=f"the loss of this batch falls up to a rate of {found.rate:.2g} (sharpness {found.sharpness:.2g})",
            references=("arXiv:2601.16979",),
            advice=(f"torch.optim.{name}(model.parameters(), lr={rate:g})",),
        )
