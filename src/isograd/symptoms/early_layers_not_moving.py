"""UP505 early-layers-not-moving: the first layers stay where they were drawn, while later ones move.

What it means
    Measured by their own size, the first weight matrices change by less than three parts in a million a step:
    30,000 steps would change them by a tenth. Later layers move a hundred times as fast. Or the first matrix does not
    move at all: the optimizer holds it, and no gradient reaches it.

Why it happens
    A gradient that vanishes along depth under SGD, or a learning rate for these layers that is close to zero. Without any
    gradient: a detach(), torch.no_grad(), argmax, or a way through NumPy between these layers and the loss. An optimizer that
    was made before a layer was exchanged.

Evidence
    Update norm over weight norm of each matrix, median of 16 readings: the first quarter of the layers against
    the second half. Layers that are frozen, or move by exactly zero, do not count; that some get a gradient and were never
    moved in 200 steps, as at a learning rate of zero, is a note. No gradient at all: in 32 readings, for
    the first matrix of the model, while others get one; the same farther back may be a head that is not used, and is only
    said to be unexamined. Or for one that the optimizer holds and no module of the model.

What helps
    What lets the gradient through (see VG103), or an optimizer that divides by its size: AdamW.

References
    Glorot and Bengio 2010; You et al. 2017, Large Batch Training of Convolutional Networks (layer-wise ratios).
"""

from __future__ import annotations

import math
from statistics import median

from isograd.diagnosis import Finding, Severity
from isograd.monitor.history import RECENT, Detector, History
from isograd.monitor.names import STRAY

CODE = "UP505"
NAME = "early-layers-not-moving"

STILL = -5.5
"""log10 of the relative change a step: 3e-6, a tenth in 30,000 steps even if all went the same way."""
BEHIND = -2.0
"""Decades: within a factor of a hundred healthy layers lie (a spread of 38 was measured in one model)."""
LAYERS = 4
NEVER = 32
"""Readings without any gradient: parts that take turns have had theirs."""
WAYS = (
    "look for detach(), torch.no_grad(), argmax or NumPy between these layers and the loss",
    "if they are to stay as they are: requires_grad_(False), and leave them out of the optimizer",
)
RATES = (
    "look at the learning rate of each of optimizer.param_groups",
    "if they are to stay as they are: requires_grad_(False), which saves their backward",
)
AFTERWARDS = ("make the optimizer after the last change of the model's layers",)
STEPS = 200
"""Readings before layers are said to be left at rest: a schedule may begin with some of them."""


class NotMoving(Detector):
    """Compares how fast the early and the late layers move, relative to their weights."""

    def __init__(self) -> None:
        super().__init__()
        self.early = self.late = math.nan
        self.looked = False
        """It was asked whether some layers alone have never moved."""

    unexamined = f"needs update norms of {LAYERS} weight matrices over {RECENT} steps"

    def examine(self, history: History) -> Finding | None:
        if cut := _cut_off(history):
            return self._never(history, cut)
        if not self.looked and history.count >= STEPS and history.updates:
            self.looked = True
            if held := _held(history):
                return self._at_rest(history, held)
        if len(history.early_updates) < RECENT or len(history.chain) < LAYERS:
            return None
        self.early, self.late = median(history.early_updates), median(history.late_updates)
        if not (math.isfinite(self.early) and self.early <= STILL and self.early - self.late <= BEHIND):
            return None
        return Finding(
            CODE,
            NAME,
            Severity.WARNING,
            f"the first layers change by {10**self.early:.1g} of themselves a step, the later ones by {10**self.late:.1g}",
            cause="their gradient is too small for this optimizer and learning rate",
            sites=tuple(history.names[i] for i in history.chain[: max(1, len(history.chain) // 4)][:3]),
            evidence={
                "early": 10**self.early,
                "threshold": 10**STILL,
                "late": 10**self.late,
                "ratio": 10 ** (self.early - self.late),
            },
            remedies=("insert-residual", "insert-normalisation", "critical-initialisation"),
        )

    def _at_rest(self, history: History, held: list[str]) -> Finding:
        more = f" and {len(held) - 1} more" if len(held) > 1 else ""
        return Finding(
            CODE,
            NAME,
            Severity.INFO,
            f"{held[0]}{more} of {len(history.names)} weight matrices get a gradient, and have not moved in {history.count} steps",
            cause="the learning rate of their parameter group is zero, or their number format rounds the steps away",
            sites=tuple(held[:3]),
            evidence={
                "matrices": len(held),
                "of": len(history.names),
                "steps": history.count,
                "threshold": STEPS,
            },
            remedies=RATES,
        )

    def _never(self, history: History, cut: list[str]) -> Finding:
        more = f" and {len(cut) - 1} more" if len(cut) > 1 else ""
        stale = cut[0].startswith(STRAY)
        return Finding(
            CODE,
            NAME,
            Severity.WARNING,
            f"{len(cut) if stale else f'{cut[0]}{more}'} of {len(history.names)} weight matrices have never got a gradient, and the "
            f"optimizer holds them{', but no module of the model' if stale else ''}",
            cause="they are those of a layer that was exchanged after the optimizer was made, or of a copy: what stands in the model "
            "now, this optimizer does not train"
            if stale
            else "they are cut off from the loss, while other layers learn",
            sites=tuple(cut[:3]),
            evidence={
                "matrices": len(cut),
                "of": len(history.names),
                "steps": history.count,
                "threshold": NEVER,
            },
            remedies=AFTERWARDS if stale else WAYS,
        )

    def outcome(self, history: History) -> str | None:
        if math.isnan(self.early):
            return None
        return f"the first layers change by {10**self.early:.1g} of themselves a step, the later by {10**self.late:.1g}"


def _cut_off(history: History) -> list[str]:
    """Matrices to be trained that have never got a gradient, where the first is among them, or one that is in no module of the
    model, and others have."""
    seen = history.now
    if seen is None or history.count < NEVER or not 0 < int(seen.idle.sum()) < len(seen.names):
        return []
    never = {*history.unreached}
    cut = [
        name for name, waits in zip(seen.names, seen.idle.tolist(), strict=True) if waits and name in never
    ]
    if len(never) == len(seen.sites):
        return []
    stale = [name for name in cut if name.startswith(STRAY)]
    return stale or (cut if cut[:1] == list(seen.names[:1]) else [])


def _held(history: History) -> list[str]:
    """Matrices that get a gradient and were never moved by any step that was measured, where others were."""
    moved = list(zip(*history.updates, strict=True))
    held = [
        name
        for name, updates, grad in zip(history.names, moved, history.grads[-1], strict=True)
        if max(updates) == -math.inf < grad
    ]
    return held if len(held) < len(history.names) else []
