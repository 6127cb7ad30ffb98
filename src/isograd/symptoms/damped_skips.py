"""VG107 damped-skips: there are residual connections, and little of the gradient comes by their skips.

What it means
    x + f(x) keeps a gradient whole whatever f does to it. Where the skip is multiplied, by a factor, a gate or a dropout
    of its own, the factors multiply along depth: of twenty skips of 0.3 a share of 4e-11 is left, and the model is the
    plain chain that its residual connections were to avoid. Normalisation restores the size of the signal after each
    block, so that no decades are lost; what is passed on forgets the input all the same, and gradients of neighbouring
    samples no longer agree (shattered gradients).

Why it happens
    A factor on the skip (0.5 * (x + f(x)) has one), an interpolation (1 - a) * x + a * f(x), a gate that starts open,
    or a skip that was switched off by a flag.

Evidence
    The norm of the gradient that came by the skip, over that which entered the sum, at each residual connection of the
    backbone whose skip has no layers of its own: 1 where it is whole. Told where the median is below 0.7 and less than a tenth is left of the way
    through all skips; an error from 15 damped ones. Plain and residual networks of few blocks train alike.

What helps
    A skip that is not multiplied; the branch scaled down instead, by 1/sqrt(L).

References
    He et al. 2016, Identity Mappings in Deep Residual Networks, section 3.1, on scaled and gated shortcuts; Balduzzi et
    al. 2017, The Shattered Gradients Problem.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from statistics import median

from isograd.diagnosis import Finding, Severity
from isograd.flow import Flow
from isograd.symptoms import Healthy, Outcome

CODE = "VG107"
NAME = "damped-skips"

DAMPED = 0.7
"""Share of the gradient that a skip must let through: at least 0.9 in the median of every healthy model of the zoo."""
LEFT = -1.0
"""Decades that are left of the way through all skips."""
MANY = 15
"""Skips. Normalised residual MLPs of 20 blocks lose 80% and more of their lead with skips of 0.3 and of 0, those of 10
blocks 8 to 10%, CNNs of 4 and 6 blocks nothing to a quarter; decoders, which lose all from 6 on, are VG105's
(`python -m benchmarks.twins run twin fault --only skips`)."""
NOTHING = 1e-9
"""A skip that is multiplied by zero, in the sum of their logarithms."""


def examine(flow: Flow) -> Iterator[Outcome]:
    """The skips along the main backbone and along those of the model's other inputs."""
    lines = [line for line in (flow, *flow.towers) if line.splits]
    if not lines:
        yield Healthy("no residual connections")
    for line in lines:
        yield _along(line)


def _along(line: Flow) -> Outcome:
    skips = {
        depth: split.skip
        for depth, split in line.splits.items()
        if not (split.projected or math.isnan(split.skip))
    }
    if not skips:
        return Healthy("no gradient comes by skips without layers of their own")
    middle = median(skips.values())
    left = sum(math.log10(max(skip, NOTHING)) for skip in skips.values())
    damped = [depth for depth, skip in skips.items() if skip < DAMPED]
    if middle >= DAMPED or left > LEFT:
        return Healthy(f"the median of {len(skips)} skips lets {middle:.2g} of the gradient by")
    return Finding(
        CODE,
        NAME,
        Severity.ERROR if len(damped) >= MANY else Severity.WARNING,
        f"{len(damped)} of {len(skips)} skip connections let {middle:.2g} of the gradient by (median)",
        cause="what multiplies the skips (not tested)",
        sites=tuple(line.sites[depth].place for depth in sorted(damped, key=skips.__getitem__)[:3]),
        evidence={
            "skip": middle,
            "threshold": DAMPED,
            "damped": len(damped),
            "skips": len(skips),
            "layers": line.layers,
            "cause": "missing-residual",
        },
        remedies=("insert-residual",),
    )
