"""The short memory that all detectors share, and the form of a detector."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from statistics import median
from typing import Any

from isograd.diagnosis import Finding
from isograd.monitor import jumps
from isograd.monitor.baseline import WINDOW
from isograd.monitor.seen import Seen, finite
from isograd.record.row import RIVALS

RECENT = 16
"""Readings whose median stands for now where a single batch must not decide."""
START = 5
"""Readings whose median is the level that the training started from."""
LEAP = -0.7
"""log10 update over weight: a fifth of the weights in one step. Healthy recipes stay near 1e-3, the boldest reach 0.1."""
ZERO = -0.01
"""log10 update over weight, of the first step: all that a matrix has then is its update."""
MOMENTUM = 1.0
"""Decades: of 0.9, it adds up to ten gradients."""
FAINT = 1e-3
"""Share of the highest learning rate: a thousand such steps are one."""
WRITTEN = 0.3
"""Decades by which the norm of a weight changes between two readings: half or double, which healthy steps never do."""
SURELY = 3.0
"""Times the most that the steps in between can have changed it by: their lengths are read, and rounded."""
AGAIN = 64
"""Readings of quiet after which the same is told again: an episode is told once."""
MOST = 20
"""Times that one thing is told in a run."""


class History:
    """The last readings and the first, all plain numbers; only finite readings come in here.

    Norms are log10. A baseline leaves out what is recent, so that what rises does not raise it.
    """

    def __init__(self) -> None:
        self.count = 0
        """Finite readings so far."""
        self.step = -1
        self.sites: list[str] = []
        self.unreached: list[str] = []
        """Parameters that have had no gradient in any reading."""
        self.joined: list[Any] = []
        """Step at which parameters last got their first gradient, other than the first step; how many, and the first."""
        self.names: list[str] = []
        self.chain: Sequence[int] = ()
        """Places among them of those that lie one behind the other."""
        self.losses: list[float] = []
        """The last 4 x WINDOW."""
        self.norms: list[float] = []
        """Global gradient norm, the last 4 x WINDOW that were not zero: without a gradient, as where a policy has solved
        its task or a hinge is met, there is no size to be compared."""
        self.grads: list[list[float]] = []
        """By matrix, the last 2 x WINDOW."""
        self.updates: list[list[float]] = []
        """Update over weight by matrix, the last RECENT that were measured: few steps may be."""
        self.weights: list[list[float]] = []
        """By matrix, the last WINDOW + 1 that were measured, and"""
        self.weighed: list[int] = []
        """the steps they are of."""
        self.early_grads: list[float] = []
        """Median over the first quarter of the matrices of the chain, the last RECENT; the others likewise."""
        self.late_grads: list[float] = []
        """Median over their second half."""
        self.early_updates: list[float] = []
        self.late_updates: list[float] = []
        self.typical_updates: list[float] = []
        """Update over weight of the median matrix, the last RECENT that were measured, and"""
        self.measured: list[int] = []
        """the steps they are of."""
        self.passed: list[float] = []
        """log10 of what the optimizer was left of the gradient norm, the last RECENT that were measured."""
        self.rates: list[list[float]] = []
        """The learning rates of the optimizers, the last WINDOW + 1; and"""
        self.highest: list[float] = []
        """the highest that each had before those."""
        self.scales: list[list[float]] = []
        """Scale of the layers' inputs, the last WINDOW + 1."""
        self.last: list[float] = []
        """Loss, log10 of the gradient norm and log10 of the length of the step, of the newest reading."""
        self.length: list[float] = []
        """The step, log10 of its length and of the gradient norm, and the learning rate where the length was last measured."""
        self.jump: list[float] = []
        """Count of readings, loss before and after, and the most that the step can explain, where the loss last rose
        by more than that, and far: other data came; 1, where it then fell back in the same way: it was one batch.
        Forgotten once the loss is back where it was: then that batch did no harm."""
        self.leap: list[float] = []
        """Count of readings, log10 of the gradient norm before and after, the step, and the loss before and after, where the
        norm last rose so far that the step does not explain it."""
        self.sudden: list[list[float]] = []
        """The last jumps and leaps that stood out and lasted longer than a batch: the step, 0 for the loss and 1 for the norm, and
        its values before and after; and"""
        self.period: list[float] = []
        """how many steps lie between them, the step of the last, how many were so, and the chance that this is chance;
        empty: they come as they come."""
        self.written: list[Any] = []
        """Count of readings, name, norm before and after, and the most by which the steps in between can have changed it, of
        the weight that last changed by more: something else than the optimizer wrote to it."""
        self.spoilt: list[Any] = []
        """The last step that has left values which are not finite in a weight, from a gradient that was, and its name."""
        self.between: list[float] = []
        """Gradient norm of the reading that the weights were last measured in, and the largest since."""
        self.first_losses: list[float] = []
        """The first START."""
        self.first: dict[str, list[float]] = {}
        """elasticity, update, scale, weight by matrix, and the norm, of the first reading."""
        self.best = math.inf
        """Smallest median of RECENT losses."""
        self.rivals = False
        """The loss runs through weights that another optimizer trains, or another loss through these."""
        self.processes = False
        """Several processes train together, and the loss is that of one."""
        self.uncleared = 0
        """Readings that began with the gradients of the step before."""
        self.pace = -math.inf
        """Largest typical update: how fast the training once went."""
        self.leaps = 0
        """Readings among the first WINDOW in which a step changed the typical matrix by LEAP; those drawn as zeros apart."""
        self.fastest = 0.0
        """Highest learning rate so far."""
        self.faint = 0
        """Readings in a row until now whose learning rate was below FAINT of the highest."""
        self.moving = 0
        """Readings at full pace, whose update or learning rate was at least a third of the largest so far: annealing does
        not count. Of an update that was not measured, the last one is taken."""
        self.now: Seen | None = None

    def add(self, seen: Seen) -> None:
        names = list(seen.names)
        if names != self.names:  # parameters came or went: what was known by matrix is void
            self.names = names
            self.grads, self.updates, self.weights, self.scales = [], [], [], []
            self.weighed = []
            self.early_grads, self.late_grads, self.early_updates, self.late_updates = [], [], [], []
        self.chain = seen.chain
        if seen.missing != len(self.unreached) or len(seen.sites) != len(self.sites):
            self._reach(seen)
        # Across a step that was not read, nothing is known.
        follows = self.last and seen.step == self.step + 1
        self.count, self.step, self.now = self.count + 1, seen.step, seen
        self.uncleared += seen.uncleared
        if follows:
            jumps.compare(self, seen, start=self.first_loss)
        self._follow(seen)
        jumps.leapt(self, seen)
        self.last = [seen.loss, seen.grad_norm, self._length(seen)]
        if not self.first:
            self.first = {
                "elasticity": seen.elasticity.tolist(),
                "update": seen.update.tolist(),
                "scale": seen.scale.tolist(),
                "weight": seen.weight.tolist(),
                "norm": [seen.grad_norm],
            }
        grad, update = seen.grad.tolist(), seen.update.tolist()
        push(self.grads, grad, 2 * WINDOW)
        push(self.early_grads, early(self.along(grad)), RECENT)
        push(self.late_grads, late(self.along(grad)), RECENT)
        known, moved = finite(update), next(iter(self.updates[-1:]), [])
        if known:  # a step that was sampled out has no update and no weight norm
            push(self.updates, update, RECENT)
            push(self.early_updates, early(self.along(update)), RECENT)
            push(self.late_updates, late(self.along(update)), RECENT)
            push(self.typical_updates, median(known), RECENT)
            push(self.measured, seen.step, RECENT)
        if seen.spoilt:
            self.spoilt = [seen.step, seen.spoilt]
        if not math.isnan(seen.passed):
            push(self.passed, seen.passed, RECENT)
        weights = seen.weight.tolist()
        if finite(weights):
            if self.weights:
                self._weigh(seen, weights, update, moved)
            push(self.weights, weights, WINDOW + 1)
            push(self.weighed, seen.step, WINDOW + 1)
            self.between = [seen.grad_norm, -math.inf]
        elif self.between:
            self.between[1] = max(self.between[1], seen.grad_norm)
        push(self.scales, seen.scale.tolist(), WINDOW + 1)
        if math.isfinite(seen.grad_norm):
            push(self.norms, seen.grad_norm, 4 * WINDOW)
        if not math.isnan(seen.loss):
            if len(self.first_losses) < START:
                self.first_losses.append(seen.loss)
            push(self.losses, seen.loss, 4 * WINDOW)
            if len(self.losses) >= RECENT:
                self.best = min(self.best, median(self.losses[-RECENT:]))
        if known:
            drawn = [u for u, first in zip(update, self.first["update"], strict=False) if not first > ZERO]
            self.leaps += self.count <= WINDOW and median(finite(drawn) or [-math.inf]) >= LEAP
            self.pace = max(self.pace, self.typical_update)
        rate = max(seen.rates, default=math.nan)
        self.fastest = max(self.fastest, rate)
        self.faint = self.faint + 1 if rate <= FAINT * self.fastest else 0
        # By its steps, or by its learning rate: as weights grow and gradients fade, steps shrink that nobody has annealed.
        self.moving += self.typical_update >= self.pace - 0.5 or 3 * rate >= self.fastest > 0

    def restored(self) -> None:
        """A guard may have gone back: the weights are others than those the last steps were made with."""
        self.weights, self.weighed, self.between = [], [], []

    def along(self, by_matrix: Sequence[float]) -> list[float]:
        """Of values by matrix, those of the chain; all, where the model was another then."""
        return [by_matrix[i] for i in self.chain] if len(by_matrix) == len(self.names) else list(by_matrix)

    def _weigh(self, seen: Seen, weights: list[float], update: list[float], moved: list[float]) -> None:
        """Has something else than the optimizer written to a weight?

        A step changes the norm of a weight by its own length at most. Steps that were not read are as long as those that
        were before and after them, times what the gradient was larger in between.
        """
        gap, then_norm, peak = seen.step - self.weighed[-1], *self.between
        for i, (then, now) in enumerate(zip(self.weights[-1], weights, strict=True)):
            if not abs(now - then) >= WRITTEN or math.isnan(update[i]):
                continue
            most = 10 ** (now + update[i])
            if gap > 1:
                earlier = then + moved[i] + max(peak - then_norm, 0.0) if moved else -math.inf
                most = gap * max(most * 10 ** max(peak - seen.grad_norm, 0.0), 10**earlier)
            if abs(10**now - 10**then) > SURELY * most:
                self.written = [self.count, self.names[i], 10**then, 10**now, most]

    def _reach(self, seen: Seen) -> None:
        """Remember which parameters got a gradient."""
        waiting = {*self.unreached} | {*seen.sites} - {*self.sites}
        self.sites = list(seen.sites)
        self.unreached = [
            name
            for name, none in zip(seen.sites, seen.absent.tolist(), strict=True)
            if none and name in waiting
        ]
        joined = [name for name in seen.sites if name in waiting - {*self.unreached}]
        if self.count and joined:
            self.joined = [seen.step, len(joined), joined[0]]

    def _follow(self, seen: Seen) -> None:
        """Remember the learning rates."""
        rates = list(seen.rates)
        if self.rates and len(rates) != len(self.rates[-1]):  # an optimizer came or went
            self.rates, self.highest = [], []
        if len(self.rates) > WINDOW:
            self.highest = list(map(max, self.rates[0], self.highest or self.rates[0]))
        push(self.rates, rates, WINDOW + 1)

    def _length(self, seen: Seen) -> float:
        """log10 of the length of this step. Where it was not measured, more than can have become of the last that was,
        within WINDOW steps: a step grows with the learning rate, with the gradient or slower, and by momentum."""
        rate = max(seen.rates, default=math.nan)
        if math.isfinite(seen.update_norm):
            self.length = [seen.step, seen.update_norm, seen.grad_norm, rate]
            return seen.update_norm
        if not self.length or seen.step - self.length[0] > WINDOW:
            return math.nan
        _, length, norm, before = self.length
        faster = math.log10(rate / before) if rate > 0 and before > 0 else 0.0
        return length + faster + max(seen.grad_norm - norm, 0.0) + MOMENTUM

    def state(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "now"}

    def restore(self, state: dict[str, Any]) -> None:
        vars(self).update(state)

    @property
    def first_loss(self) -> float:
        """The level that the training started from; nan: no loss was logged."""
        return median(self.first_losses) if self.first_losses else math.nan

    @property
    def unlevelled(self) -> str:
        """Why the loss has no level of its own; '' where it has one."""
        if self.rivals:
            return RIVALS
        if not self.period:
            return ""
        return f"every {self.period[0]:.0f} steps the loss is another, as where its targets are renewed: it has no level of its own"

    @property
    def kept(self) -> float:
        """Share of what the loss has ever gained that it still has; nan: no loss was logged, or it gained nothing."""
        gained = self.first_loss - self.best
        return (self.first_loss - median(self.losses[-WINDOW:])) / gained if gained > 0 else math.nan

    @property
    def typical_update(self) -> float:
        """log10 update over weight of the median matrix, now; nan: not known."""
        return self.typical_updates[-1] if self.typical_updates else math.nan


