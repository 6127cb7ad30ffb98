"""What watching costs, and what it is therefore worth doing how often.

The norms, and with them whether all values are finite, are read at every step: that is the price of watching.
All else keeps to a budget, a share of the training time: half of it goes to full readings, on the training
thread, and half to what the host thread does with a reading. That thread runs beside the training, but Python
runs one thread at a time: what it takes, the training waits for.
"""

from __future__ import annotations

import math
import time
from collections import deque
from statistics import median

from isograd.monitor.reading import Reading

TIMED = 8
"""Of the steps between full readings one in so many is timed: to ask for a thread's own time is a system call."""
YOUNG = 1000
"""Steps that reach detectors and record whatever it costs: short trainings, and the start of long ones."""
AROUND = 32
"""Steps that one stands out from."""
ALERT = 8
"""Steps that are kept after one that stands out."""


class Cost:
    """Seconds that watching takes of the training thread, and how often a full reading is worth it."""

    def __init__(self) -> None:
        self.timing = True
        """This step is timed."""
        self.spent = 0.0
        """In the step that is under way, if it is timed."""
        self._count = 0
        self._steps: deque[float] = deque(maxlen=32)
        self._full: deque[float] = deque(maxlen=8)
        self._lean: deque[float] = deque(maxlen=32)
        self._since = time.perf_counter()

    def ended(self, full: bool, deep: bool = False) -> None:
        """A step has ended; what a look from inside costs is asked for by `deep_every`, and not counted."""
        now = time.perf_counter()
        if self.timing and not deep:
            self._steps.append(now - self._since - self.spent)
            (self._full if full else self._lean).append(self.spent)
        self._since, self.spent = now, 0.0
        self._count += 1
        self.timing = self._count % TIMED == 0

    def interval(self, budget: float) -> int:
        """Steps from one full reading to the next that keep the share of time below `budget`."""
        if not self._full or not self._steps:
            return 1
        lean = median(self._lean) if self._lean else 0.0
        extra = max(median(self._full) - lean, 0.0)
        room = budget * median(self._steps) - lean
        # Where the norms alone take the budget, full readings may take a tenth of it more.
        room = max(room, 0.1 * budget * median(self._steps), 1e-9)
        return max(1, math.ceil(extra / room))


class Pace:
    """Which readings are worth what detectors and record take, so that all of it keeps to a share of the time.

    Always: the first `YOUNG` steps, full readings, those with a note, and a step whose gradient norm or loss
    stands out from the steps before it, with the `ALERT` steps that follow.
    """

    def __init__(self, share: float) -> None:
        self._share = share
        self._count = self._since = self._alert = 0
        self._ended = math.nan
        self._lasted: deque[float] = deque(maxlen=AROUND)
        self._took: deque[float] = deque(maxlen=8)
        self._around = {name: deque[float](maxlen=AROUND) for name in ("grad_norm", "loss")}
        self.spacing = 1
        """Steps from one reading that is kept to the next."""

    def keeps(self, reading: Reading, due: bool = True) -> bool:
        """Shall this reading reach the detectors? Asked of every step, in order; `due`: by the user's `every`."""
        lasted = reading.time - self._ended
        self._ended = reading.time
        if lasted >= 0:
            self._lasted.append(lasted)
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
        if self._lasted:
            self.spacing = max(1, math.ceil(median(self._took) / (self._share * median(self._lasted) + 1e-9)))

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
