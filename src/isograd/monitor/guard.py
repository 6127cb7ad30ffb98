"""A training that goes back: steps that would break it are left out, and what broke it is undone at a smaller rate."""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from isograd.closing import Closing
from isograd.monitor import scaling
from isograd.monitor.clipping import AdaptiveClip
from isograd.monitor.curve import Curve
from isograd.monitor.monitor import Monitor, watch
from isograd.monitor.provenance import inner
from isograd.monitor.sharding import local, wide
from isograd.monitor.snapshot import Snapshot, values
from isograd.monitor.tap import Tap
from isograd.warning import warn

BROKEN = 3
"""Steps in a row without a finite loss and gradient: one batch may be odd, of three the weights are to blame."""
LONG = 20
"""Steps left out in a row before that is a warning."""
SETTLED = 16
"""Steps that a snapshot has to be old: what breaks a training begins before its loss shows it."""
MOST = 8
"""Times that the rate is lowered: a training that breaks at 1 / 256 of its rate does not break of its rate."""


_owned: weakref.WeakSet[Monitor] = weakref.WeakSet()
"""Monitors that a guard has started."""


@dataclass(frozen=True)
class Event:
    """What a guard has done."""

    step: int
    """Number of the call of `Guard.step`, from 0, as that of a reading."""
    what: str
    """'left out', 'went back', 'gave back' (the rate), 'went on' (with data that are others) or 'gave up'."""
    why: str
    factor: float
    """Of the learning rate, from then on."""

    @property
    def said(self) -> str:
        rate = f"; learning rate x {self.factor:g}" if self.what not in ("left out", "went on") else ""
        return f"{self.what}, {self.why}{rate}"

    def __str__(self) -> str:
        return f"step {self.step}: {self.said}"


