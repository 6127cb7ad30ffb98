"""The loss of a guarded training, and when it says that the weights are lost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

from isograd.monitor.baseline import Baseline
from isograd.monitor.history import START, WINDOW, push
from isograd.symptoms import diverging
from isograd.symptoms.loss_spike import RECENT, jumped


@dataclass
class Curve:
    """The loss, and whether the weights that it came from are lost."""

    losses: list[float] = field(default_factory=list[float])
    first: list[float] = field(default_factory=list[float])
    """The first START."""
    norms: list[float] = field(default_factory=list[float])
    """log10 of the gradient norm, beside each loss."""
    first_norm: float = math.nan

    def add(self, loss: float, norm: float) -> None:
        if len(self.first) < START:
            self.first.append(loss)
        push(self.losses, loss, 4 * WINDOW)
        if math.isfinite(norm) and norm > 0:  # else it says nothing of a size
            push(self.norms, math.log10(norm), 4 * WINDOW)
            if math.isnan(self.first_norm):
                self.first_norm = self.norms[0]

    @property
    def calm(self) -> bool:
        """Not on its way up: nothing that a snapshot should keep."""
        base = Baseline(self.losses, RECENT)
        return not base.enough or base.deviations < diverging.DEVIATIONS / 2

    def jumps(self, loss: float) -> bool:
        """Is this one loss as far out as five would have to be for a jump?"""
        if not self.first:
            return False
        base = Baseline([*self.losses, *[loss] * RECENT], RECENT)
        first = median(self.first)
        return jumped(base, first) if base.enough else loss >= diverging.RISE * abs(first)

    def lost(self, kept: Sequence[float]) -> str:
        """Why they are; '' if they are not: the rules of TR702 and TR703. `kept`: the losses up to the snapshot that would
        be gone back to. A loss that stood as high there already, as where a term's weight or a queue grows, is no loss of
        what it holds."""
        base, norms = Baseline(self.losses, RECENT), Baseline(self.norms, RECENT)
        # Weights that are thrown out of a minimum have larger gradients; a harder batch, a queue that grows need not.
        if base.enough and jumped(base, median(self.first)) and not norms.rise < diverging.NORM:
            return f"the loss jumped from {base.level:.3g} to {base.now:.3g}"
        if len(self.losses) < RECENT or min(self.losses) < 0 or self.first[0] <= 0:
            return ""
        now = median(self.losses[-RECENT:])
        start = max(self.first[0], median(kept[-RECENT:]) if kept else 0.0)
        if max(self.norms[-3:], default=math.inf) - self.first_norm < diverging.NORM:
            return ""
        if now >= diverging.RISE * start and now - start >= diverging.DEVIATIONS * base.noise:
            return f"the loss is at {now:.3g}, {now / self.first[0]:.2g} times where it started"
        return ""
