"""NF405 non-finite-step: during training, a gradient or the loss became NaN or Inf.

What it means
    An optimizer that takes this step writes NaN into the weights, and clipping writes it into all of them.

Why it happens
    A gradient or signal that exploded, a value that overflowed its number format, data that is not finite, an
    operation whose derivative is infinite. A loss that is not finite, of gradients that are: the log of 0, 0/0 or a mean
    over nothing in a term that passes no gradient on, or a target whose logit is masked.

Evidence
    NaN and Inf elements of each parameter's gradient, counted before anything clips them, and the loss. On a GPU they are
    told by the norm, and not counted; where only the squares in it overflow, a step that is read in full says so. A step that
    a loss scaler skipped for an overflow is routine and counts only when 10 follow each other. What the run did
    before says whether it exploded or broke at once, or that a network which it is trained against, and that is watched too, had
    broken first; the operation that made the first one, with its source
    line, names `isograd.find_nonfinite(model, loss)`, or a monitor that keeps the batch of each step (`replay=True`).

What helps
    Skip the step; a check of the batch; what the cause names.

References
    Micikevicius et al. 2018, Mixed Precision Training; PyTorch issue 143658 (what anomaly detection does not tell).
"""

from __future__ import annotations

import math
from statistics import median

from torch import Tensor

from isograd.diagnosis import Finding, Severity
from isograd.monitor.history import LEAP, START, Detector, History
from isograd.monitor.origin import origin
from isograd.monitor.reading import Reading
from isograd.record.row import ELSEWHERE

CODE = "NF405"
NAME = "non-finite-step"

OVERFLOWS = 10
"""Skipped steps in a row: a loss scaler halves its scale each time, ten are three decades."""
FIND = (
    "name the operation: isograd.find_nonfinite(model, loss), with the batch of this step, or the next time "
    "watch(…, replay=True), isograd watch --replay"
)
OTHER = (
    f"{ELSEWHERE}: it came from there, by the loss that runs through both",
    "other-network",
    ("look at what was found of the other network, and at its loss",),
)
"""Cause, slug and what helps, where another network that is watched broke first."""
HALF = (
    "keep the weights in float32, and compute in half precision under torch.autocast; or give Adam eps=1e-4"
)
DATA = "check the data of this step for values that are not finite"
SUDDEN = {
    True: (
        "the loss itself is not finite. Look at the batch, and in model and loss at the log of 0, a division by 0, an exp that "
        "overflows, a mean over nothing",
        (DATA, "safe-loss", FIND),
    ),
    False: (
        "the loss is finite, and something on the way back is not. Look at operations whose derivative is infinite, as that of a "
        "root, a norm or a power at 0, also where a mask or torch.where takes their result out; in half precision it may overflow",
        ("safe-derivative", FIND),
    ),
    None: (
        "look at the batch, and at operations whose derivative is infinite",
        ("safe-derivative", DATA, FIND),
    ),
}
"""By whether the loss was not finite, None where it is not known: words, and what helps."""
BESIDE = (
    "the loss of process 0 is finite, those of the other processes are not seen. Look at their batches, and at operations whose "
    "derivative is infinite",
    (
        DATA,
        "safe-derivative",
        "name the operation: the next time watch(…, replay=True), isograd watch --replay",
    ),
)
EXPLODED = 1.0
"""Decades by which gradient or loss had risen before, and above all that they had been: then it exploded. Near its end
a training that is well has losses ten times as large as others."""
SQUARED = math.log10(3.4e38) / 2
"""Decades from which on a training is not well, whatever the scale of its loss: squares, as of a norm, overflow in float32."""
BEFORE = 24
"""Readings that an explosion may take."""