class Guard(Closing):
    """Steps a training, unless that would break it; `guard.step(loss)` stands for `optimizer.step()`.

    A step whose loss or gradient is not finite is left out. After three of them, or once the loss has jumped or
    risen far above where it started (as TR702 and TR703 say), weights and optimizer are those of a snapshot again,
    and all steps are made at half the rate; after `recover` steps without trouble the rate is given back, half by
    half. Until something breaks, the weights are bitwise those of a training without it.

    Args:
        model: as for `isograd.watch`.
        optimizer: one of torch's, or several that step together. Where `isograd.watch` watches them already its monitor is
            taken; otherwise the guard starts one, closed with it.
        max_norm: clips as `monitor.clip_` does: a number, or an `AdaptiveClip`.
        every: steps from one snapshot to the next. Two are kept in host memory, each as large as weights, buffers and
            optimizer state.
        backoff: what the learning rate is multiplied by when the training goes back.
        recover: steps without trouble after which the rate is given back; twice as many each time that this was too early.
        watching: what `isograd.watch` takes (`run`, `sinks`, `replay` …), where the guard starts it.

    Schedulers, data and random generators go on and are not rewound: the batches that broke it do not come again.
    On a device each step waits for its loss and its gradient norm. Several processes decide by the mean of their losses.

    Attributes:
        monitor: reads the gradients.

    Raises:
        TypeError: an optimizer that is none of torch's.
        ValueError: `every` below 16, `recover` below 1, `backoff` not between 0 and 1; the optimizers are watched, with others or
            one by one.

    Example:
        >>> with isograd.Guard(model, optimizer, max_norm=isograd.AdaptiveClip()) as guard:
        ...     for x, y in batches:
        ...         loss = cross_entropy(model(x), y)
        ...         optimizer.zero_grad()
        ...         loss.backward()
        ...         guard.step(loss)
        >>> print(guard)

    Source: snapshots, halved rates and their return are those of ARC 5.2 and of the reports on large runs (Chowdhery et
    al. 2022, PaLM, section 5.1); when to act is isograd's own.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer],
        *,
        max_norm: float | AdaptiveClip = math.inf,
        every: int = 100,
        backoff: float = 0.5,
        recover: int = 500,
        **watching: Any,
    ) -> None:
        if every < SETTLED or recover < 1:
            raise ValueError(
                f"every and recover count steps: give every={SETTLED} or more, recover=1 or more"
            )
        if not 0 < backoff < 1:
            raise ValueError(
                "backoff is what the learning rate is multiplied by, such as 0.5: between 0 and 1"
            )
        optimizers: list[Any] = list(optimizer) if isinstance(optimizer, Sequence) else [optimizer]
        if any(optimizer is None for optimizer in optimizers):
            raise TypeError(
                "a guard steps the optimizers of a training: give it one of torch's, or a list of them"
            )
        if any(group.get("lr") is None for o in optimizers for group in inner(o).param_groups):
            raise ValueError(
                "a guard lowers the learning rate, and an optimizer finds its own: give it one, such as "
                "Adafactor(…, lr=1e-3, relative_step=False)"
            )
        before = _monitor_of(optimizers)
        if before in _owned:  # of a guard whose cell is run again: `watch` closes it
            before = None
        if before is not None and watching:
            raise ValueError(f"the optimizer is watched already: give {', '.join(watching)} to isograd.watch")
        self.monitor, self._own = before or watch(model, optimizers, **watching), before is None
        if self._own:
            _owned.add(self.monitor)
        self._closed = False
        self.max_norm, self.every, self.backoff, self.recover = max_norm, every, backoff, recover
        self.steps = 0
        self.events: list[Event] = []
        """What was done; the newest thousand."""
        self._curve = Curve()
        self._snapshots: list[Snapshot] = []
        self._kept_at = 0
        """Step of the newest snapshot, or of the last time that one was gone back to."""
        self._broken = self._lowered = 0
        self._gone = False
        """Back to a snapshot, and no step has been made since."""
        self._written: set[str] = set()
        """What the optimizers' steps have changed in their groups: their own state, and none of a schedule's."""
        self._calm_since, self._wait, self._given_back = 0, recover, False

    def close(self) -> None:
        """Let go of the snapshots, and end the watching that the guard has begun. May be called again."""
        self._snapshots, self._closed = [], True
        if self._own:
            self.monitor.close()

    @property
    def factor(self) -> float:
        """What the learning rates of the optimizers are multiplied by in a step."""
        return self.backoff**self._lowered

    def step(self, loss: float | Tensor | None, *, scaler: GradScaler | None = None) -> bool:
        """Step all watched optimizers, or leave the step out, or go back. Were they stepped?

        Args:
            loss: of this step, one element; of accumulated micro-batches their mean. It is logged as `loss`. It need not be
                the one that is differentiated: of terms whose weights grow give the sum without weights. None where no
                loss tells how well the model does, as of GANs and rewards: the gradients alone decide then.
            scaler: of mixed precision. `unscale_`, `step` and `update` are called here: an overflow of the gradient is
                the scaler's own matter, and no sign of a training that breaks.

        Raises:
            ValueError: `loss` has several elements.
            RuntimeError: the guard is closed.
        """
        if self._closed:
            raise RuntimeError("this guard is closed: step within its with block, or make another")
        if scaler is not None and not scaler.is_enabled():
            scaler = None
        if not self._snapshots:
            self._keep()
        if scaler is not None:
            for optimizer in self.monitor.optimizers:
                scaler.unscale_(optimizer)
        value, norm = _together(0.0 if loss is None else loss, self.monitor.clip_(self.max_norm))
        if loss is not None:
            self.monitor.log(loss=value)
        self.steps += 1
        if not math.isfinite(value):
            stepped = self._left_out(f"the loss is {value:g}")
        elif not math.isfinite(norm) and scaler is None:
            stepped = self._left_out(f"the gradient norm is {norm:g}")
        elif self._gone and self._curve.jumps(value):
            stepped = self._left_out(f"the loss is {value:.3g}", finite=True)
        else:
            self._broken, self._gone = 0, False
            why = ""
            if loss is not None:
                self._curve.add(value, norm)
                why = self._curve.lost(self._before(SETTLED).losses)
            stepped = not (why and self._goes_back(why))
        if stepped:
            self._take(scaler)
            self._settle()
        if scaler is not None:
            scaler.update()
        return stepped

    def _take(self, scaler: GradScaler | None) -> None:
        """Make the step, at a share of the learning rates that no scheduler sees."""
        optimizers = self.monitor.optimizers
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        rates = [group["lr"] for group in groups]
        before = [values(group) for group in groups]
        try:
            if self.factor < 1:
                for group, rate in zip(groups, rates, strict=True):
                    group["lr"] = rate * self.factor
            for optimizer in optimizers:
                if scaler is None:
                    optimizer.step()
                else:
                    scaler.step(optimizer)
            for group, held in zip(groups, before, strict=True):
                self._written |= {name for name, value in values(group).items() if value != held.get(name)}
        finally:
            if self.factor < 1:
                for group, rate in zip(groups, rates, strict=True):
                    group["lr"] = rate

    def _left_out(self, why: str, *, finite: bool = False) -> bool:
        """Nothing is changed by it. Of several in a row the step before them may be to blame; if that was undone, and no step
        has been made since, it was not: the rate is given back, and what breaks is left out for as long as it comes."""
        self._broken += 1
        if self._gone and self._broken != LONG:
            if self.events[-1].what == "went back":
                self._raise(f"{why} at weights whose loss was well: the batch is to blame")
                self._broken = 1
        elif self._broken == BROKEN and self._goes_back(f"{why}, as in the {BROKEN - 1} steps before"):
            return False
        self._snapshots[-1].mend()
        self._note("left out", why)
        if self._broken == LONG and finite:
            self._is_another(why)
        elif self._broken == LONG:
            self._is_stuck(why)
        self.monitor.left_out(self.events[-1].said, restored=self._broken == LONG and not finite)
        return False

    def _is_another(self, why: str) -> None:
        """Weights whose loss was well have another now, and keep it: other data, or another objective."""
        self._curve, self._gone, self._broken = Curve(), False, 0
        self._note("went on", f"{why}, as for {LONG} steps, at weights whose loss was well")
        warn(
            f"isograd.Guard has left out {LONG} steps in a row, the newest is {self._number}: {why} at weights whose loss was "
            "well, so the data or the objective is another. It goes on with it. Where the loss rises on purpose, give the "
            "guard one that does not, or none: guard.step(None)",
        )

    def _is_stuck(self, why: str) -> None:
        """Nothing but what breaks: an older snapshot is the last that may help. What then comes is taken as it is, if it is a
        number."""
        snapshot = self._restore(self.steps - self._snapshots[0].step)
        self._curve, self._gone = Curve(), False
        self._note("went back", f"to step {snapshot.step}: {LONG} steps in a row were left out")
        warn(
            f"isograd.Guard has left out {LONG} steps in a row, the newest is {self._number}: {why}. It went back to step "
            f"{snapshot.step}, and goes on. isograd.find_nonfinite(model, loss) names what is not finite",
        )

    def _goes_back(self, why: str) -> bool:
        """To the newest snapshot that was there before the trouble; False: that has not helped, and is not done again."""
        if self._lowered >= MOST:
            if self.events[-1].what != "gave up":
                self._note("gave up", f"{why}; a lower rate is no help")
                warn(
                    f"isograd.Guard went back {MOST} times and gives up at step {self._number}: {why}. A lower learning rate is "
                    "no help: isograd.check(model, loss) looks for the cause",
                )
            return False
        snapshot = self._restore(SETTLED)
        if self._given_back and self.steps - self._calm_since < self._wait:
            self._wait *= 2
        self._lowered, self._given_back = self._lowered + 1, False
        self._calm_since = self.steps
        self._gone = True
        self._note("went back", f"to step {snapshot.step}: {why}")
        self.monitor.left_out(self.events[-1].said, restored=True)
        return True

    def _restore(self, age: int) -> Snapshot:
        snapshot = self._before(age)
        snapshot.restore(self._written)
        self._snapshots = self._snapshots[: self._snapshots.index(snapshot) + 1]
        self._curve.losses, self._curve.norms = list(snapshot.losses), list(snapshot.norms)
        self._kept_at = self.steps
        return snapshot

    def _before(self, age: int) -> Snapshot:
        """The newest snapshot that is so many steps old, or the oldest."""
        old = [snapshot for snapshot in self._snapshots if self.steps - snapshot.step >= age]
        return (old or self._snapshots[:1])[-1]

    def _settle(self) -> None:
        """Another step without trouble: give the rate back, take a snapshot."""
        if self.factor < 1 and self.steps - self._calm_since >= self._wait:
            self._raise(f"after {self._wait} steps without trouble")
            self._given_back = True
        if self.steps - self._kept_at >= self.every and self._curve.calm:
            self._keep()

    def _raise(self, why: str) -> None:
        self._lowered, self._calm_since = self._lowered - 1, self.steps
        self._note("gave back", why)

    def _keep(self) -> None:
        self._snapshots = self._snapshots[-1:]  # before there is another: never three in memory
        self._snapshots.append(Snapshot(self.steps, self.monitor, self._curve.losses, self._curve.norms))
        self._kept_at = self.steps

    @property
    def _number(self) -> int:
        """Of this call, from 0."""
        return self.steps - 1

    def _note(self, what: str, why: str) -> None:
        self.events = [*self.events[-999:], Event(self._number, what, why, self.factor)]

    def state_dict(self) -> dict[str, Any]:
        """What a training that is resumed needs to know, as plain values; the snapshots are not in it."""
        clip = self.max_norm.state_dict() if isinstance(self.max_norm, AdaptiveClip) else None
        return {
            "steps": self.steps,
            "lowered": self._lowered,
            "calm_since": self._calm_since,
            "wait": self._wait,
            "given_back": self._given_back,
            "losses": list(self._curve.losses),
            "first": list(self._curve.first),
            "norms": list(self._curve.norms),
            "first_norm": self._curve.first_norm if self._curve.norms else None,
            "clip": clip,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict()`; a snapshot is taken before the next step."""
        self.steps, self._lowered = state["steps"], state["lowered"]
        self._calm_since, self._wait = state["calm_since"], state["wait"]
        self._given_back = state["given_back"]
        first_norm = math.nan if state["first_norm"] is None else state["first_norm"]
        self._curve = Curve(list(state["losses"]), list(state["first"]), list(state["norms"]), first_norm)
        if isinstance(self.max_norm, AdaptiveClip) and state["clip"] is not None:
            self.max_norm.load_state_dict(state["clip"])
        self._snapshots, self._kept_at = [], self.steps

    def __repr__(self) -> str:
        head = f"Guard: {self.steps} steps, learning rate x {self.factor:g}"
        return "\n".join([head, *(f"  {event}" for event in self.events)])


