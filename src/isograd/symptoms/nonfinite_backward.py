"""NF402 non-finite-backward: the loss is finite, but its gradient is NaN or Inf.

What it means
    The forward pass looks well. The first optimizer step then writes NaN into the weights, and clipping
    spreads it to all of them.

Why it happens
    An operation whose value is finite and whose derivative is not: the square root or a norm at 0, a
    power below 1 at 0, a division hidden by `torch.where` (0 * Inf is NaN in the branch not taken), or
    a gradient that overflows half precision.

Evidence
    The first operation, on the way of the gradient, that received a finite gradient and passed on one
    that is not.

What helps
    An epsilon inside the root or norm, `torch.where` on the *input* of the dangerous operation, float32
    for that operation, loss scaling for float16.

References
    PyTorch issue 68425 (`where` and NaN gradients); Micikevicius et al. 2018, Mixed Precision Training.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from isograd.diagnosis import Finding, Severity
from isograd.flow import Flow
from isograd.symptoms import Healthy, Outcome, Unexamined

CODE = "NF402"
NAME = "non-finite-backward"


def examine(flow: Flow) -> Iterator[Outcome]:
    """Is every gradient finite, and if not, which operation made the first that is not?"""
    bad = [p for p in flow.parameters if p.nonfinite]
    if not math.isfinite(flow.loss) or flow.failure is not None:
        yield Unexamined("there is no finite loss to differentiate or the backward failed")
        return
    made = flow.nonfinite
    if made is None and not bad:
        yield Healthy(f"the gradients of {len(flow.parameters)} parameters are finite")
        return
    where = made.site if made is not None else None
    elements = sum(p.nonfinite for p in bad)
    place = where.place if where is not None else bad[0].name
    yield Finding(
        CODE,
        NAME,
        Severity.ERROR,
        f"the loss is finite, but the gradient of {len(bad)} parameter(s) is not ({elements} elements); "
        f"it was still finite at {place}",
        cause=made.words if made is not None else "",
        sites=(place,),
        evidence={
            "operation": where.operation if where is not None else "",
            "phase": "backward",
            "source": where.source if where is not None else "",
            "parameters": len(bad),
            "elements": elements,
        },
        remedies=("safe-derivative", "loss-scale"),
    )
