"""NF403 gradient-underflow: the gradient is too small for the number format it is stored in.

What it means
    In exact arithmetic the gradient exists; in this format most of its elements round to zero.

Why it happens
    float16 holds nothing below 6e-8, so that ordinary gradients underflow without loss scaling;
    float32 and bfloat16 underflow at 1e-38, after a gradient that has vanished for other reasons.

Evidence
    The measurement is rescaled and does not underflow; the true root mean square of the gradient at each
    site is held against the smallest number of that site's format.

What helps
    Loss scaling (`torch.amp.GradScaler`), bfloat16 in place of float16. Where the gradient vanishes along
    depth, cure that first: no format helps against 40 decades.

References
    Micikevicius et al. 2018, Mixed Precision Training.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from isograd.diagnosis import Finding, Severity
from isograd.flow import Flow
from isograd.symptoms import Healthy, Outcome, Unexamined
from isograd.symptoms.vanishing_gradient import ERROR

CODE = "NF403"
NAME = "gradient-underflow"


def examine(flow: Flow) -> Iterator[Outcome]:
    """Compare the true gradient at each site with the smallest number of its format."""
    logs = flow.column("grad_norm_log10")
    if flow.failure is not None or logs.isnan().all():
        yield Unexamined("no gradient was measured")
        return
    lost = [
        (site, float(log) - 0.5 * math.log10(max(math.prod(site.shape), 1)), _smallest(site.dtype))
        for site, log in zip(flow.sites, logs.tolist(), strict=True)
        if math.isfinite(log) and site.kind != "loss"
    ]
    under = [(site, rms, smallest) for site, rms, smallest in lost if rms < smallest]
    if not under:
        margin = min((rms - smallest for _, rms, smallest in lost), default=math.nan)
        yield Healthy(f"the smallest gradient lies {margin:.1f} decades above what its format holds")
        return
    site, rms, smallest = under[-1]
    alone = not abs(flow.lost) >= ERROR  # otherwise a consequence, told by the finding about depth
    yield Finding(
        CODE,
        NAME,
        Severity.ERROR if alone else Severity.INFO,
        f"the gradient underflows {site.dtype} at {len(under)} of {len(lost)} sites: its rms of 1e{rms:.0f} at "
        f"{site.name} is below the smallest number, 1e{smallest:.0f}",
        cause=f"{site.dtype} without loss scaling"
        if alone
        else "the gradient vanished before it underflowed",
        sites=tuple(s.place for s, *_ in under[-3:]),
        evidence={"rms_log10": rms, "smallest_log10": smallest, "sites": len(under), "cause": "precision"},
        remedies=("loss-scale", "bfloat16"),
    )


def _smallest(dtype: str) -> float:
    """log10 of the smallest positive (subnormal) number of a format."""
    info = (
        torch.finfo(getattr(torch, dtype)) if dtype in ("float16", "bfloat16", "float32", "float64") else None
    )
    return (
        math.log10(info.smallest_normal * info.eps)
        if info is not None and info.smallest_normal * info.eps
        else -323.0
    )
