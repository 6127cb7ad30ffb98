"""TR704 ordered-data: the batches come in blocks, and each block makes the network forget the one before.

What it means
    Within a block the loss falls far below where it started; where the next one begins it is back there at once, and
    no step did that. The network learns what the block has in common, one class for instance, and little else.

Why it happens
    Data that is sorted, by class, by file, by user or by length, and not shuffled; a buffer of a streaming loader that
    is smaller than the blocks; tasks that follow each other.

Evidence
    Jumps of the loss at once from below half of its first level to above all of it, each larger than the step
    before can explain: its length times the mean of the gradient norms at both its ends, by which a quadratic
    changes at most. A batch of both blocks may lie between. The two batches after them are as hard, and no fall is larger than
    the steps explain. Where batches are drawn at random that has the chance that any two losses are high: the binomial tail of
    all jumps so far is below one in 10,000.
    Jumps that are all as many steps apart may be those of targets that are renewed, and are told as TR705.

What helps
    Shuffle the data; a larger shuffle buffer; batches that mix the blocks.

References
    McCloskey and Cohen 1989, Catastrophic Interference in Connectionist Networks; Bottou 2009, Curiously Fast
    Convergence of some Stochastic Gradient Descent Algorithms (the order of the examples).
"""

from __future__ import annotations

import math

from isograd.diagnosis import Finding, Severity
from isograd.monitor.history import START, Detector, History
from isograd.monitor.jumps import regular, tail

CODE = "TR704"
NAME = "ordered-data"

CHANCE = 1e-4
"""Of a training that draws its batches at random to be told this in its whole length, within an order."""
LEAST = 3
"""Jumps: two are two hard batches."""
AFTER = 2
"""Batches behind a jump that are as hard, and of which the first may be of both blocks."""
LOW = 0.5
"""Share of the first level below which the loss must have fallen, so that there is something to forget."""


class Ordered(Detector):
    """Counts jumps that no step explains, and how many of them the next batch undid."""

    def __init__(self) -> None:
        super().__init__()
        self.jumps = self.lasting = 0
        self.low = self.high = 0
        """Losses below and above LOW since the first that was below."""
        self.pending = 0
        """Batches of a jump that are still to come."""
        self.lowest = math.inf
        self.chance = 1.0
        """That so many jumps last, if each batch were high with the share of all that were."""

    unexamined = "needs a positive loss (monitor.log(loss=…)) and update norms of successive steps"
    of_level = True

    def examine(self, history: History) -> Finding | None:
        losses, first = history.losses, history.first_loss
        self.lowest = min(self.lowest, losses[-1]) if losses else math.inf
        if len(history.first_losses) < START or len(losses) < 2 or not first > 0 or self.lowest < 0:
            return None
        self._count(history, losses[-1], first)
        if self.jumps < LEAST or not self.chance < CHANCE or regular(history):
            return None
        return Finding(
            CODE,
            NAME,
            Severity.WARNING,
            f"{self.jumps} times the loss went at once from below {LOW * first:.2g} to above {first:.2g}, where it "
            f"started, and in {self.lasting} of them the next batches were as hard",
            cause="the batches come in blocks: data that is sorted and not shuffled",
            evidence={
                "jumps": self.jumps,
                "lasting": self.lasting,
                "chance": self.chance,
                "threshold": CHANCE,
                "cause": "data-order",
            },
            remedies=("shuffle the data, or mix the blocks in each batch",),
        )

    def _count(self, history: History, loss: float, first: float) -> None:
        began = history.jump and history.jump[0] == history.count
        if began and history.jump[1] < LOW * first and self.low:
            self.pending = AFTER
        elif self.pending:
            self.pending -= 1
            if not self.pending and max(history.losses[-AFTER - 1 :]) >= first:
                self.jumps += 1
                stays = min(history.losses[-AFTER:]) >= LOW * first
                self.lasting += stays and bool(history.jump) and not history.jump[-1]
                high = self.high / max(self.low + self.high, 1)
                self.chance = tail(self.jumps, self.lasting, high**AFTER)
        if self.low:
            self.high += loss >= LOW * first
        self.low += loss < LOW * first

    def outcome(self, history: History) -> str | None:
        if not history.losses or math.isnan(history.typical_update):
            return None
        return f"{self.jumps} times the loss jumped back to its start and no step explains it"
