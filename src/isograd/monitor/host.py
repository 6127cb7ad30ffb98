"""The host thread: device statistics become readings, which reach detectors, record and sinks.

Nothing here runs on the training thread. What raises here is one warning, and the training goes on.
"""

from __future__ import annotations

import math
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from contextvars import copy_context
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any, Protocol

import torch
from torch import Tensor

from isograd.diagnosis import Finding
from isograd.flow import Flow
from isograd.monitor.deep import dead_units
from isograd.monitor.reading import Reading
from isograd.monitor.updates import number

Sink = Callable[[dict[str, float], int], None]
"""Takes the numbers of a step, and the step: the log function of most loggers is one."""

WAITING = 10_000
"""Readings that may wait for the record; further ones are dropped, and counted."""


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

    def append(self, reading: Reading, findings: Sequence[Finding] = ()) -> None: ...
    def close(self) -> None: ...


class Observer(Protocol):
    """What examines readings as they come: `isograd.monitor.detectors.Detectors`."""

    def observe(self, reading: Reading) -> Sequence[Finding]: ...


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
    logged_early: set[str] = field(default_factory=set[str])
    """Names that were logged before the step ended."""


COLUMNS = ("grad_norm", "grad_max", "nonfinite", "zeros", "weight_norm", "update_norm")
COUNTED = {"nonzero": "zeros"}
"""What is counted on the device, and the column that is made of it."""


def reading_of(ended: Ended) -> Reading:
    """The reading of a step; waits for its device."""
    scalars = {name: value(v) for name, v in ended.scalars.items()}
    names = {COUNTED.get(name, name) for packed in ended.packed for name in packed.columns}
    if "grad_norm" in names:
        names.add("nonfinite")
    place = {name: i for i, name in enumerate(name for name in COLUMNS if name in names)}
    table = torch.full((len(place), len(ended.sites)), math.nan, dtype=torch.float64)  # (column, site)
    for packed in ended.packed:
        values = packed.values().cpu().double()
        index = torch.tensor(packed.sites)
        if packed.scale is not None:
            scalars["scale"] = scale = value(packed.scale)
            scaled = [[scale if name in ("grad_norm", "grad_max") else 1.0] for name in packed.columns]
            values = values / torch.tensor(scaled, dtype=torch.float64)
        table[torch.tensor([[place[COUNTED.get(name, name)]] for name in packed.columns]), index] = values
        if "nonzero" in packed.columns:
            table[place["zeros"], index] = (
                torch.tensor(packed.elements, dtype=torch.float64) - table[place["zeros"], index]
            )
    columns = dict(zip(place, table.float(), strict=True))
    if "grad_norm" in columns:
        norms = table[place["grad_norm"]]
        # A finite sum of squares has finite terms only; one that is not was looked at, on the CPU.
        finite = torch.where(norms.isfinite(), 0.0, math.nan).float()
        counted = torch.where(columns["nonfinite"].isnan(), finite, columns["nonfinite"])
        columns["nonfinite"] = counted
        known = norms[~norms.isnan() | (counted > 0)]
        scalars["grad_norm"] = float(torch.linalg.vector_norm(known)) if len(known) else math.nan
    if ended.flow is not None:
        dead = dead_units(ended.flow)
        columns["dead"] = torch.tensor([dead.get(site, math.nan) for site in ended.sites])
    return Reading(
        ended.step,
        ended.sites,
        columns,
        scalars,
        tuple(ended.notes),
        ended.time,
        shapes=ended.shapes,
        flow=ended.flow,
    )


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

    Attributes:
        newest: the last reading that was made, or None.
        findings: what the detectors have found so far, with the step.
        held: the step that ended last; until the next begins scalars may be added to it.
        dropped: readings that were dropped because the record could not keep up.
    """

    def __init__(self, observer: Observer | None, record: Record | None, sinks: Sequence[Sink]) -> None:
        self.newest: Reading | None = None
        self.findings: list[tuple[int, Finding]] = []
        self.dropped = 0
        self.held: Ended | None = None
        self._observer, self._record, self._sinks = observer, record, list(sinks)
        self._queue: SimpleQueue[Ended | None] = SimpleQueue()
        self._waiting = 0
        self._idle = threading.Condition()
        self._failed: set[str] = set()
        self._thread: threading.Thread | None = None

    def release(self) -> None:
        """Take the step that is held: nothing can be added to it any more."""
        held, self.held = self.held, None
        if held is not None:
            self.put(held)

    def put(self, ended: Ended) -> None:
        """Hand a step over; never waits."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="isograd monitor", daemon=True)
            self._thread.start()
        with self._idle:
            if self._waiting >= WAITING:
                self.dropped += 1
                return
            self._waiting += 1
        self._queue.put(ended)

    def drain(self) -> None:
        """Wait until everything that was put has been dealt with."""
        with self._idle:
            self._idle.wait_for(lambda: not self._waiting)

    def close(self) -> None:
        """Deal with what is waiting, and end the thread and the record."""
        self.release()
        thread, self._thread = self._thread, None
        if thread is None:
            self._end()
            return
        self._queue.put(None)
        if thread is not threading.current_thread():  # there a garbage collection may have brought us
            thread.join()

    def _end(self) -> None:
        if self._record is not None:
            self._guarded("record", self._record.close)
            self._record = None

    def _run(self) -> None:
        while (ended := self._queue.get()) is not None:
            self._guarded("reading", lambda ended=ended: self._take(ended))
            with self._idle:
                self._waiting -= 1
                self._idle.notify_all()
        self._end()

    def _take(self, ended: Ended) -> None:
        reading = reading_of(ended)
        counts = reading.columns.get("nonfinite")
        if not ended.due and (counts is None or not (counts > 0).any() | counts.isnan().all()):
            return
        found: Sequence[Finding] = ()
        if self._observer is not None:
            observe = self._observer.observe
            found = self._guarded("detectors", lambda: tuple(observe(reading))) or ()
            self.findings += [(reading.step, finding) for finding in found]
        if self._record is not None:
            append = self._record.append
            self._guarded("record", lambda: append(reading, found))
        if self._sinks:
            flat = reading.flat()
            for sink in self._sinks:
                self._guarded(f"sink {sink!r}", lambda sink=sink: sink(flat, reading.step))
        self.newest = reading

    def _guarded(self, what: str, act: Callable[[], Any]) -> Any:
        try:
            return act()
        except Exception as error:
            if what not in self._failed:
                self._failed.add(what)
                warnings.warn(
                    f"isograd.watch: the {what} failed ({type(error).__name__}: {error}). The training is not affected; this is said once.",
                    stacklevel=2,
                )
            return None
