"""VG103 fading-gradient: during training, early layers get a vanishing share of the gradient.

What it means
    The first quarter of the layers receives a thousandth of the gradient norm and less. They barely learn, and
    what the later layers learn is built on features that stay as they were drawn.

Why it happens
    The product of the layers' Jacobians shrinks towards the input: saturating activations, weights that are
    too small or have decayed, units that died, an optimizer step that threw a network out of balance.

Evidence
    The gradient norm of each weight matrix, in the order of the model's parameters, median of 10 readings: the
    first quarter against the global norm. So that one large layer does not decide, either the second half of the
    layers must get far more than the first quarter, or the signal itself must fade on its way forward: then all
    hidden layers get equally little. Layers count that lie one behind the other: a critic beside an actor does not.
    The rms of what a layer is fed with is read off its gradients. Only ratios count; the scale of the loss falls out.
    An optimizer that divides the gradient by its size may move the early layers all the same: then it is told where
    the loss gains nothing in 64 readings, or loses it again. Weights that have shrunk to a third are the cause, or
    first steps that replaced them; where the gradient reached the first layers at the first step, the steps since. What
    happens between the layers, operation by operation, says `isograd check` on the model.

What helps
    The critical initialisation of the activation, ReLU or GELU for sigmoid, normalisation, residual connections.

References
    Hochreiter 1991; Glorot and Bengio 2010, Understanding the Difficulty of Training Deep Networks.
"""

from __future__ import annotations

import math
from statistics import median

from isograd.diagnosis import Finding, Severity
from isograd.monitor.history import WINDOW, Detector, History, early, late
from isograd.monitor.origin import Cause, replaced, shrunk

CODE = "VG103"
NAME = "fading-gradient"

LOST = -3.0
"""Decades below the global norm. The loss along depth from which plain SGD trains at no learning rate."""
SPREAD = -1.5
"""Decades between the early and the late layers, of gradient or of signal: less is one large layer, and no loss
along depth."""
LAYERS = 4
"""Matrices from which on one may speak of depth."""
READINGS = 10
"""A zero-initialised branch or head lets nothing through at the first step, and gradient at the next."""
MOVING = -3.7
"""log10 of the relative change a step: layers that move so fast do learn, if the loss falls (see UP507)."""
ALONE = 32
"""Readings in which the head learns what it can without the layers below it, such as how frequent the classes are."""
GAINED = 0.1
"""Share of the loss that is gained after that."""
KEPT = 0.75
"""Share of what was gained."""


class Fading(Detector):
    """Compares the gradient of the early layers with that of all."""

    def __init__(self) -> None:
        super().__init__()
        self.share = self.moved = math.nan
        self.level = math.nan
        """The loss after ALONE readings."""

    unexamined = f"needs {LAYERS} weight matrices and {READINGS} steps"

    def examine(self, history: History) -> Finding | None:
        if history.count == ALONE and history.losses:
            self.level = median(history.losses[-ALONE // 2 :])
        if min(len(history.early_grads), len(history.norms)) < READINGS or len(history.chain) < LAYERS:
            return None
        first = median(history.early_grads[-READINGS:])
        self.share = first - median(history.norms[-READINGS:])
        between = first - median(history.late_grads[-READINGS:])
        if not (math.isfinite(self.share) and self.share <= LOST):
            return None
        if self._learns(history):
            return None
        rows = [history.along(row) for row in history.scales[-READINGS:]]
        signal = median(late(row) - early(row) for row in rows)
        if between > SPREAD and not signal <= SPREAD:
            return None
        cause = shrunk(history) or replaced(history) or _trained(history)
        return Finding(
            CODE,
            NAME,
            Severity.ERROR,
            f"the first layers get 10^{self.share:.1f} of the gradient norm, "
            f"10^{between:.1f} of what the later layers get",
            cause="the gradient shrinks on its way to the input; which operation costs what says `isograd check`"
            if cause is None
            else cause.words,
            sites=tuple(history.names[i] for i in history.chain[: max(1, len(history.chain) // 4)][:3]),
            evidence={
                "decades": self.share,
                "threshold": LOST,
                "early_over_late": between,
                "signal": signal,
                "readings": READINGS,
            },
            remedies=(
                "critical-initialisation",
                "exchange-activation",
                "insert-normalisation",
                "insert-residual",
            )
            if cause is None
            else cause.remedies,
        )

    def _learns(self, history: History) -> bool:
        """Do the early layers move, and does the loss not deny that they learn?"""
        moved = history.early_updates
        self.moved = median(moved) if moved else math.nan
        if not self.moved >= MOVING:
            return False
        if history.count < WINDOW:
            return True
        gained = 1 - history.best / self.level if self.level > 0 else math.nan
        return bool(history.losses) and not (gained < GAINED or history.kept < KEPT)

    def outcome(self, history: History) -> str | None:
        if math.isnan(self.share):
            return None
        moved = f", and change by {10**self.moved:.1g} of themselves a step" if self.share <= LOST else ""
        return f"the first layers get 10^{self.share:.1f} of the gradient norm (an error from 10^{LOST:.0f}){moved}"


def _trained(history: History) -> Cause | None:
    """Did the gradient reach the first layers at the first step? Then the steps since have done it."""
    first = history.first
    grads = [e - w for e, w in zip(first.get("elasticity", []), first.get("weight", []), strict=True)]
    share = early(history.along(grads)) - first.get("norm", [math.nan])[0]
    if not share > LOST / 2:
        return None
    words = f"at the first step they got 10^{share:.1f} of it: the initialisation let it through, and the steps since have changed that"
    return Cause(
        words, "training", ("lower-learning-rate", "warm-up", "insert-normalisation", "insert-residual")
    )
