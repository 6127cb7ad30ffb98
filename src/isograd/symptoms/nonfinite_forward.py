"""NF401 non-finite-forward: a NaN or an Inf appears in the forward pass.

What it means
    The loss is not finite, and neither is any gradient. One optimizer step makes every weight NaN.

Why it happens
    Data that holds such a value already: an input, a target, a buffer. A logarithm or division of zero, the square
    root of a negative number, an exponential of a large number, a mean of nothing, a row of an attention that is
    masked throughout, or activations that grew beyond what the number format holds.

Evidence
    Of the operations from which such a value leads to the loss, the first in the order of execution; and whether what
    it works with (inputs, targets, buffers, weights) held one before. Masks that are minus infinity on purpose do
    not count, unless an operation makes a NaN of them: then that one is named.

What helps
    A look at the data, where it came with the data. Else the numerically safe form of the loss (`cross_entropy` on
    logits for log of softmax, `binary_cross_entropy_with_logits` for log of sigmoid), an epsilon inside logarithms,
    roots and divisions; where the signal has grown until it overflowed, a smaller initialisation or a normalisation; float32 or bfloat16 where float16 overflows.

References
    Higham 2002, Accuracy and Stability of Numerical Algorithms; Blanchard et al. 2021 (log-sum-exp).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from isograd.diagnosis import Finding, Severity
from isograd.flow import Flow
from isograd.statistics import NonFinite
from isograd.symptoms import Healthy, Outcome

CODE = "NF401"
NAME = "non-finite-forward"

HELP = {
    "numerics": ("safe-loss", "critical-initialisation"),
    "growth": ("critical-initialisation", "scale-residual-branches", "insert-normalisation"),
    "precision": ("bfloat16", "loss-scale", "critical-initialisation"),
    "data": ("check the data of this batch for values that are not finite",),
    "weights": ("go back to a checkpoint that is finite: a step before this one has broken the model",),
    "mask": ("keep one element of each row unmasked, or put a large finite number in place of the Inf",),
    "empty": ("skip batches without a sample or a target",),
}
"""What helps, by cause."""
GROWING = {"exp", "expm1", "exp2", "pow", "cosh", "sinh"}
"""Operations that make an Inf of what is large."""
POSITIVE = {"log", "log2", "log10", "rsqrt", "reciprocal", "div", "truediv", "rtruediv"}
"""Operations that make one of zero, or a NaN of what is negative."""


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
    place = f"{made.site.place} is the first operation with {made.what} in its output"
    if made.site.operation == "input":
        place = f"the model's argument {dict(made.site.settings)['name']} holds {made.what}"
    yield Finding(
        CODE,
        NAME,
        Severity.ERROR,
        f"the loss is {value}; {place}",
        cause=made.words,
        sites=(made.site.place,),
        evidence={
            "operation": made.site.operation,
            "phase": "forward",
            "source": made.site.source,
            "loss": str(flow.loss),
            "cause": made.cause,
        },
        remedies=(*_bounded(made), *HELP[made.cause], *_positive(made)),
    )


def _bounded(made: NonFinite) -> Iterator[str]:
    """What to write where a function grows beyond all numbers."""
    if made.cause == "numerics" and made.site.operation in GROWING:
        yield (
            f"{made.site.source or made.site.name}: bound what goes into {made.site.operation}, by torch.tanh or clamp(max=…), "
            "and draw the layer that makes it near zero"
        )


def _positive(made: NonFinite) -> Iterator[str]:
    """What to write where it is given zero or less, and is no matter of a softmax before a logarithm."""
    if made.cause == "numerics" and made.site.operation in POSITIVE:
        yield (
            f"{made.site.source or made.site.name}: keep what goes into {made.site.operation} above zero: "
            "functional.softplus(x) + eps, x.clamp(min=eps)"
        )
