"""VG106 muted-normalisation: the gains of most normalisations are near zero, and so is what they pass on.

What it means
    Each of these layers gives a signal of a few percent of unit scale. The next normalisation restores its size, so
    that no decades need be lost; but the function of gains and shifts in between does not change when both are
    scaled, and a step of the usual size is then many times their own: the first updates decide what remains of the
    signal. Where a residual branch starts with such a gain the branch is silent, and at the head the answers are.

Why it happens
    An initialiser that treats every parameter alike, as N(0, 0.02), and draws the gains too; weight decay on the
    gains. Or batch normalisation in eval mode, whose running statistics are not those of what it is given.

Evidence
    Root mean square of the output of each normalisation over that of what is normalised, whatever its gain is
    called: 1 at the usual start. An error where it is below 0.03 in more than half of them, a warning below 0.15: what
    is lost there is time. A gain of exactly zero
    at the end of a residual branch is meant so, and is not counted; nor are LayerScale, ReZero and other factors
    that are no normalisation. Where running statistics divide, the same of the scale that they alone make of the
    input.

What helps
    Gains of 1 and shifts of 0; no weight decay on them. Batch normalisation in training mode, or statistics that fit.

References
    van Laarhoven 2017, L2 Regularization versus Batch and Weight Normalization; Goyal et al. 2017, Accurate, Large
    Minibatch SGD, on gains of zero.
"""

from __future__ import annotations

from collections.abc import Iterator

from isograd.diagnosis import Finding, Severity
from isograd.flow import Flow
from isograd.statistics import Normalisation
from isograd.symptoms import Healthy, Outcome

CODE = "VG106"
NAME = "muted-normalisation"

ERROR = 0.03
"""Drawn from N(0, 0.02), the gains took half and more of their lead from a batch-normalised CNN, a post-norm decoder
and a ViT; at 0.05 the ViT still trained as well as its twin (`python -m benchmarks.twins.thresholds gain`)."""
WARNING = 0.15
"""GPT-2, Llama, OLMo 2, StableLM and OPT of four blocks are behind by 20 to 31% of their lead after 150 steps at 0.1, by 16 to
24% at 0.2."""


def examine(flow: Flow) -> Iterator[Outcome]:
    """The scale that every normalisation passes on."""
    seen = [n for n in flow.normalisations if n.gain >= 0]
    if len(seen) < 2:
        yield Healthy("fewer than two normalisations")
        return
    yield _unfitting(seen) or _gains(seen)


def _unfitting(seen: list[Normalisation]) -> Finding | None:
    """Running statistics of something else."""
    sick = [n for n in seen if 0 < n.fits < ERROR]
    if len(sick) <= len(seen) / 2:
        return None
    worst = min(sick, key=lambda n: n.fits)
    return Finding(
        CODE,
        NAME,
        Severity.ERROR,
        f"{len(sick)} of {len(seen)} normalisations run on statistics of the past that make less than {ERROR} of unit "
        f"scale of their input: {worst.site.name} has a running variance of {worst.variance:.2g} for {worst.given:.2g}",
        cause="the running statistics of batch normalisation in eval mode",
        sites=tuple(n.site.place for n in sorted(sick, key=lambda n: n.fits)[:3]),
        evidence={
            "scale": worst.fits,
            "threshold": ERROR,
            "normalisations": len(sick),
            "cause": "norm-statistics",
        },
        remedies=("batch-statistics",),
    )


def _gains(seen: list[Normalisation]) -> Outcome:
    middle = sorted(n.gain for n in seen)[len(seen) // 2]
    for severity, threshold in ((Severity.ERROR, ERROR), (Severity.WARNING, WARNING)):
        muted = sorted((n for n in seen if 0 < n.gain < threshold), key=lambda n: n.gain)
        if len(muted) > len(seen) / 2:
            return Finding(
                CODE,
                NAME,
                severity,
                f"{len(muted)} of {len(seen)} normalisations pass on less than {threshold} of unit scale (median {middle:.2g})",
                cause="the gains of the normalisation layers",
                sites=tuple(n.site.place for n in muted[:3]),
                evidence={
                    "gain": middle,
                    "threshold": threshold,
                    "normalisations": len(muted),
                    "cause": "norm-gain",
                },
                remedies=("reset-norm-gain",),
            )
    return Healthy(f"the median of {len(seen)} normalisations passes on a scale of {middle:.2g}")
