"""VG109 muted-branches: a constant makes what residual branches add so small that nothing they learn is heard.

What it means
    The gradient comes by the skips whole, and the branches add a thousandth of what they compute. Their weights receive
    a thousandth of the gradient; Adam, which divides by it, moves them as usual, and the stream by a thousandth of
    that. What is left to train is what lies outside of the branches: a head, an embedding. Of a frozen model with
    low-rank adapters nothing is.

Why it happens
    A constant in front of the sum: the alpha / rank of adapters that was set for another rank, a residual scale that
    is applied twice, a factor that was to be learned and is none.

Evidence
    The numbers that the user's code multiplies each branch by on the way of all of its gradient, where what the branch adds
    is less than a hundredth of its stream too. An error where more than half of the residual connections have one.
    A factor that is learned, as LayerScale's or ReZero's, opens with the first steps and is not counted.

What helps
    The factor left out, or 1/sqrt(number of blocks) in its place.

References
    Hu et al. 2022, LoRA, section 4.1; Touvron et al. 2021, Going deeper with Image Transformers (LayerScale, which is
    learned); Zhang et al. 2019, Fixup.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from isograd.diagnosis import Finding, Severity
from isograd.flow import FACTORS, Flow
from isograd.statistics import Site
from isograd.symptoms import Healthy, Outcome
from isograd.symptoms.shrunk_output import leave_out

CODE = "VG109"
NAME = "muted-branches"

ERROR = 0.003
"""Decoders of 3 and 6 blocks whose branches are multiplied by it have learned, after the same steps, what they learn at 1e-4:
nothing of their context; at 0.1 they learn next to all (`python -m benchmarks.twins.thresholds constant`). What is
published lies above: alpha / rank at 1/64, 1 / blocks at 0.01."""
HEARD = 0.01
"""rms of what a branch adds over that of its stream from which it is heard, whatever it is multiplied by."""


def examine(flow: Flow) -> Iterator[Outcome]:
    """The constants on all residual branches."""
    if not flow.splits:
        yield Healthy("no residual connections")
        return
    muted = constants(flow)
    if 2 * len(muted) <= len(flow.splits):
        yield Healthy(f"of {len(flow.splits)} residual branches {len(muted)} are muted by a constant")
        return
    sites = [site for depth in sorted(muted) for site, _ in muted[depth]]
    least = min(math.prod(times for _, times in found) for found in muted.values())
    yield Finding(
        CODE,
        NAME,
        Severity.ERROR,
        f"{len(muted)} of {len(flow.splits)} residual branches are multiplied by {least:.2g} before they are added",
        cause="a constant in front of the sum; the layers are not to blame",
        sites=tuple(dict.fromkeys(site.place for site in sites))[:3],
        evidence={
            "factor": least,
            "threshold": ERROR,
            "branches": len(muted),
            "residuals": len(flow.splits),
            "cause": "factor",
            "causes": "factor",
        },
        remedies=tuple(dict.fromkeys(leave_out(site) for site in sites))[:3],
    )


def constants(flow: Flow) -> dict[int, list[tuple[Site, float]]]:
    """The numbers that multiply a branch, and where, by the depth of its sum; only of branches that they mute."""
    found: dict[int, list[tuple[Site, float]]] = {}
    for depth, split in flow.splits.items():
        inside = [
            (s.site, times) for s in flow.ledgers.get(depth, ()) if s.branch and (times := _times(s.site))
        ]
        if math.prod(times for _, times in inside) < ERROR and not split.forward_ratio >= HEARD:
            found[depth] = [one for one in inside if one[1] < 1]
    return found


def _times(site: Site) -> float:
    """Size of the one number that a call multiplies by; 0: it does not."""
    numbers = site.numbers
    if site.operation not in FACTORS or len(numbers) != 1 or not numbers[0]:
        return 0.0
    return abs(numbers[0]) ** (-1 if "div" in site.operation else 1)
