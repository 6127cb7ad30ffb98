"""VG105 rank-collapse: the tokens of a sequence become one, while norm and gradient keep their size.

What it means
    Behind a few blocks all tokens of a sample carry nearly the same vector. What tells one from the others is a
    small rest of it: the head cannot answer token by token, and queries and keys, whose gradient lives on
    differences between tokens, get none.

Why it happens
    Attention averages, and a stack of averages converges to rank one, doubly exponentially in depth. A skip
    connection of full strength keeps each token beside the average; without one, or with one that is damped, or
    beside branches that are far louder, normalisation restores the size of the average alone. The gain of every
    layer is then near 1, and nothing shows in decades.

Evidence
    At every site with tokens, the root mean square of what belongs to one token of one sample alone - without what
    its position has in common in all samples, and its sample in all tokens - over that of the whole. Told where
    the loss reads an answer for every token, the share at the head has fallen below half of that at the entrance,
    and it falls exponentially: it would have done so too at the pace of the second half of the sites. Shipped
    decoders start at a third, most of it taken by the first blocks, whose branches are louder than the embedding.
    An error only where the skips are missing or damped, which is read off the gradient that comes by them, or where
    most branches, and most of the later ones, are as loud as the stream they are added to, which is the same once a normalisation follows, or a single
    average is louder than its stream and less than a tenth of a token's own is left: with
    skips of full strength twelve and twenty-four blocks, pre- and post-norm, learn to tell their tokens apart again,
    at a small enough learning rate. An encoder whose tokens are pooled may let them become one at its end; told is where
    attentions without a skip around them are given tokens that have become one before, and an error from two of them on.

What helps
    Skip connections at full strength; residual branches scaled down; fewer blocks.

References
    Dong et al. 2021, Attention is not all you need: pure attention loses rank doubly exponentially with depth; Noci et
    al. 2022, Signal Propagation in Transformers: Theoretical Perspectives and the Role of Rank Collapse.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

from isograd.diagnosis import Finding, Severity
from isograd.flow import Flow
from isograd.statistics import Site
from isograd.symptoms import Healthy, Outcome, Unexamined
from isograd.symptoms.damped_skips import DAMPED

CODE = "VG105"
NAME = "rank-collapse"

ERROR = 0.6
"""Decoders of 3 and 6 layers whose skips are damped or missing start at 0.18 to 0.45 and lose 85% of their lead and more;
with whole skips the same decoders start above 0.7 (`python -m benchmarks.twins.thresholds skip`)."""
WARNING = 0.5
"""Where the skips are whole, healthy stacks of twelve blocks start at a tenth to a half. Not said of averages over the neighbours
of a graph: networks of 3 to 12 of them with whole skips, at 0.47 down to 0.13, label nodes as well as one of a single average."""
AVERAGED = 1 / 3
"""What is left of it in all behind attentions without whole skips: decoders of two and three blocks without any start at 0.22 to 0.34
and lose two fifths of their lead to all of it, of one block at 0.6 and lose a tenth. A third of it is less than what the pace of
the second half says where little is left to be averaged."""
LOUD = 0.9
"""rms of a branch over that of its stream, in the median of the skips that are whole. Post-norm decoders of 3 and 6 blocks stand
at 0.47 as they are; at 1 they lose two thirds of their lead and all of it, a token's own being 0.53 and 0.30 of what it was,
from 1.5 on nearly all (`python -m benchmarks.twins.thresholds loud`)."""
GONE = 0.1
"""What is left of it in all where an average is louder than the stream it is added to, the skips being whole: pre-norm decoders
of 2, 4 and 8 blocks whose values and outputs are drawn 3 to 60 times too large learn to copy a token at one rate of two at
least while a fifth is left, and at none or hardly below 0.07. The shipped models of the zoo start at a fifth and more."""

NONE = 0.07
"""The same where the first average took it all, and the others pass on what is left: attentions whose values have biases of 30
leave 0.04 and learn nothing."""

IDLE = 0.01
"""A token's own share at the input of an attention without a skip around it, where the loss reads no token by itself. Stacks of
1 to 6 blocks without skips, 0.02 and 0.5 of positions, are given 0.9 or 0.7, 0.2, 0.001 and, from the fourth on, rounding:
all is left of what three blocks learn of pictures in 150 steps but 1 to 4%, of what four learn 5 to 30% is lost, of six nearly
all; where the order of the parts is what has to be told, two at positions of 0.02 learn nothing. With skips 0.6 and more."""
AT_LEAST = 2
"""Such attentions, from which it is an error: one can learn by the tokens of the one before it."""

MIXING = ("attention", "product")
"""Kinds that average over tokens: attention, in one call or written out, and the product with an adjacency matrix."""
WORST = 3
"""Sites that are named."""


def examine(flow: Flow) -> Iterator[Outcome]:
    """The share of a token's own along the main backbone and along those of the model's other inputs."""
    lines = (flow, *flow.towers)
    found = [outcome for line in lines if (outcome := _along(line, flow)) is not None]
    found = found or [_told_idle(line, idle) for line in lines if (idle := _idle(line))]
    alone = any(len(site.shape) == 3 and min(site.shape[:2]) == 1 for site in flow.sites)
    if not found and alone:
        yield Unexamined("one sample, or one token, has nothing to be compared with")
    elif not found:
        yield Healthy("the loss reads no answer for each of several tokens")
    yield from found


def _idle(line: Flow) -> list[Site]:
    """Attentions on the backbone itself, so without a skip around them, that are given tokens which have become one."""
    found: list[Site] = []
    given = math.nan
    for site, share in zip(line.sites, line.column("distinct").tolist(), strict=True):
        chosen = any(step.site.kind == "softmax" for step in line.ledgers.get(site.depth, ()))
        if (site.kind == "attention" or (site.kind == "product" and chosen)) and given < IDLE:
            found.append(site)
        given = share if math.isfinite(share) else given
    return found


def _told_idle(line: Flow, idle: list[Site]) -> Finding:
    return Finding(
        CODE,
        NAME,
        Severity.ERROR if len(idle) >= AT_LEAST else Severity.WARNING,
        f"{len(idle)} attention{'' if len(idle) == 1 else 's'} average{'s' if len(idle) == 1 else ''} tokens that have become one "
        f"before: less than {IDLE:.0%} of the signal there is a token's own",
        cause="no skip connection keeps a token beside the average (not tested)",
        sites=tuple(site.place for site in idle[:WORST]),
        evidence={
            "idle": len(idle),
            "threshold": AT_LEAST,
            "distinct_threshold": IDLE,
            "layers": line.layers,
            "cause": "missing-residual",
        },
        remedies=("insert-residual",),
    )


@dataclass(frozen=True, slots=True)
class Own:
    """What belongs to one token alone, as a share of the signal."""

    entered: float
    """Where the tokens have come in, with their positions."""
    halfway: float
    left: float
    """At the input of the head."""
    falls: tuple[int, ...]
    """Sites, those that take most of it first."""
    bare: bool
    """Most of it is taken where tokens are averaged on the backbone itself: skips that there are lead around something else."""

    @property
    def ratio(self) -> float:
        """What is left of it, if it fell in the first half of the sites as it does in the second, where that is more.

        Along a healthy stream the first few averages take most, being louder than the embedding, and the rest little.
        """
        return max(self.left / self.entered, (self.left / self.halfway) ** 2)


def own(line: Flow) -> Own | None:
    """None: no tokens from the entrance to the answer, or a single one."""
    inside = [i for i, site in enumerate(line.sites) if site.kind != "loss"]
    tokens = [i for i in inside if len(line.sites[i].shape) == 3]
    if not tokens or tokens[-1] != inside[-1]:
        return None
    if line.sites[tokens[0]].shape[:2] != line.sites[tokens[-1]].shape[:2]:
        return None
    share, weighted = line.column("distinct"), line.column("weighted")
    head = max((i for i in inside if weighted[i] == 1), default=inside[-1])
    along = [i for i in tokens if i < head and share[i].isfinite() and share[i] > 0]
    if sum(i >= line.entrance for i in along) < 2:
        return None
    complete = [i for i in along if i >= line.entrance]
    falls = sorted(pairwise(complete), key=lambda step: float(share[step[1]] / share[step[0]]))
    entered, halfway, left = (float(share[i]) for i in (complete[0], along[len(along) // 2], along[-1]))
    mixing = [any(site.kind in MIXING for site in line.sites[a + 1 : b + 1]) for a, b in falls[:WORST]]
    return Own(entered, halfway, left, tuple(i for _, i in falls), sum(mixing) > WORST / 2)


def _skip(line: Flow, flow: Flow) -> float:
    """What the median skip lets by of the gradient; only those of the main backbone are measured. 0: there is none."""
    adds = any(site.kind == "residual add" for site in line.sites)
    splits = line.splits or (flow.splits if adds else {})
    return median(split.skip for split in splits.values()) if splits else 1.0 if adds else 0.0


def _along(line: Flow, flow: Flow) -> Outcome | None:
    """None: no tokens from the entrance to the answer."""
    found = own(line)
    if found is None:
        return None
    left, skip = found.left / found.entered, 0.0 if found.bare else _skip(line, flow)
    said = f"a token's own is {found.left:.2g} of the signal at the head, {found.entered:.2g} at the entrance"
    loud = _loud(line)
    loudest = _loudest(line)
    little = left < NONE or (left < GONE and found.ratio < WARNING)
    drowned = skip >= DAMPED and (loud > LOUD or (little and loudest > 1))
    averaged = skip < DAMPED and left < AVERAGED and (found.bare or bool(flow.attentions))
    # What the first averages take is no luck of the embedding's size then.
    ratio = left if drowned or averaged else found.ratio
    sick = ratio < ERROR and (skip < DAMPED or drowned)
    # Neighbours of a graph are averaged because they are alike; an attention chooses whom it averages.
    meant = skip >= DAMPED and not flow.attentions
    if not sick and (ratio >= WARNING or meant):
        return Healthy(f"{said} (an error below {ERROR:.0%} of it, where skips are damped)")
    return Finding(
        CODE,
        NAME,
        Severity.ERROR if sick else Severity.WARNING,
        f"{said}: all tokens of a sample become alike",
        cause=_cause(skip, loud, loudest if drowned and not loud > LOUD else 0.0),
        sites=tuple(line.sites[i].place for i in found.falls[:WORST]),
        evidence={
            "distinct": found.left,
            "distinct_at_entrance": found.entered,
            "ratio": ratio,
            "skip": skip,
            "branch": loud,
            "loudest_average": loudest,
            "threshold": GONE if sick and drowned and not loud > LOUD else ERROR if sick else WARNING,
            "layers": line.layers,
            "cause": "residual-branch-growth" if skip >= DAMPED else "missing-residual",
        },
        remedies=("scale-residual-branches",)
        if skip >= DAMPED
        else (*_around(line, found), "insert-residual"),
    )


def _around(line: Flow, found: Own) -> Iterator[str]:
    """Where a skip has to be written that leads around what averages."""
    lines = {line.sites[i].source: None for i in found.falls[:WORST] if found.bare and line.sites[i].source}
    yield from (f"{where}: x + average(x), a skip around what averages over the tokens" for where in lines)


def _loud(line: Flow) -> float:
    """rms of a branch over that of its stream, in the median: of all, and of the later half, where that is less. The first
    branches are louder than an embedding that starts small, and what they leave is the stream of the others."""
    ratios = [line.splits[depth].forward_ratio for depth in sorted(line.splits)]
    return min(median(ratios), median(ratios[len(ratios) // 2 :])) if ratios else math.nan


def _loudest(line: Flow) -> float:
    """rms of the branch that averages over tokens, over that of its stream, where that is most; 0: none does."""
    return max(
        (
            split.forward_ratio
            for depth, split in line.splits.items()
            if split.forward_ratio > 0
            and any(s.branch and s.site.kind in MIXING for s in line.ledgers.get(depth, ()))
        ),
        default=0.0,
    )


def _cause(skip: float, loud: float, loudest: float) -> str:
    if skip == 0:
        return "no skip connection keeps a token beside the average (not tested)"
    if skip < DAMPED:
        return f"the skip connections let {skip:.2g} of the signal by (not tested)"
    if loudest:
        return f"an average is {loudest:.2g} times as loud as what it is added to (not tested)"
    if math.isnan(loud):  # of another input's line, whose branches were not measured
        return ""
    return f"the branches are {loud:.2g} times as loud as what they are added to (median; not tested)"
