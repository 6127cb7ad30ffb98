"""Watch a training run: statistics of every parameter at every step, without touching it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from isograd.closing import Closing
from isograd.diagnosis import Diagnosis, Finding, diagnose
from isograd.monitor import scaling
from isograd.monitor.clipping import (
    AdaptiveClip,
    clip,
    clip_units,
    clip_units_unread,
    clip_unread,
)
from isograd.monitor.cost import Cost, Pace, Schedule
from isograd.monitor.deep import Deep
from isograd.monitor.detectors import Detectors
from isograd.monitor.host import Host, Record, Sink, bound, reading_of
from isograd.monitor.names import Names
from isograd.monitor.parts import Part
from isograd.monitor.provenance import inner
from isograd.monitor.reading import Reading
from isograd.monitor.replay import OTHERS, Replay
from isograd.monitor.rivals import broke
from isograd.monitor.selftest import silent
from isograd.monitor.sharding import Shards, rank
from isograd.monitor.steps import Steps
from isograd.monitor.tap import Tap
from isograd.monitor.unexamined import together, unexamined
from isograd.record import Run
from isograd.record.row import ELSEWHERE, GUARDED
from isograd.record.verdict import examined
from isograd.warning import warn


def watch(
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer] | None,
    *,
    run: str | PathLike[str] | Record | None = None,
    every: int = 1,
    deep_every: int | None = None,
    replay: bool = False,
    budget: float = 0.01,
    sinks: Sequence[Sink] = (),
) -> Monitor:
    """Watch a training loop: nothing else in it needs to change.

    At each step the raw gradient of each parameter is read (accumulated, unscaled, unclipped, reduced over
    the processes), and what the step did to the weights. It reaches detectors, record and sinks on a
    thread of its own; the training never waits, and stays bitwise the same.

    Args:
        model: the model, wrapped (DDP, compiled) or not.
        optimizer: one of torch's optimizers, or several. None for another kind: call `monitor.step()`.
        run: directory to keep the record in; None keeps none. A run that is there is continued.
        every: keep every so many steps; of the others only those whose gradients are not finite.
        deep_every: measure the flow along the backbone every so many steps, with the batch of that step.
        replay: keep the batch of each step and the gradient of the model's outputs until the next, and where a gradient
            is not finite repeat that step on the side: the operation that made the first NaN or Inf is a finding, with its
            line (NF401, NF402). On a GPU each step then waits for its norms.
        budget: share of the training time that may be spent. The norm of every gradient, and with it
            whether all values are finite, is read at each step; the other columns as often as this
            allows, in the first 10 steps always, and in a step after a call of `latest()`.
        sinks: called with the scalars of each step and its number: `wandb_run.log`, `mlflow.log_metrics` …

    Raises:
        TypeError: an optimizer that is none of torch's.
        ValueError: `every` or `deep_every` below 1, `budget` not above 0.

    Example:
        >>> with isograd.watch(model, optimizer) as monitor:
        ...     for x, y in batches:
        ...         loss = cross_entropy(model(x), y)
        ...         loss.backward()
        ...         optimizer.step()
        ...         optimizer.zero_grad()
        ...         monitor.log(loss=loss)
        >>> print(monitor.diagnosis())
    """
    if every < 1 or (deep_every is not None and deep_every < 1):
        raise ValueError("every and deep_every count steps: give 1 or more")
    if not budget > 0:
        raise ValueError("budget is a share of the training time, such as 0.01: give a number above 0")
    optimizers: list[Any] = [] if optimizer is None else [optimizer]
    if isinstance(optimizer, Sequence):
        optimizers = list(optimizer)
    return Monitor(
        model,
        optimizers,
        run=run,
        every=every,
        deep_every=deep_every,
        replay=replay,
        budget=budget,
        sinks=sinks,
    )


class Monitor(Closing):
    """A watched training: `latest()` and `diagnosis()` tell, `close()` ends it; a context manager.

    Attributes:
        run: where the readings are kept; None: nowhere, or by process 0.
        stepped: steps of all watched optimizers so far, also those that a scaler left out.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Sequence[Optimizer],
        *,
        run: str | PathLike[str] | Record | Callable[[Detectors], Record] | None = None,
        every: int = 1,
        deep_every: int | None = None,
        replay: bool = False,
        budget: float = 0.01,
        sinks: Sequence[Sink] = (),
        known: bool = False,
    ) -> None:
        """`known`: this very model has been trained into this record before."""
        for optimizer in optimizers:
            _free(inner(optimizer))
        _supersede(model, [inner(optimizer) for optimizer in optimizers])
        self._model = model
        self._deep, self._replay = Deep(model, deep_every), Replay(model, replay)
        self._taps: list[Tap] = []
        self._closed = False
        self.stepped = 0
        self._shards = Shards(model.parameters())
        self._silent = silent()
        self._detectors = detectors = Detectors()
        record: Record | None = None
        if rank() == 0:  # the readings are the same in all processes
            if isinstance(run, str | PathLike):
                record = Run.create(Path(run), detectors=detectors)
            else:
                record = run(detectors) if callable(run) else run
        self.run = record
        sinks = [bound(sink) for sink in sinks] if rank() == 0 else []
        self._cost = cost = Cost()
        self._host = Host(detectors, record, sinks, Pace(budget / 2, cost))
        self._schedule = Schedule(every, budget / 2, cost, together=bool(self._shards))
        self._steps = Steps(
            self._host,
            Names(model),
            self._shards,
            self._deep,
            self._replay,
            self._schedule,
            first=record.last + 1 if isinstance(record, Run) else 0,
            known=known,
        )
        for optimizer in optimizers:
            self.add(optimizer)
        if not optimizers:
            self._replay.refused = OTHERS
            self._taps.append(Tap(self, None, lambda: list(model.parameters())))
        self._finalizer = weakref.finalize(self, Host.close, self._host)
        self._deep.prepare(0)
        self._replay.prepare()

    # What the user calls.

    def add(self, optimizer: Optimizer) -> None:
        """Watch another optimizer of the same model; one that is watched already is passed over."""
        optimizer = inner(optimizer)
        if any(tap.optimizer is optimizer for tap in self._taps):
            return
        _free(optimizer)
        self._taps = [tap for tap in self._taps if tap.optimizer is not None]
        self._taps.append(
            Tap(self, optimizer, lambda: [p for group in optimizer.param_groups for p in group["params"]])
        )

    def log(self, **scalars: float | Tensor) -> None:
        """Add scalars to the step: floats, or tensors with one element, which are not waited for.

        What is logged after `optimizer.step()` and before the next backward belongs to the step that ended.
        """
        self._steps.log(scalars)

    def clip_(self, max_norm: float | AdaptiveClip) -> Tensor:
        """Clip the gradients of all watched optimizers to a total norm, as `clip_grad_norm_` does.

        Args:
            max_norm: a number, or an `isograd.AdaptiveClip` that is kept from step to step.

        Returns:
            The raw total norm, as a scalar tensor. It was read for the monitor anyway: unless gradients
            have to be scaled, clipping costs nothing more. Gradients whose norm is not finite are left as
            they are, so that it can be told which of them was it.
        """
        norm: list[Tensor] = []
        self.guarded(lambda: norm.append(clip(self._taps, max_norm, self._shards)))
        # The monitor has failed, or is closed: clipping must not stop with it.
        return norm[0] if norm else clip_unread(self._watched(), max_norm)

    def clip_units_(self, ratio: float = 0.01, *, eps: float = 1e-3) -> Tensor:
        """Clip the gradient of each unit to a share of the norm of its weights: adaptive gradient clipping.

        A unit is a row of a matrix, a filter of a convolution, or a whole vector. `eps` stands for weights that are
        smaller. Heads are usually left out: give them an optimizer of their own that is not watched by this monitor.

        Returns:
            The raw total norm, as a scalar tensor.

        Source: Brock et al. 2021, arXiv:2102.06171.
        """
        norm: list[Tensor] = []
        self.guarded(lambda: norm.append(clip_units(self._taps, ratio, eps, self._shards)))
        return norm[0] if norm else clip_units_unread(self._watched(), ratio, eps)

    def _watched(self) -> list[Tensor]:
        return [p for tap in self._taps for p in tap.parameters()]

    @property
    def model(self) -> nn.Module:
        """The model that is watched."""
        return self._model

    @property
    def optimizers(self) -> list[Optimizer]:
        """Torch's optimizers that are watched."""
        return [tap.optimizer for tap in self._taps if tap.optimizer is not None]

    def left_out(self, why: str, *, restored: bool = False) -> None:
        """A step was not made with the gradients that are there; `restored`: weights and optimizers are older ones again."""
        if not restored:
            self.guarded(self._replay.repeat)
        for tap in self._taps:
            self.guarded(lambda tap=tap: tap.finish(GUARDED + why))
            if restored:
                tap.restored()

    def step(self) -> None:
        """A step has ended: for optimizers that are none of torch's, while the gradients are there."""
        for tap in self._taps:
            if tap.optimizer is None:
                # What was read at the end of the backward knows nothing of what came after.
                self.guarded(tap.take)
                self.guarded(tap.finish)

    def latest(self) -> Reading:
        """The reading of the newest step; waits for it. The next step is read in full.

        Raises:
            RuntimeError: no step has ended yet.
        """
        self._steps.flush(self._taps)
        self._host.drain()
        self._schedule.asked = True
        newest = reading_of(self._host.held) if self._host.held is not None else self._host.newest
        if newest is None:
            raise RuntimeError(
                "no step has ended since the monitor was attached: call latest() after optimizer.step()"
            )
        return newest

    def newest(self) -> Reading | None:
        """The newest reading that is there already, or None; does not wait."""
        return self._host.newest

    def found(self) -> list[tuple[int, Finding]]:
        """What has been found already, each with its step; does not wait."""
        return list(self._host.findings)

    def diagnosis(self) -> Diagnosis:
        """What has been found so far, and what could not be examined; waits for the newest step."""
        self._steps.flush(self._taps)
        self._host.release()
        self._host.drain()
        diagnosis = examined(self._host.findings, self._detectors, flow=self._deep.last)
        if self._deep.last is not None:
            diagnosis = together(diagnosis, diagnose(self._deep.last))
        unknown = unexamined(
            self._model, self._taps, self._schedule.done, self._steps.logged, self._deep, self._silent
        )
        located = any(f.matches(("NF401", "NF402")) for f in diagnosis.findings)
        if not located and (why := self._replay.unexamined):
            unknown["replay"] = why
        return replace(diagnosis, unexamined=unknown | diagnosis.unexamined)

    def close(self) -> None:
        """Stop watching, and write what is waiting. May be called again."""
        if self._closed:
            return
        for tap in self._taps if self._steps.begun else ():
            self.guarded(tap.interrupted)
        self._closed = True
        self._steps.flush(self._taps)
        self._host.release()
        self._deep.disarm()
        self._replay.disarm()
        for tap in self._taps:
            tap.remove()
        self._finalizer()

    @property
    def taken(self) -> bool:
        """The gradients of a step that has not ended were read: a backward that comes now is its closure's again."""
        return any(tap.taken for tap in self._taps)

    # What the taps call, on the training thread.

    def full(self, tap: Tap | None = None) -> bool:
        """Read all columns at this step, of this optimizer? Of one that has stepped it is the next."""
        return self._schedule.full(ahead=self._steps.holds(tap))

    def guarded(self, act: Callable[[], object]) -> None:
        """Do something inside the user's training loop: what fails here is a warning, once, and the end of
        the watching."""
        if self._closed:
            return
        self._cost.enter()
        try:
            act()
        except Exception as error:
            self._closed = True
            for tap in self._taps:
                tap.remove()
            warn(
                f"isograd.watch failed and has stopped watching; the training goes on unchanged. {type(error).__name__}: {error}"
            )
        self._cost.leave()

    def began(self, tap: Tap) -> None:
        """What is logged now belongs to another step than the one that has ended.

        Whether to a new one only the next step of an optimizer tells: a generator's backward reaches the critic too.
        """
        self._steps.begun = True
        self._host.release()

    def stepping(self, part: Part) -> None:
        """Look at the step from inside, if it is the turn of one or if it breaks."""
        if self._replay.left and part.broken:
            if broke(tap.provenance.rivals for tap in self._taps):
                self._replay.left, self._replay.missed = 0, ELSEWHERE
            else:
                self._replay.repeat()
        self._deep.stepping(self._schedule.done)

    def ended(self, tap: Tap, part: Part) -> None:
        """One optimizer has stepped; the step ends when all have, or when one is about to step again."""
        self.stepped += 1
        self._steps.ended(tap, part, self._taps)


def _free(optimizer: Optimizer) -> None:
    """Close the monitor that watches it, and its record with it: a notebook cell is run again."""
    before = scaling.watched(optimizer)
    if isinstance(before, Tap):
        before.owner.close()


def _supersede(model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
    """Close the monitors of this model whose parameters are all in the hands of these optimizers now: the notebook cell that is
    run again makes its optimizer anew. What such a monitor has hung on the model stays there otherwise, with its batches."""
    held = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    owners = {id(tap.owner): tap.owner for tap in scaling.everyone() if isinstance(tap, Tap)}
    for owner in owners.values():
        if isinstance(owner, Monitor) and owner.model is model and held.issuperset(map(id, owner._watched())):
            owner.close()
