"""The host thread: device statistics become readings, which reach detectors, record and sinks.

Only `Host.put` runs on the training thread. What raises here is one warning, and the training goes on.
"""

from __future__ import annotations

import math
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextvars import copy_context
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Protocol

import torch
from torch import Tensor

from isograd import warning
from isograd.diagnosis import Finding
from isograd.flow import Flow
from isograd.monitor.cost import Pace
from isograd.monitor.deep import dead_units
from isograd.monitor.reading import Reading
from isograd.monitor.updates import number
from isograd.warning import warn

Sink = Callable[[dict[str, float], int], None]
"""Takes the numbers of a step, and the step: the log function of most loggers is one."""

WAITING = 10_000
"""Readings that may wait for the record; further ones are dropped, and counted."""
LINGER = 0.25
"""Seconds that a step waits for others to be taken with, unless somebody waits for it or it is not finite."""
TOGETHER = 64
"""Steps that are taken together at most."""


def bound(sink: Sink) -> Sink:
    """The sink as another thread can call it: loggers keep the run that is active per context or per thread."""
    if sink is getattr(sys.modules.get("mlflow"), "log_metrics", None):
        mlflow = sys.modules["mlflow"]
        run = mlflow.active_run() or mlflow.start_run()
        return lambda scalars, step: mlflow.log_metrics(scalars, step, run_id=run.info.run_id)
    context = copy_context()
    return lambda scalars, step: context.run(sink, scalars, step)


class Record(Protocol):
    """Where readings are kept: `isograd.record.Run`, or anything with these methods."""

    def extend(self, steps: Sequence[tuple[Reading, Sequence[Finding]]]) -> None: ...
    def close(self) -> None: ...


class Observer(Protocol):
    """What examines readings as they come: `isograd.monitor.detectors.Detectors`."""

    def follow(self, readings: Sequence[Reading]) -> list[tuple[Finding, ...]]: ...


@dataclass
class Packed:
    """Statistics of some sites, on their way to the host."""

    sites: list[int]
    columns: list[str]
    values: Callable[[], Tensor]
    """Waits for them: (column, site)."""
    elements: list[int]
    """Elements of each parameter, whole where it is sharded."""
    scale: Tensor | None = None
    """Factor that gradients still carried when they were read."""


@dataclass
class Ended:
    """A step that has ended, as the training thread hands it over."""

    step: int
    sites: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    packed: list[Packed]
    scalars: dict[str, float | Tensor]
    notes: list[str]
    time: float
    flow: Flow | None = None
    due: bool = True
    """To be kept; others only if something in them is not finite."""
    suspicious: bool = False
    """Something is not finite, as far as the training thread could tell without waiting."""
    logged_early: set[str] = field(default_factory=set[str])
    """Names that were logged before the step ended."""
    found: tuple[Finding, ...] = ()
    """What was found on the training thread, while the batch was there."""


COLUMNS = ("grad_norm", "grad_max", "nonfinite", "zeros", "weight_norm", "update_norm")
COUNTED = {"nonzero": "zeros"}
"""What is counted on the device, and the column that is made of it."""


def reading_of(ended: Ended) -> Reading:
    """The reading of a step; waits for its device."""
    return readings_of([ended])[0]