def _monitor_of(optimizers: Sequence[Optimizer]) -> Monitor | None:
    """The monitor that watches these optimizers, and no others."""
    taps = [scaling.watched(inner(optimizer)) for optimizer in optimizers]
    owners = {id(tap.owner): tap.owner for tap in taps if isinstance(tap, Tap)}
    if not owners:
        return None
    owner, *others = owners.values()
    if not isinstance(owner, Monitor) or others or len(owner.optimizers) != len(optimizers):
        raise ValueError(
            "a guard steps all optimizers that are watched together: give it those, in one isograd.watch, or none that is watched"
        )
    return owner


def _together(loss: float | Tensor, norm: Tensor) -> tuple[float, float]:
    """Loss and norm as numbers; of several processes the mean loss, and no finite norm if one has none."""
    value = loss.detach() if isinstance(loss, Tensor) else torch.tensor(loss, dtype=torch.float64)
    if value.numel() != 1:
        raise ValueError(f"a loss is one number: this one has the shape {tuple(value.shape)}")
    dtype = wide(norm.device)  # and to it before to the device: none but the host may have what `value` is of
    both = torch.stack((local(value).to(dtype).to(norm.device).reshape(()), norm.detach().to(dtype)))
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(both)
        both = both / distributed.get_world_size()
    value, length = both.tolist()
    return value, length
