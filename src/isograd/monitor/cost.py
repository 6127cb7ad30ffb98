"""What watching costs, and what it is therefore worth doing how often.

The norms, and with them whether all values are finite, are read at every step: that is the price of watching.
All else keeps to a budget, a share of the processor time of the training thread: half of it goes to full
readings, on that thread, and half to what the host thread does with a reading. That thread runs beside the
training, but Python runs one thread at a time: what it takes, the training waits for.
"""

from __future__ import annotations

import math
import time
from collections import deque
from statistics import median

from isograd.monitor.reading import Reading

TIMED = 8
"""Of the steps between full readings one in so many is timed: to ask for a thread's own time is a system call.
Its own, because it is not longer where other processes use the machine."""
YOUNG = 1000
"""Steps that reach detectors and record whatever it costs: short trainings, and the start of long ones."""
AROUND = 32
"""Steps that one stands out from."""
FARTHEST = 32
"""Steps from one that is kept to the next at most, whatever it costs."""
ALERT = 8
"""Steps that are kept after one that stands out."""
FIRST = 10
"""Steps that are read in full whatever it costs: faults of the initialisation show in them."""
SELDOM = 32
"""Steps from one full reading to the next, at most, as long as a training is young."""


class Cost:
    """Seconds that watching takes of the training thread, and how often a full reading is worth it."""

    def __init__(self) -> None:
        self.timing = True
        """This step is timed."""
        self.spent = 0.0
        """In the step that is under way, if it is timed."""
        self.step = math.nan
        """Seconds that the median step takes of the training thread without us."""
        self._count = 0
        self._steps: deque[float] = deque(maxlen=32)
        self._full: deque[float] = deque(maxlen=8)
        self._lean: deque[float] = deque(maxlen=32)
        self._since = time.thread_time()
        self._entered = math.nan

    def enter(self) -> None:
        """What follows is ours, up to `leave`."""
        self._entered = time.thread_time() if self.timing else math.nan

    def leave(self) -> None:
        if self._entered == self._entered and self.timing:
            self.spent += time.thread_time() - self._entered
        self._entered = math.nan

    def ended(self, full: bool, deep: bool = False) -> None:
        """A step has ended; what a look from inside costs is asked for by `deep_every`, and not counted."""
        if self.timing and not deep:
            now = time.thread_time()
            if self._entered == self._entered:  # a step ends while we are at it
                self.spent += now - self._entered
                self._entered = now
            self._steps.append(max(now - self._since - self.spent, 0.0))
            self.step = median(self._steps)
            (self._full if full else self._lean).append(self.spent)
        self._count += 1
        self.next(self._count % TIMED == 0)

    def next(self, timing: bool) -> None:
        """The next step is timed, or not."""
        self.timing, self.spent = timing, 0.0
        if timing:
            self._since = time.thread_time()

    def interval(self, budget: float) -> int:
        """Steps from one full reading to the next that keep the share of time below `budget`."""
        if not self._full or not self._steps:
            return 1
        lean = median(self._lean) if self._lean else 0.0
        extra = max(median(self._full) - lean, 0.0)
        share = budget * median(self._steps)
        # Where the norms alone take the budget, full readings may take half of it more.
        room = max(share - lean, share / 2, 1e-9)
        return max(1, math.ceil(extra / room))


class Schedule:
    """Which steps are read in full: the first, one that is asked for, and then as many as the budget allows.

    Attributes:
        every: keep every so many steps.
        cost: what a step takes.
        done: steps so far, under this monitor.
        asked: somebody waits for a full reading.
    """

    def __init__(self, every: int, budget: float, cost: Cost, together: bool) -> None:
        """`together`: every process must come to the same answer, and their clocks differ."""
        self.every, self.cost = every, cost
        self.done, self.asked = 0, False
        self._budget, self._together = budget, together
        self._last, self._interval = -1, 1

    @property
    def due(self) -> bool:
        """Is this step to be kept?"""
        return self.done % self.every == 0

    def full(self, ahead: int = 0) -> bool:
        """Read all columns at this step, or at one so many ahead?"""
        step = self.done + ahead
        if step % self.every:
            return False
        if self._together:
            return step < FIRST or step % FIRST == 0
        return step < FIRST or self.asked or step - self._last >= self._interval

    def read(self) -> None:
        """Something of this step was read in full."""
        self._last = self.done

    def ended(self, full: bool, deep: bool) -> None:
        """What the step cost, and when the next is read in full."""
        self.asked = self.asked and not full
        self.done += 1
        self.cost.ended(full, deep)
        if full or self.cost.timing:
            self._interval = self.cost.interval(self._budget)
            if self.done < YOUNG:
                self._interval = min(self._interval, SELDOM)
        if self.full():
            self.cost.next(timing=True)


class Pace:
    """Which readings are worth what detectors and record take, so that all of it keeps to a share of the time.

    Always: the first `YOUNG` steps, full readings, those with a note, and a step whose gradient norm or loss
    stands out from the steps before it, with the `ALERT` steps that follow.
    """

    def __init__(self, share: float, cost: Cost) -> None:
        self._share, self._cost = share, cost
        self._count = self._since = self._alert = 0
        self._took: deque[float] = deque(maxlen=8)
        self._around = {name: deque[float](maxlen=AROUND) for name in ("grad_norm", "loss")}
        self.spacing = 1
        """Steps from one reading that is kept to the next."""

    def keeps(self, reading: Reading, due: bool = True) -> bool:
        """Shall this reading reach the detectors? Asked of every step, in order; `due`: by the user's `every`."""
        self._count += 1
        self._since += 1
        self._alert = ALERT if self._stands_out(reading) else max(self._alert - 1, 0)
        full = "weight_norm" in reading.columns
        kept = due and (
            self._since >= self.spacing
            or self._count <= YOUNG
            or self._alert > 0
            or full
            or bool(reading.notes)
        )
        if kept:
            self._since = 0
        return kept

    def took(self, seconds: float, readings: int) -> None:
        """So much processor time went into some readings that were kept."""
        if not readings:
            return
        self._took.append(seconds / readings)
        share = self._share * self._cost.step
        if share > 0:
            self.spacing = min(max(1, math.ceil(median(self._took) / share)), FARTHEST)

    def _stands_out(self, reading: Reading) -> bool:
        """Above all that came just before, by half of their range."""
        out = False
        for name, before in self._around.items():
            value = reading.scalars.get(name, math.nan)
            if not math.isfinite(value):
                continue
            if len(before) == AROUND:
                largest = max(before)
                out |= value > largest + (largest - min(before)) / 2
            before.append(value)
        return out