def readings_of(steps: Sequence[Ended]) -> list[Reading]:
    """The readings of steps that are `alike`: all in the same few operations. Waits for their device."""
    first = steps[0]
    scalars = [{name: value(v) for name, v in ended.scalars.items()} for ended in steps]
    names = {COUNTED.get(name, name) for packed in first.packed for name in packed.columns}
    if "grad_norm" in names:
        names.add("nonfinite")
    place = {name: i for i, name in enumerate(name for name in COLUMNS if name in names)}
    table = torch.full((len(steps), len(place), len(first.sites)), math.nan, dtype=torch.float64)
    for i, packed in enumerate(first.packed):
        values = torch.stack(
            [ended.packed[i].values().cpu() for ended in steps]
        ).double()  # (step, column, site)
        for row, ended, numbers in zip(values, steps, scalars, strict=True):
            scale = ended.packed[i].scale
            if scale is not None:
                numbers["scale"] = value(scale)
                row[[name in ("grad_norm", "grad_max") for name in packed.columns]] /= numbers["scale"]
        at = torch.tensor(packed.sites)
        into = torch.tensor([[place[COUNTED.get(name, name)]] for name in packed.columns])
        table[:, into, at] = values
        if "nonzero" in packed.columns:
            elements = torch.tensor(packed.elements, dtype=torch.float64)
            table[:, place["zeros"], at] = elements - table[:, place["zeros"], at]
    if "grad_norm" in place:
        norms, counts = table[:, place["grad_norm"]], table[:, place["nonfinite"]]
        read = torch.zeros(len(first.sites), dtype=torch.bool)
        for packed in first.packed:
            read[packed.sites] |= "grad_norm" in packed.columns
        _count(norms, counts, table[:, place["grad_max"]] if "grad_max" in place else None, read)
        known = ~norms.isnan() | (counts > 0)
        totals = torch.linalg.vector_norm(torch.where(known, norms, 0.0), dim=1)
        totals = torch.where(known.any(1), totals, math.nan).tolist()
        for numbers, total in zip(scalars, totals, strict=True):
            numbers["grad_norm"] = total
    readings: list[Reading] = []
    for ended, numbers, rows in zip(steps, scalars, table.float(), strict=True):
        columns = dict(zip(place, rows, strict=True))
        if ended.flow is not None:
            dead = dead_units(ended.flow)
            columns["dead"] = torch.tensor([dead.get(site, math.nan) for site in ended.sites])
        notes = tuple(ended.notes)
        readings.append(
            Reading(
                ended.step, ended.sites, columns, numbers, notes, ended.time, ended.shapes, flow=ended.flow
            )
        )
    return readings


def _count(norms: Tensor, counts: Tensor, maxima: Tensor | None, read: Tensor) -> None:
    """What norms tell of elements that nobody counted, as on a GPU, where that would have to be waited for; in place.

    A finite sum of squares has finite terms only. An infinite one beside a finite maximum has overflowed: the norm is
    then said to be that maximum, which it is at least. Where there is no maximum it stays infinite, and the count
    unknown. NaN comes from NaN alone: at least one element. Shapes: (step, site), `read` (site,).
    """
    unknown = counts.isnan() & read
    counts[unknown & norms.isfinite()] = 0.0
    broken = unknown & ~norms.isfinite()
    if not broken.any():
        return
    if maxima is not None:
        overflowed = broken & norms.isinf() & maxima.isfinite()
        norms[overflowed] = maxima[overflowed]
        counts[overflowed] = 0.0
        counts[broken & ~maxima.isfinite()] = 1.0
    counts[broken & norms.isnan()] = 1.0
    norms[broken & norms.isnan()] = math.inf  # nan is a parameter without a gradient


def alike(steps: Sequence[Ended]) -> Iterator[list[Ended]]:
    """Runs of steps that were read of the same parameters in the same way."""

    def kind(ended: Ended) -> tuple[object, ...]:
        return ended.sites, id(ended.flow), [(packed.sites, packed.columns) for packed in ended.packed]

    for _, run in groupby(steps, kind):
        yield list(run)


