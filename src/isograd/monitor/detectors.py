"""All detectors together: readings in, findings out, with a state that is plain data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib import import_module
from statistics import median
from typing import Any

from torch import Tensor

from isograd.diagnosis import Finding
from isograd.monitor.history import RECENT, Detector, History
from isograd.monitor.reading import Reading
from isograd.monitor.seen import Seen, alike, nonfinite, seen, spread
from isograd.record.row import BEGINS, GUARDED, PERHAPS, PROCESSES, RIVALS
from isograd.symptoms import STREAMED
from isograd.symptoms.loss_spike import DEVIATIONS
from isograd.symptoms.nonfinite_step import NonFinite


class Detectors:
    """Watch a training. Feed every reading, in order; not for several threads at once.

    Example:
        >>> detectors = Detectors()
        >>> for reading in run.readings():
        ...     for finding in detectors.observe(reading):
        ...         print(reading.step, finding.message)
    """

    def __init__(self) -> None:
        self.history = History()
        self.since = 0
        """The step at which this training began, of those that were recorded one behind the other."""
        self.by_code = {module.CODE: _made(module) for module in map(_module, STREAMED)}

    def observe(self, reading: Reading) -> tuple[Finding, ...]:
        """What is new with this step. Values that are not finite reach one detector only, and no baseline."""
        return self.follow([reading])[0]

    def follow(self, readings: Sequence[Reading]) -> list[tuple[Finding, ...]]:
        """The same for several steps: what they have in common is worked out once."""
        found: list[tuple[Finding, ...]] = []
        for run in alike(readings):
            counts = nonfinite(run)
            finite = iter(
                seen([reading for reading, count in zip(run, counts, strict=True) if count is None])
            )
            for reading, count in zip(run, counts, strict=True):
                if BEGINS in reading.notes or (PERHAPS in reading.notes and not self._goes_on(reading)):
                    vars(self).update(vars(Detectors()))
                    self.since = reading.step
                self.history.rivals |= RIVALS in reading.notes
                self.history.processes |= PROCESSES in reading.notes
                if any(note.startswith(GUARDED) for note in reading.notes):
                    self.history.restored()
                found.append(self._finite(next(finite)) if count is None else self._broken(reading, count))
        return found

    def _finite(self, seen: Seen) -> tuple[Finding, ...]:
        self.history.add(seen)
        return tuple(
            finding for detector in self.by_code.values() for finding in detector.observe(self.history)
        )

    def _broken(self, reading: Reading, counts: Tensor) -> tuple[Finding, ...]:
        detector = self._nonfinite
        found = detector.broken(reading, counts, self.history)
        return () if found is None else tuple(detector.tell(found))

    def _goes_on(self, reading: Reading) -> bool:
        """Does this training go on where the last one ended? The loss of its first step, which no step of its own has
        changed yet, then is none that would be told as a jump; where none is known, it is taken to."""
        loss, last = reading.scalars.get("loss", math.nan), self.history.losses[-RECENT:]
        return math.isnan(loss) or not last or abs(loss - median(last)) <= DEVIATIONS * spread(last)

    def outcomes(self) -> tuple[dict[str, str], dict[str, str]]:
        """By code: with what evidence all is well now, and what could not be examined, and why."""
        healthy: dict[str, str] = {}
        unexamined: dict[str, str] = {}
        for code, detector in self.by_code.items():
            silent = detector.silenced(self.history)
            said = None if silent else detector.outcome(self.history)
            if said is None:
                unexamined[code] = silent or detector.unexamined
            else:
                healthy[code] = said
        if never := self.history.unreached:
            more = f" and {len(never) - 3} more" if len(never) > 3 else ""
            unexamined["gradients"] = (
                f"{len(never)} of {len(self.history.sites)} parameters have got none in {self.history.count} steps, "
                f"because they are in no watched optimizer, frozen, not used, or cut off from the loss: {', '.join(never[:3])}{more}"
            )
        return healthy, unexamined

    @property
    def _nonfinite(self) -> NonFinite:
        return next(detector for detector in self.by_code.values() if isinstance(detector, NonFinite))

    def state(self) -> dict[str, Any]:
        """All that is remembered, as JSON can hold it."""
        detectors = {code: detector.state() for code, detector in self.by_code.items()}
        return {"since": self.since, "history": self.history.state(), "detectors": detectors}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state()`. A detector that the state does not know starts afresh."""
        self.since = state.get("since", 0)
        self.history.restore(state["history"])
        for code, saved in state["detectors"].items():
            if code in self.by_code:
                self.by_code[code].restore(saved)


def _module(name: str) -> Any:
    return import_module(f"isograd.symptoms.{name}")


def _made(module: Any) -> Detector:
    """The one detector that a page defines."""
    (kind,) = (
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Detector) and value.__module__ == module.__name__
    )
    return kind()
