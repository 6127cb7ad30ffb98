"""VG104 epsilon-above-variance: normalisations divide by their epsilon, and no longer normalise.

What it means
    A normalisation divides by sqrt(variance + epsilon). Where epsilon is far above the variance of what it is given,
    that is a constant, and its output is as much too small: residual branches add next to nothing, and the head
    reads next to nothing.

Why it happens
    An epsilon of another framework, of a paper's other scale, or mistyped; or weights and embeddings drawn so small
    that the usual epsilon is large beside them.

Evidence
    Exact: epsilon, and the variance of the input, of every normalisation that ran; also of those written out, where
    the root of a sum with a number is taken in a module that is called a norm. sqrt(variance / (variance + epsilon))
    is what is left of the scale. An error where less than a tenth is, in the median of them: one alone, such as
    the first behind a small embedding, is made good by those that follow.

What helps
    Epsilon at its default, 1e-5; embeddings and weights at their usual scale.

References
    Ioffe and Szegedy 2015, Batch Normalization; Ba et al. 2016, Layer Normalization; Zhang and Sennrich 2019, RMSNorm.
"""

from __future__ import annotations

from collections.abc import Iterator

from isograd.diagnosis import Finding, Severity
from isograd.flow import Flow
from isograd.symptoms import Healthy, Outcome

CODE = "VG104"
NAME = "epsilon-above-variance"

ERROR = 0.1
"""At a tenth of the scale a pre-norm decoder lost 42% of its lead and a residual CNN 82%, at a third 15% and 36%
(`python -m benchmarks.twins.thresholds epsilon`)."""
USUAL = (1e-8, 1e-2)
"""Between these an epsilon is left alone: where it is above the variance, what is normalised has been drawn too small."""
WARNING = 0.5
"""Epsilon at three times the variance: half of the scale is lost, and what it is then depends on the input's."""


def examine(flow: Flow) -> Iterator[Outcome]:
    """What every normalisation leaves of the scale that it is there to give."""
    seen = [n for n in flow.normalisations if 0 < n.kept <= 1]
    if not seen:
        yield Healthy("nothing that varies is normalised")
        return
    worst = min(seen, key=lambda n: n.kept)
    middle = sorted(n.kept for n in seen)[len(seen) // 2]
    limit = next((limit for limit in (ERROR, WARNING) if middle < limit), None)
    if limit is None:
        yield Healthy(f"the median of {len(seen)} normalisations gives {middle:.2g} of unit scale")
        return
    told = [n for n in seen if n.kept < limit]
    usual = all(USUAL[0] <= n.epsilon <= USUAL[1] for n in told)
    yield Finding(
        CODE,
        NAME,
        Severity.ERROR if limit == ERROR else Severity.WARNING,
        f"epsilon is {worst.epsilon:.2g} where the variance is {worst.variance:.2g}: {worst.site.name} gives "
        f"{worst.kept:.2g} of unit scale; {len(told)} of {len(seen)} normalisations give less than "
        f"{limit}",
        cause="weights or embeddings that are far too small"
        if usual
        else "the epsilon of the normalisation layers",
        sites=tuple(n.site.place for n in sorted(told, key=lambda n: n.kept)[:3]),
        evidence={
            "epsilon": worst.epsilon,
            "variance": worst.variance,
            "kept": worst.kept,
            "threshold": limit,
            "normalisations": len(told),
            "cause": "initialisation" if usual else "norm-epsilon",
        },
        remedies=("critical-initialisation" if usual else "reset-norm-epsilon", "scale-embeddings"),
    )
