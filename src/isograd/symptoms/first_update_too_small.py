"""UP503 first-update-too-small: early layers hardly move in the optimizer's first step.

What it means
    Compared with the other layers, the first ones stand still. The network learns as if they were random.

Why it happens
    Their gradient vanished on the way, and the optimizer's rule does not make up for it: SGD moves by the
    gradient itself; Adam divides it out, until it falls below its epsilon.

Evidence
    rms(update) over rms(weight) of the weight matrices in the first third of the network, against the
    median of all: layers are compared with layers, never with a fixed number.

What helps
    Cure the vanishing gradient; Adam in place of SGD, or a smaller epsilon, as a stopgap.

References
    Karpathy 2019, A Recipe for Training Neural Networks (update ratio); TheDeepChecker 2022.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from statistics import median

from isograd.diagnosis import Finding, Severity
from isograd.flow import Flow
from isograd.statistics import Parameter
from isograd.symptoms import Healthy, Outcome, Unexamined

CODE = "UP503"
NAME = "first-update-too-small"

BEHIND = 1e-2
"""A hundredth of the median: in the time the others learn, these take no part."""


def examine(flow: Flow) -> Iterator[Outcome]:
    """Update ratios of the early weight matrices against the median."""
    matrices = [
        p
        for p in flow.parameters
        if len(p.shape) > 1 and not math.isnan(p.first_update) and not math.isnan(p.depth)
    ]
    if len(matrices) < 4:
        yield Unexamined("needs the optimizer and at least four weight matrices")
        return
    middle = median(p.first_update for p in matrices)
    edge = (
        min(p.depth for p in matrices) + (max(p.depth for p in matrices) - min(p.depth for p in matrices)) / 3
    )
    early = [p for p in matrices if p.depth <= edge and p.grad_norm_log10 != -math.inf]
    slow = [p for p in early if p.first_update < BEHIND * middle]
    if not early or len(slow) < len(early) / 2 or not middle > 0:
        yield Healthy(
            f"early weight matrices move by {_said(early)} of their size, the median by {middle:.1e}"
        )
        return
    yield Finding(
        CODE,
        NAME,
        Severity.WARNING,
        f"{len(slow)} of {len(early)} early weight matrices move by less than {BEHIND:g} of the median update "
        f"({min(p.first_update for p in slow):.1e} against {middle:.1e} of their size)",
        cause="their gradient is far smaller than that of later layers",
        sites=tuple(p.name for p in slow[:3]),
        evidence={"slow": len(slow), "early": len(early), "median": middle, "threshold": BEHIND},
        remedies=("critical-initialisation", "exchange-activation"),
    )


def _said(parameters: list[Parameter]) -> str:
    return f"{median(p.first_update for p in parameters):.1e}" if parameters else "nothing measurable"