def early(of: Sequence[float]) -> float:
    """Median over the first quarter of the matrices; nan: none is known."""
    known = [value for value in of if value == value]
    return median(known[: max(1, len(known) // 4)]) if known else math.nan


def late(of: Sequence[float]) -> float:
    """Median over the second half of the matrices; nan: none is known."""
    known = [value for value in of if value == value]
    return median(known[len(known) // 2 :]) if known else math.nan


class Detector:
    """Watches for one thing. A subclass says when it holds and what to tell of it; all attributes are plain data.

    `examine` returns a finding while the thing is there and None while it is not. Of an episode only the first
    is told; the same may be told again after `AGAIN` readings of quiet, `MOST` times in all.
    """

    def __init__(self) -> None:
        self.held = 0
        """Readings in a row for which the condition of the subclass has held."""
        self.quiet = AGAIN
        self.told = 0

    def examine(self, history: History) -> Finding | None:
        raise NotImplementedError

    def outcome(self, history: History) -> str | None:
        """Evidence that all is well; None: could not be examined, as `unexamined` says."""
        raise NotImplementedError

    unexamined = "too few steps"
    """What it takes to be examined."""
    of_level = False
    """It takes the loss to say how well the model does: of networks that are trained on each other it says nothing."""

    def silenced(self, history: History) -> str:
        """Why nothing is to be told; '' where it is."""
        return history.unlevelled if self.of_level else ""

    def observe(self, history: History) -> Iterator[Finding]:
        """What is new."""
        found = None if self.silenced(history) else self.examine(history)
        if found is None:
            self.quiet += 1
        else:
            yield from self.tell(found)

    def tell(self, found: Finding) -> Iterator[Finding]:
        """Of an episode only the first."""
        if self.quiet >= AGAIN and self.told < MOST:
            self.told += 1
            yield found
        self.quiet = 0

    def holds(self, condition: bool, times: int) -> bool:
        """Has the condition held for so many readings in a row, this one included?"""
        self.held = self.held + 1 if condition else 0
        return self.held >= times

    def state(self) -> dict[str, Any]:
        return dict(vars(self))

    def restore(self, state: dict[str, Any]) -> None:
        vars(self).update(state)


def push(values: list[Any], value: Any, most: int) -> None:
    """Append in place, and keep the newest `most`."""
    values.append(value)
    if len(values) > most:
        del values[0]


def worst(names: Iterable[str], values: Iterable[float], count: int = 3) -> tuple[str, ...]:
    """The names with the largest values."""
    pairs = [(value, name) for name, value in zip(names, values, strict=True) if not math.isnan(value)]
    return tuple(name for _, name in sorted(pairs, reverse=True)[:count])
