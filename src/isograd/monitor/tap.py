"""One optimizer under watch: reads its gradients when they are raw and its weights when it has stepped."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from isograd.monitor import scaling
from isograd.monitor.parts import Part, Reader, idle
from isograd.monitor.provenance import Closure, Provenance, stepping_inside
from isograd.monitor.reading import ADDED_UP, CLEARED
from isograd.monitor.sharding import local
from isograd.monitor.statistics import norms
from isograd.monitor.updates import Moved, Sampled

CLIPPED = (
    "clipped before they were read: something wrote to the gradients after the backward; from the next step "
    "on they are read before that"
)
UNHEARD = (
    "no backward was heard of before this step: whether anything wrote to the gradients since, such as clipping, "
    "is not known"
)


INTERRUPTED = "interrupted: the training ended between its last backward and the step"


class Watcher(Protocol):
    """What a tap tells its monitor."""

    def close(self) -> None:
        """Stop watching."""
        ...

    def full(self, tap: Tap) -> bool:
        """Should this step be read in full?"""
        ...

    def guarded(self, act: Callable[[], object]) -> None:
        """Do something in the user's training loop that must not raise there."""
        ...

    def began(self, tap: Tap) -> None:
        """A backward has ended, or gradients are taken for a step."""
        ...

    def stepping(self, part: Part) -> None:
        """The optimizer is about to step with these gradients: the weights are still those of the backward."""
        ...

    def ended(self, tap: Tap, part: Part) -> None:
        """A step has ended, or was left out."""
        ...


