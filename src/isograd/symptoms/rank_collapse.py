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
    the loss reads an answer for every token and the share at the head has fallen below half of that at the
    entrance. An encoder whose tokens are pooled may let them become one.

What helps
    Skip connections at full strength; residual branches scaled down; fewer blocks.

References
    Dong et al. 2021, Attention is not all you need: pure attention loses rank doubly exponentially with depth; Noci et
    al. 2022, Signal Propagation in Transformers: Theoretical Perspectives and the Role of Rank Collapse.
"""

from __future__ import annotations

from collections.abc import Iterator

from isograd.diagnosis import Finding, Severity
from isograd.flow import Flow
from isograd.symptoms import Healthy, Outcome, Unexamined

CODE = "VG105"
NAME = "rank-collapse"

ERROR = 0.4
"""CALIBRATION"""
WARNING = 0.5
"""CALIBRATION"""


def examine(flow: Flow) -> Iterator[Outcome]:
    """The share of a token's own along the main backbone and along those of the model's other inputs."""
    found = [outcome for line in (flow, *flow.towers) if (outcome := _along(line)) is not None]
    if not found:
        yield Healthy("the loss reads no answer for each of several tokens")
    yield from found


def _along(line: Flow) -> Outcome | None:
    """None: no tokens from the entrance to the answer."""
    inside = [i for i, site in enumerate(line.sites) if site.kind != "loss"]
    share = line.column("distinct")
    seen = [i for i in inside if len(line.sites[i].shape) == 3]
    if not inside or not seen or seen[-1] != inside[-1]:
        return None
    first, answer = line.sites[seen[0]], line.sites[seen[-1]]
    if first.shape[:2] != answer.shape[:2]:
        return None
    weighted = line.column("weighted")
    head = max((i for i in inside if weighted[i] == 1), default=inside[-1])
    along = [i for i in seen if i < head and share[i].isfinite() and share[i] > 0]
    if len(along) < 2:
        alone = min(first.shape[:2]) < 2
        return Unexamined("one sample, or one token, has nothing to be compared with") if alone else None
    entered, left = float(share[along[0]]), float(share[along[-1]])
    ratio = left / entered
    said = f"a token's own is {left:.2g} of the signal at the head, {entered:.2g} at the entrance"
    if ratio >= WARNING:
        return Healthy(f"{said} (an error below {ERROR:.0%} of it)")
    falls = sorted((float(share[b] / share[a]), b) for a, b in zip(along, along[1:], strict=False))
    skips = bool(line.splits)
    return Finding(
        CODE,
        NAME,
        Severity.ERROR if ratio < ERROR else Severity.WARNING,
        f"{said}: all tokens of a sample become alike",
        cause="the skips are weak beside their branches" if skips else "no skip connection keeps a token beside the average",
        sites=tuple(line.sites[i].place for _, i in falls[:3]),
        evidence={
            "distinct": left,
            "distinct_at_entrance": entered,
            "ratio": ratio,
            "threshold": ERROR if ratio < ERROR else WARNING,
            "layers": line.layers,
            "cause": "residual-branch-growth" if skips else "missing-residual",
        },
        remedies=("scale-residual-branches", "insert-residual") if skips else ("insert-residual",),
    )
