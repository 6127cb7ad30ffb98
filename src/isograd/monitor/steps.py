"""One step of a training: what its optimizers showed and what the user logged, put together for the host thread."""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from isograd.monitor.cost import Schedule
from isograd.monitor.deep import Deep
from isograd.monitor.host import Ended, Host, Packed, on_its_way
from isograd.monitor.names import Names
from isograd.monitor.parts import Part
from isograd.monitor.replay import Replay
from isograd.monitor.rivals import broke
from isograd.monitor.sharding import Shards, together
from isograd.monitor.tap import Tap
from isograd.monitor.updates import number
from isograd.record.row import BEGINS, ELSEWHERE, GUARDED, PERHAPS, PROCESSES, RIVALS


class Steps:
    """Makes one step of those of several optimizers: it ends when all have stepped, or when one is about to step again.

    Attributes:
        begun: a backward has ended since the last step: what is logged now belongs to another one.
        logged: names of the scalars that were ever logged.
    """

    def __init__(
        self,
        host: Host,
        names: Names,
        shards: Shards,
        deep: Deep,
        replay: Replay,
        schedule: Schedule,
        *,
        first: int,
        known: bool,
    ) -> None:
        """`first`: number of the first step; `known`: this very model has been trained into this record before."""
        self._host, self._names, self._shards = host, names, shards
        self._deep, self._replay, self._schedule = deep, replay, schedule
        self._first = self._step = first
        self._known = known
        self._behind = first > 0
        """The record has steps already: of this training, or of another."""
        self.begun = self._against = False
        self.logged: set[str] = set()
        self._open: list[tuple[Tap, Part]] = []
        self._settled: dict[str, float | Tensor] = {}
        """Scalars of the step that is open; what comes after them may be those of the next."""
        self._scalars: dict[str, float | Tensor] = {}

    def log(self, scalars: dict[str, float | Tensor]) -> None:
        """Scalars of the step that has ended, if they are new to it and no backward came since; else of the next."""
        self.logged |= scalars.keys()
        for name, value in scalars.items():
            held = self._host.held
            if self._open and name not in self._settled and not self.begun:
                self._settled[name] = _kept(value)
            elif held is not None and name not in held.logged_early and not self.begun:
                held.scalars[name] = _kept(value)
            else:
                self._scalars[name] = _kept(value)

    def holds(self, tap: Tap | None) -> bool:
        """Has this optimizer stepped in the step that is open?"""
        return any(stepped is tap for stepped, _ in self._open)

    def ended(self, tap: Tap, part: Part, taps: Sequence[Tap]) -> None:
        """One of these optimizers has stepped."""
        if self.holds(tap):
            self.flush(taps)
        self._open.append((tap, part))
        if tap.scale is not None:
            self._settled["scale"] = tap.scale
        if tap.clipped is not None:
            self._settled["clipped_norm"] = tap.clipped
        self._settled |= self._scalars
        self._scalars, self.begun = {}, False
        if part.full:
            self._schedule.read()
        if len(self._open) == len(taps):
            self.flush(taps)

    def flush(self, taps: Sequence[Tap]) -> None:
        """End the step that is open."""
        if not self._open:
            return
        self._host.release()
        parts, self._open = self._open, []
        settled, self._settled = self._settled, {}
        step = Ended(self._step, (), (), [], settled, [], time.time(), logged_early=set(settled))
        begins = [tap.begins for tap in taps]
        if self._behind and False not in begins:
            step.notes.append(BEGINS if all(begins) and not self._known else PERHAPS)
        if self._step == self._first and together():
            step.notes.append(PROCESSES)
        self._behind = full = False
        for _, part in parts:
            full |= part.full
            step.suspicious |= any(bucket.suspicious for bucket in part.buckets)
            step.packed += self._packed(part)
            step.notes += part.notes
        if step.suspicious and broke(tap.provenance.rivals for tap in taps):
            step.notes.append(ELSEWHERE)
        step.suspicious |= any(note.startswith(GUARDED) for note in step.notes)
        for i, tap in enumerate(taps):
            rate = _rate(tap.optimizer)
            if rate is not None:
                step.scalars[f"lr_{i}" if i else "lr"] = _kept(rate)
        step.sites, step.shapes = self._names.sites, self._names.shapes
        step.flow, step.found = self._deep.taken(), self._replay.taken()
        step.due = self._schedule.due
        if step.due and not self._against and any(tap.provenance.rivals.found for tap in taps):
            self._against = True
            step.notes.append(RIVALS)
        self._host.held = step
        self._step += 1
        self._schedule.ended(full, deep=step.flow is not None)
        self._deep.prepare(self._schedule.done)
        self._replay.prepare()

    def _packed(self, part: Part) -> list[Packed]:
        packed: list[Packed] = []
        for bucket in part.buckets:
            if not bucket.sharded:
                sites, elements = self._names.find(bucket.parameters)
                values = on_its_way(bucket.pack(), len(bucket.rows))
                packed.append(Packed(sites, list(bucket.rows), values, elements, part.scale))
        for parameters in self._shards.split(part.sharded):
            sites, elements = self._names.find(parameters)
            columns, values = self._shards.reduce(parameters, part.shares(parameters))
            packed.append(Packed(sites, columns, values, elements, part.scale))
        return packed


def _rate(optimizer: Optimizer | None) -> float | Tensor | None:
    """The largest learning rate of its groups. It may have none, or None where it finds one by itself."""
    groups = () if optimizer is None else optimizer.param_groups
    rates = [rate for group in groups if (rate := group.get("lr")) is not None]
    if len(rates) > 1 and any(
        isinstance(rate, Tensor) for rate in rates
    ):  # not compared here: it would be waited for
        return functools.reduce(torch.maximum, (torch.as_tensor(rate) for rate in rates))
    return max(rates) if rates else None


def _kept(value: float | Tensor) -> float | Tensor:
    """A scalar as it is now, off the graph; one on a device is not waited for."""
    if not isinstance(value, Tensor):
        return float(value)
    return number(value) if value.device.type == "cpu" else value.detach().clone()
