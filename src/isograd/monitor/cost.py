"""What watching costs the training thread, and how often a full reading is worth it."""

from __future__ import annotations

import math
import time
from collections import deque
from statistics import median


class Cost:
    """Seconds that watching takes of the training thread, and how often a full reading is worth it."""

    def __init__(self) -> None:
        self.spent = 0.0
        """In the step that is under way."""
        self._steps: deque[float] = deque(maxlen=32)
        self._full: deque[float] = deque(maxlen=8)
        self._lean: deque[float] = deque(maxlen=32)
        self._since = time.perf_counter()

    def ended(self, full: bool, deep: bool = False) -> None:
        """A step has ended; what a look from inside costs is asked for by `deep_every`, and not counted."""
        now = time.perf_counter()
        if deep:
            self._since, self.spent = now, 0.0
            return
        self._steps.append(now - self._since - self.spent)
        (self._full if full else self._lean).append(self.spent)
        self._since, self.spent = now, 0.0

    def interval(self, budget: float) -> int:
        """Steps from one full reading to the next that keep the share of time below `budget`."""
        if not self._full or not self._steps:
            return 1
        lean = median(self._lean) if self._lean else 0.0
        extra = max(median(self._full) - lean, 0.0)
        room = budget * median(self._steps) - lean
        # Where the sentinel alone takes the budget, full readings may take a tenth of it more.
        room = max(room, 0.1 * budget * median(self._steps), 1e-9)
        return max(1, math.ceil(extra / room))
