"""NF401 non-finite-forward: a NaN or an Inf appears in the forward pass.

What it means
    The loss is not finite, and neither is any gradient. One optimizer step makes every weight NaN.

Why it happens
    A logarithm or division of zero, the square root of a negative number, an exponential of a large
    number, or activations that grew beyond what the number format holds.

Evidence
    The first operation, in the order of execution, whose output is not finite. Masks that are minus
    infinity on purpose do not count: they never reach the loss.

What helps
    The numerically safe form of the loss (`cross_entropy` on logits for log of softmax,
    `binary_cross_entropy_with_logits` for log of sigmoid), an epsilon inside logarithms, roots and
    divisions, a smaller initialisation, float32 or bfloat16 where float16 overflows.

References
    Higham 2002, Accuracy and Stability of Numerical Algorithms; Blanchard et al. 2021 (log-sum-exp).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from isograd.diagnosis import Finding, Severity
from isograd.flow import Flow
from isograd.symptoms import Healthy, Outcome

CODE = "NF401"
NAME = "non-finite-forward"


def examine(flow: Flow) -> Iterator[Outcome]:
    """Is the loss finite, and if not, where did it stop being so?"""
    if math.isfinite(flow.loss):
        yield Healthy(f"the loss is finite ({flow.loss:.4g})")
        return
    made = flow.nonfinite
    value = "NaN" if math.isnan(flow.loss) else "infinite"
    if made is None or made.phase != "forward":
        yield Finding(
            CODE, NAME, Severity.ERROR, f"the loss is {value}; the operation that made it was not seen"
        )
        return
    what = "NaN" if made.nan else "Inf"
    overflow = made.inf and made.site.dtype == "float16"
    yield Finding(
        CODE,
        NAME,
        Severity.ERROR,
        f"the loss is {value}; {made.site.place} is the first operation with a {what} in its output",
        cause=f"{made.site.operation} "
        + (
            "went beyond 65504, the largest number of float16"
            if overflow
            else f"made a {what} out of finite values"
        ),
        sites=(made.site.place,),
        evidence={
            "operation": made.site.operation,
            "phase": "forward",
            "source": made.site.source,
            "loss": str(flow.loss),
            "cause": "precision" if overflow else "numerics",
        },
        remedies=("safe-loss", "critical-initialisation", "loss-scale"),
    )