class Tap:
    """Follows one optimizer, or the parameters of a model that none of torch's optimizers steps."""

    def __init__(
        self, watcher: Watcher, optimizer: Optimizer | None, parameters: Callable[[], Sequence[Tensor]]
    ) -> None:
        self.optimizer, self.owner = optimizer, watcher
        self._watcher, self.parameters = watcher, parameters
        self._reader = Reader(parameters)
        self._part: Part | None = None
        self._read_at = 0
        self.scale: Tensor | None = None
        self.taken = False
        """The gradients of this step were read."""
        self._in_scaler = False
        self._stepped = False
        self.captured = False
        """A step went into a CUDA graph: what is replayed is not seen."""
        self.clipped: Tensor | float | None = None
        self._fresh: bool | None = None
        """The optimizer had no state before its first step; None: there was none yet."""
        self._moved = Moved(optimizer) if optimizer is not None else None
        self._sampled = Sampled()
        self.provenance = Provenance(parameters, self._backward_ended)
        self._handles: list[Any] = []
        if optimizer is not None:
            self._handles = [
                optimizer.register_step_pre_hook(self._pre),
                optimizer.register_step_post_hook(self._post),
            ]
            scaling.add(optimizer, self)

    def remove(self) -> None:
        """Leave the optimizer and its parameters as they were, and hold on to the watcher no longer: a model that
        is let go is freed at once."""
        self.provenance.close()
        self._watcher = self.owner = weakref.proxy(self._watcher)
        for handle in self._handles:
            handle.remove()
        if self.optimizer is not None:
            scaling.remove(self.optimizer)

    @property
    def exact(self) -> bool:
        """The size of its updates is known in closed form."""
        return self._moved is not None and self._moved.known

    @property
    def begins(self) -> bool | None:
        """Its training has begun here, and was not loaded from a checkpoint: the first step has made its state. None: of
        one that never has any, as of plain SGD, this is not known."""
        if self._fresh is False:
            return False
        return True if self.optimizer is not None and self.optimizer.state else None

    # What the training loop does, in the order in which it happens.

    def _backward_ended(self) -> None:
        if not self._captures():
            self._watcher.guarded(self._after_backward)

    def _after_backward(self) -> None:
        self._watcher.began(self)
        if self.provenance.early and not self.taken:  # a closure may run its backward many times
            # All columns only where more of the step is not to be expected: micro-batches are read for the norm.
            self._read(self.provenance.complete)

    def clipped_to(self, norm: Tensor) -> None:
        """The monitor itself has clipped the gradients."""
        self.clipped = norm
        self.provenance.settle()

    def unscaling(self) -> None:
        self._watcher.guarded(self.take if self.provenance.touched else lambda: None)

    def unscaled(self, scale: Tensor | None) -> None:
        def act() -> None:
            if scale is not None:
                self._scaled(self._part, scale)
            self.provenance.settle()

        self._watcher.guarded(act)

    def _scaled(self, part: Part | None, scale: Tensor) -> None:
        """The factor that the gradients have had until now: those that were read, and what they were clipped to."""
        if self.scale is None and self.clipped is not None:
            self.clipped = self.clipped / scale
        self.scale = scale.clone()  # the scaler updates it in place
        if part is not None and part.scale is None:
            part.scale = self.scale

    def scaler_stepping(self) -> None:
        if self.provenance.touched:
            self._watcher.guarded(self.take)
        self._in_scaler, self._stepped = True, False

    def scaler_stepped(self) -> None:
        self._in_scaler = False
        if not self._stepped:
            self._watcher.guarded(lambda: self.finish("overflow: the optimizer did not step"))

    def _pre(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or self._captures():
            return None
        closure = None
        if args or kwargs:
            closure = kwargs.get("closure") or next((a for a in args if callable(a)), None)
        if closure is None:
            self._watcher.guarded(self._before_step)
            return None
        wrapped = Closure(closure, lambda: self._watcher.guarded(self._before_step))
        if "closure" in kwargs:
            return args, {**kwargs, "closure": wrapped}
        return tuple(wrapped if a is closure else a for a in args), kwargs

    def _captures(self) -> bool:
        captures = capturing()
        self.captured |= captures
        return captures

    def _before_step(self) -> None:
        if self._fresh is None and self.optimizer is not None:
            self._fresh = not self.optimizer.state
        part = self.take()
        self._watcher.stepping(part)
        if part.full and self._moved is not None and not self._moved.known:
            self._sampled.before(part.parameters)

    def _post(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if torch.compiler.is_compiling() or self._captures():
            return
        self._stepped = True
        self._watcher.guarded(self.finish)

    # Reading.

    def take(self) -> Part:
        """The raw gradients of this step: read now, or kept from the end of the backward."""
        part = self._part if self.taken and self._part is not None else self._take()
        fused = getattr(self.optimizer, "grad_scale", None)  # a fused optimizer unscales as it steps
        if fused is not None and part.scale is None:
            self._scaled(part, fused)
        return part

    def current(self) -> Part:
        """The gradients as they are now: the raw ones, unless something wrote to them since."""
        touched = self.provenance.touched
        raw = self.take()
        return self._reader.read(full=False) if touched else raw

    def _take(self) -> Part:
        provenance = self.provenance
        self._watcher.began(self)
        touched = provenance.touched and not self._in_scaler
        part = self._part
        if part is None or self._read_at != provenance.backwards:
            part = self._read(whole=True)
            if touched and part.buckets:
                part.notes.append(CLIPPED)
            if part.buckets and not provenance.backwards and not stepping_inside():
                part.notes.append(UNHEARD)
        if provenance.added_up:
            part.notes.append(ADDED_UP)
        if touched:
            provenance.read_early = True
            if all(p.grad is None for p in self.parameters()):
                part.notes.append(CLEARED)
                self.clipped = 0.0
            elif part.full and self.clipped is None:
                self.clipped = _norm(part)
        provenance.taken()
        self.taken = True
        return part

    def _read(self, whole: bool) -> Part:
        self._part = self._reader.read(self._watcher.full(self) and whole)
        self._read_at = self.provenance.backwards
        return self._part

    def finish(self, note: str = "") -> None:
        """The step has ended: add what it did to the weights, and hand over."""
        part = self._part if self._part is not None else self.take()
        if note:
            part.notes.append(note)
        if self._moved is not None:
            self._moved.taken += not note
        if part.full and note != INTERRUPTED:
            with torch.no_grad():
                for bucket in part.buckets:
                    bucket.rows["weight_norm"] = norms(bucket.weights)
                    if self._moved is not None:
                        bucket.rows["update_norm"] = self._updates(bucket.parameters, made=not note)
        if part.full or (not part.buckets and self._watcher.full(self)):
            with torch.no_grad():
                part.buckets += idle(self.parameters(), self._moved is not None)
        self._watcher.ended(self, part)
        if not note:
            self.provenance.rivals.broke = any(bucket.suspicious for bucket in part.buckets)
        self._part, self.scale, self.clipped, self.taken = None, None, None, False
        self.provenance.stepped()

    def _updates(self, parameters: Sequence[Tensor], made: bool) -> list[Tensor]:
        """NaN for a step that was left out: the state is that of an older one, or there is none yet."""
        if not made or self._moved is None:
            return [torch.full((), math.nan, device=p.device) for p in parameters]
        if not self._moved.known:
            return self._sampled.norms(parameters)
        stepped = [p for p in parameters if p.grad is not None]  # an optimizer passes over the others
        lengths = iter(self._moved.norms(stepped) if stepped else ())
        return [torch.zeros((), device=p.device) if p.grad is None else next(lengths) for p in parameters]

    def restored(self) -> None:
        """The optimizer's state is an older one: its steps are counted anew."""
        self.provenance.rivals.broke = False
        if self._moved is not None:
            self._moved.restored()

    def interrupted(self) -> None:
        """The training is over. A backward that no step followed counts if its gradients are not finite: a clip that
        raises on them, or the script itself, has then ended it."""
        if not self.provenance.backwards or self._in_scaler:
            return
        part = self.take()
        if part.sharded:  # not every process may come here, and the others would be waited for
            return
        if part.broken:
            self.finish(INTERRUPTED)


def _norm(part: Part) -> Tensor | None:
    """Norm of the gradients as they are now; None across devices, where it would have to be waited for."""
    if len({bucket.gradients[0].device for bucket in part.buckets}) != 1:
        return None
    with torch.no_grad():
        now = [[local(p.grad) for p in b.parameters if p.grad is not None] for b in part.buckets]
        return torch.stack([torch.stack(norms(gradients)).norm() for gradients in now if gradients]).norm()


def capturing() -> bool:
    """A CUDA graph is being captured: Python does not run when it is replayed."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