def on_its_way(values: Tensor, columns: int) -> Callable[[], Tensor]:
    """Start the copy of rows to the host, and return a function that waits for them: (column, site)."""
    if values.device.type != "cuda":
        return lambda: values.view(columns, -1)
    copy = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    copy.copy_(values, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()

    def wait() -> Tensor:
        arrived.synchronize()
        return copy.view(columns, -1)

    return wait


def value(scalar: float | Tensor) -> float:
    """A scalar that may still be on its device."""
    return number(scalar.detach().cpu() if isinstance(scalar, Tensor) else scalar)


class Host:
    """Takes the steps that ended, in order, on a thread of its own.

    Steps wait for `LINGER` seconds and are taken together: waking a thread, and the few operations that make
    readings of all of them, cost as much for one as for many.

    Attributes:
        newest: the last reading that was made, or None.
        findings: what the detectors have found so far, with the step.
        held: the step that ended last; until the next begins scalars may be added to it.
        dropped: readings that were dropped because the record could not keep up.
    """

    def __init__(
        self,
        observer: Observer | None,
        record: Record | None,
        sinks: Sequence[Sink],
        pace: Pace,
    ) -> None:
        self.newest: Reading | None = None
        self.findings: list[tuple[int, Finding]] = []
        self.dropped = 0
        self.held: Ended | None = None
        self._observer, self._record, self._sinks = observer, record, list(sinks)
        self._pace = pace
        self._waiting: list[Ended] = []
        self._taking = self._hurry = self._closing = False
        self._changed = threading.Condition()
        self._failed: set[str] = set()
        self._thread: threading.Thread | None = None
        self._line = warning.users_line()

    def release(self) -> None:
        """Take the step that is held: nothing can be added to it any more."""
        held, self.held = self.held, None
        if held is not None:
            self.put(held, now=held.suspicious)

    def put(self, ended: Ended, *, now: bool = False) -> None:
        """Hand a step over, to be dealt with soon or `now`; never waits."""
        if self._thread is None:
            self._closing = False
            self._thread = threading.Thread(target=self._run, name="isograd monitor", daemon=True)
            self._thread.start()
        with self._changed:
            if len(self._waiting) >= WAITING:
                self.dropped += 1
                return
            self._waiting.append(ended)
            self._hurry |= now
            if now or len(self._waiting) in (1, TOGETHER):
                self._changed.notify_all()

    def drain(self) -> None:
        """Wait until everything that was put has been dealt with."""
        with self._changed:
            self._hurry = bool(self._waiting)
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._waiting and not self._taking)

    def close(self) -> None:
        """Deal with what is waiting, and end the thread and the record."""
        self.release()
        thread, self._thread = self._thread, None
        if thread is None:
            self._end()
            return
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if thread is not threading.current_thread():  # there a garbage collection may have brought us
            thread.join()

    def _end(self) -> None:
        if self._record is not None:
            self._guarded("record", self._record.close)
            self._record = None

    def _run(self) -> None:
        warning.here.set(self._line)
        while steps := self._next():
            for run in alike(steps):
                self._guarded("reading", lambda run=run: self._take(run))
            with self._changed:
                self._taking = False
                self._changed.notify_all()
        self._end()

    def _next(self) -> list[Ended]:
        """The steps to be taken now; none: the thread ends."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closing)
            self._changed.wait_for(
                lambda: self._hurry or self._closing or len(self._waiting) >= TOGETHER, LINGER
            )
            steps, self._waiting = self._waiting[:TOGETHER], self._waiting[TOGETHER:]
            self._taking = bool(steps)
            self._hurry &= bool(self._waiting)
            return steps

    def _take(self, run: Sequence[Ended]) -> None:
        readings = readings_of(run)  # of every step: nothing to be saved by taking fewer
        kept = [reading for ended, reading in zip(run, readings, strict=True) if self._worth(ended, reading)]
        self.newest = readings[-1]
        if not kept:
            return
        start = time.thread_time()
        found: list[tuple[Finding, ...]] = [()] * len(kept)
        if self._observer is not None:
            follow = self._observer.follow
            found = self._guarded("detectors", lambda: follow(kept)) or found
        there = {ended.step: ended.found for ended in run}
        steps = [
            (reading, findings + there[reading.step]) for reading, findings in zip(kept, found, strict=True)
        ]
        self.findings += [(reading.step, finding) for reading, findings in steps for finding in findings]
        if self._record is not None:
            extend = self._record.extend
            self._guarded("record", lambda: extend(steps))
        self._pace.took(time.thread_time() - start, len(kept))
        for reading in kept if self._sinks else ():
            self._tell(reading.flat(), reading.step)

    def _tell(self, flat: dict[str, float], step: int) -> None:
        for sink in self._sinks:
            self._guarded(f"sink {sink!r}", lambda sink=sink: sink(flat, step))

    def _worth(self, ended: Ended, reading: Reading) -> bool:
        if self._pace.keeps(reading, ended.due):
            return True
        if math.isfinite(reading.scalars.get("grad_norm", math.nan)):
            return False
        counts = reading.columns.get("nonfinite")  # (site,)
        return counts is not None and bool((counts > 0).any() | counts.isnan().all())

    def _guarded(self, what: str, act: Callable[[], Any]) -> Any:
        try:
            return act()
        except Exception as error:
            if what not in self._failed:
                self._failed.add(what)
                warn(
                    f"isograd.watch: the {what} failed ({type(error).__name__}: {error}). The training is not affected; this is said once."
                )
            return None
