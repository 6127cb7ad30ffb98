"""SA304 saturated-attention: attention picks one position, and its softmax passes no gradient to queries and keys.

What it means
    Nearly all of the weight of each query lies on one key, which was chosen by the draw of the weights. The
    derivative of the softmax, p (1 - p), is then near zero for every position: queries and keys learn as slowly as
    behind a saturated sigmoid, and the choice stays what it was.

Why it happens
    Queries and keys drawn too large: the logits grow with the square of their weights. Logits without the factor
    1/sqrt(head dimension), or multiplied by what was to divide them. A table of relative positions that is drawn far
    larger than what it is added to. Queries and keys that saturate the tanh they are added in. Weights that have grown in a long
    training.

Evidence
    In every attention, mean of 1 - sum(p^2) over samples, heads and queries, over that of even attention under the
    same mask. Heads that pick a position are healthy where training made them so; an error is told only where the
    lower median of the model leaves almost nothing open. Additive attention adds queries and keys inside of a tanh,
    whose mean slope is measured as well: below a tenth of its largest nothing comes back, however even the softmax is.

What helps
    Normalised queries and keys; smaller weights, or the factor that was forgotten; positions drawn near zero.

References
    Zhai et al. 2023, Stabilizing Transformer Training by Preventing Attention Entropy Collapse; Henry et al. 2020,
    Query-Key Normalization for Transformers; Bahdanau et al. 2015, Neural Machine Translation by Jointly Learning to Align
    and Translate.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from statistics import median
from typing import Any

from isograd.diagnosis import Finding, Severity
from isograd.flow import Flow
from isograd.statistics import Attention, Site
from isograd.symptoms import Healthy, Outcome

CODE = "SA304"
NAME = "saturated-attention"

ERROR = 0.25
"""A decoder whose queries and keys alone are drawn larger loses a quarter of its lead at 0.27 and half at 0.07
(`python -m benchmarks.twins.thresholds attention`); shipped models start above 0.9, and the small decoders of the twins
that were trained until they knew their text by heart still had 0.45."""

FLAT = 0.1
"""Mean slope of the tanh of additive attention, over its largest: at 0.15 it loses a twentieth of what it learns in 500 steps
of Adam, at 0.09 a fifth, at 0.03 more than a half. As drawn by torch it stands at 0.8."""

DROWNED = 3.0
"""rms of what is added to the logits over that of queries times keys: Swin's tables start at a tenth of it, and one drawn
from N(0, 30) at 90 times as much."""
LOUD_NORM = 3.0
"""What normalisations multiply by, in the median: they start at 1, and trained networks have between 0.3 and 3."""


def examine(flow: Flow) -> Iterator[Outcome]:
    """How far the attentions leave several positions open."""
    seen = sorted((a for a in flow.attentions if a.spread >= 0), key=lambda a: a.spread)
    if not seen:
        yield Healthy("nothing attends")
        return
    half = (len(seen) - 1) // 2  # of two attentions one is enough: the other is given what it has picked
    middle, through = seen[half].spread, sorted(a.through for a in seen)[half]
    if through < FLAT:
        yield _flat(seen, through)
        return
    if middle >= ERROR:
        yield Healthy(
            f"the median of {len(seen)} attentions leaves {middle:.0%} open of what even attention does"
        )
        return
    yield Finding(
        CODE,
        NAME,
        Severity.ERROR,
        f"the median of {len(seen)} attentions leaves {middle:.1%} open of what even attention does; "
        f"{seen[0].site.name} {seen[0].spread:.1%}",
        sites=tuple(a.site.place for a in seen[:3]),
        **_why(
            flow,
            seen[: half + 1],
            {
                "spread": middle,
                "smallest": seen[0].spread,
                "threshold": ERROR,
                "attentions": len(seen),
            },
        ),
    )


def multiplied(flow: Flow) -> dict[Site, float]:
    """Where constants make the logits of attentions that have picked larger than queries times keys, and how many times."""
    found = (a.logits for a in flow.attentions if 0 <= a.spread < ERROR)
    return {logits.scaled: logits.times for logits in found if logits and logits.scaled and logits.times > 1}


def divided(site: Site) -> str:
    """What to write there."""
    return f"{site.source or site.name}: multiply by 1/sqrt(head dimension)"


def _why(flow: Flow, shut: list[Attention], evidence: dict[str, float | int | str]) -> dict[str, Any]:
    """What makes the logits of these too large, and what helps: what most of them have in common."""
    made = [a.logits for a in shut if a.logits is not None]
    scaled = [one.scaled for one in made if one.scaled is not None and one.times > 1]
    added = [one.added for one in made if one.added is not None and one.louder > DROWNED]
    if 2 * len(added) > len(shut):
        louder, where = max(one.louder for one in made), added[0].source or added[0].name
        return {
            "cause": f"what is added to them at {where} is {louder:.2g} times as loud as queries times keys",
            "evidence": {**evidence, "louder": louder, "louder_threshold": DROWNED, "cause": "embedding"},
            "remedies": ("scale-embeddings",),
        }
    if 2 * len(scaled) > len(shut):
        times, where = max(one.times for one in made), scaled[0].source or scaled[0].name
        return {
            "cause": f"queries times keys are multiplied by {times:.3g} at {where}, where 1/sqrt(head dimension) belongs",
            "evidence": {**evidence, "times": times, "cause": "factor"},
            "remedies": (divided(scaled[0]),),
        }
    gains = [n.gain for n in flow.normalisations if not math.isnan(n.gain)]
    if gains and median(gains) > LOUD_NORM:
        return {
            "cause": f"normalisations multiply by {median(gains):.2g} (median), and make queries and keys as many times too large",
            "evidence": {
                **evidence,
                "gain": median(gains),
                "gain_threshold": LOUD_NORM,
                "cause": "norm-gain",
            },
            "remedies": ("reset-norm-gain",),
        }
    return {
        "cause": "queries and keys are too large for the softmax",
        "evidence": {**evidence, "cause": "attention-logits"},
        "remedies": ("query-key-norm", "critical-initialisation"),
    }


def _flat(seen: list[Attention], through: float) -> Finding:
    """Additive attention whose tanh is flat: nothing comes back to queries and keys, however even the softmax is."""
    worst = sorted(seen, key=lambda a: a.through)
    return Finding(
        CODE,
        NAME,
        Severity.ERROR,
        f"the functions that queries and keys are added in keep {through:.1%} of their slope in the median of {len(seen)} "
        "attentions: their softmax is open, and next to nothing reaches queries and keys",
        cause="queries and keys are too large for the function that they are added in",
        sites=tuple(a.site.place for a in worst[:3]),
        evidence={
            "slope": through,
            "threshold": FLAT,
            "attentions": len(seen),
            "cause": "attention-logits",
        },
        remedies=("rescale-weights", "critical-initialisation"),
    )