class NonFinite(Detector):
    """Told of the readings that no other detector may see."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = 0

    def broken(self, reading: Reading, counts: Tensor, history: History) -> Finding | None:
        """What a reading says that is not finite; `counts`: elements that are not, of shape (site,)."""
        loss = reading.scalars.get("loss", 0.0)
        skipped = any(note.startswith("overflow") for note in reading.notes) and math.isfinite(loss)
        if not self.holds(True, OVERFLOWS if skipped else 1):
            return None
        self.steps += 1
        sick = [name for name, count in zip(reading.sites, counts.tolist(), strict=True) if count]
        verb = "is"
        what = f"the gradient of {len(sick)} of {len(reading.sites)} parameters" if sick else "the loss"
        # On a GPU elements are not counted: a norm may be infinite because its squares overflow.
        if sick and not (reading.columns.get("nonfinite", counts) > 0).any():
            what = f"the gradient norm of {len(sick)} of {len(reading.sites)} parameters"
        if sick and not math.isfinite(loss):
            what, verb = f"the loss and {what}", "are"
        words, slug, remedies = (
            OTHER
            if ELSEWHERE in reading.notes
            else self._cause(
                history,
                alone=not sick and "grad_norm" in reading.columns,
                forward=not math.isfinite(loss) if "loss" in reading.scalars else None,
            )
        )
        return Finding(
            CODE,
            NAME,
            Severity.ERROR,
            f"{what} {verb} not finite" + (f" ({int(counts.sum())} elements)" if sick else ""),
            cause=words,
            sites=tuple(sick[:3]),
            evidence={"elements": int(counts.sum()), "parameters": len(sick)}
            | ({} if math.isnan(loss) else {"loss": loss})
            | {"cause": slug},
            remedies=remedies,
        )

    def _cause(
        self, history: History, *, alone: bool, forward: bool | None
    ) -> tuple[str, str, tuple[str, ...]]:
        """`alone`: the loss is not finite, its gradient is. `forward`: the loss is not finite; None: not known."""
        losses = [math.log10(loss) if loss > 0 else -math.inf for loss in history.losses]
        if history.spoilt and history.spoilt[0] == history.step:
            words = (
                f"the step before has left values that are not finite in {history.spoilt[1]}, from a gradient that was finite: the "
                "optimizer's own arithmetic, as in float16, where Adam's epsilon of 1e-8 is 0 and a square soon overflows"
            )
            return words, "step", (HALF,)
        large = history.typical_update >= LEAP and history.step - history.measured[-1] < START
        if _risen(losses) or (_risen(history.norms) and not _fallen(history.losses)) or large:
            cause = origin(history)
            return f"the training exploded before: {cause.words}", cause.slug, cause.remedies
        highest = max([*losses[-3:], *history.norms[-3:]], default=-math.inf)
        if highest >= SQUARED and not alone:
            return (
                f"loss or gradient stood at 10^{highest:.0f} in the steps before, whose square no float32 holds: what explodes "
                "does so within one step, in the model, in its loss or in a loop that it runs",
                "from-the-start",
                ("critical-initialisation", "standardise-input", FIND),
            )
        if alone:
            return (
                "the loss alone: all gradients are finite. A term of it is the log of 0, 0/0 or a mean over nothing, as "
                "of a target whose logit is masked, or of values that are detached",
                "loss",
                ("print the terms of the loss one by one, and its targets", FIND),
            )
        if not history.count:
            return (
                "no step before it was finite: look at the initial weights, the inputs and the loss",
                "from-the-start",
                ("critical-initialisation", "standardise-input", FIND),
            )
        words, remedies = BESIDE if history.processes and forward is False else SUDDEN[forward]
        return f"it came at once, from a training that was well: {words}", "sudden", remedies

    def examine(self, history: History) -> Finding | None:
        self.held = 0  # a finite reading
        return None

    def outcome(self, history: History) -> str | None:
        if history.count < 2:
            return "the gradients of the one step were finite" if history.count else None
        return f"the gradients of {history.count} steps were finite"


def _fallen(losses: list[float]) -> bool:
    """Are the last three below what came before? As a loss leaves its start, its gradient grows."""
    return len(losses) > BEFORE and median(losses[-3:]) < median(losses[:-BEFORE])


def _risen(logs: list[float]) -> bool:
    """Is one of the last three far above what came before?"""
    before = logs[:-BEFORE] or logs[:1]
    now = max(logs[-3:], default=-math.inf)
    return now > max(before, default=now) and now - median(before) >= EXPLODED
