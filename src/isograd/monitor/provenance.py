"""When the gradients of an optimizer are raw: accumulated, reduced, unscaled and not yet clipped.

Nothing marks that moment. What there is: the end of each backward, the optimizer's step, and the version
counters of the gradients, which tell whether anything wrote to them in between.

- Untouched since the last backward: they are raw at the step, and are read there, once.
- Touched (clipping by whatever function): from then on they are read at the end of the backward.
- `GradScaler.unscale_` touches them too; it is told of, and the gradients are as raw after as before.
- An optimizer that steps in a hook of its parameters does so within the backward: its gradients are read there, and the
  end of that backward is none of the next step's.
- A step with a closure runs its backward inside: the closure is wrapped, and its first gradient taken.

The first steps are read at the end of the backward, so that clipping is noticed before anything is lost.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Variable
from torch.optim import Optimizer

from isograd.monitor.rivals import Rivals
from isograd.monitor.sharding import is_sharded

LEARNING = 3
"""Steps in which every parameter is listened to; after them, only the one that comes last in a backward."""

Versions = tuple[tuple[int, int], ...]


class Provenance:
    """Follows the gradients of one set of parameters from the backward to the step.

    Attributes:
        read_early: gradients were written to before a step: read them at the end of the backward.
        backwards: backward passes since the last step.
        unversioned: the version counters do not tell (torch's multi-tensor functions leave those of DTensors
            as they are): read at the end of every backward.
        added_up: the gradients of the step before were there at each backward since; asked in the first steps only.
        rivals: others whose loss runs through these parameters.
    """

    def __init__(self, parameters: Callable[[], Sequence[Tensor]], ended: Callable[[], None]) -> None:
        """`parameters()` are those that are followed; `ended()` is called at the end of each backward that
        reached one of them."""
        self._parameters = parameters
        self._ended = ended
        self._hooks: list[Any] = []
        self._listened: list[Tensor] = []
        self._last: weakref.ref[Tensor] | None = None
        self._task, self._stepped_in = -1, -2
        self._versions: Versions | None = None
        self._counts: deque[int] = deque(maxlen=8)
        self._steps = 0
        self.rivals = Rivals()
        self.read_early = False
        self.unversioned = any(is_sharded(p) for p in parameters())
        self.backwards = self._taken_after = 0
        self.added_up = False
        self._left: list[tuple[weakref.ref[Tensor], tuple[int, int]]] = []
        """Parameters in the order in which their gradients came, and the versions of these as the step left them."""
        self._heard: list[weakref.ref[Tensor]] = []
        """Parameters whose gradients came since the last step, in their order; in the first steps only."""
        self.listen(parameters())

    def listen(self, parameters: Sequence[Tensor]) -> None:
        """Hear of the backward from these parameters only."""
        self.remove()
        self._counts.clear()  # with reentrant checkpoints fewer parameters hear of fewer backwards
        self._listened = [p for p in parameters if p.requires_grad]
        hook = self._hook()
        self._hooks = [p.register_post_accumulate_grad_hook(hook) for p in self._listened]

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._listened = [], []

    def close(self) -> None:
        """Hear of nothing any more."""
        self.remove()
        self.rivals.close()
        self._ended = _nothing

    @property
    def learning(self) -> bool:
        return self._steps < LEARNING

    @property
    def early(self) -> bool:
        """The gradients are to be read at the end of this backward: it may be the last before the step."""
        return self.learning or self.read_early or self.unversioned

    @property
    def complete(self) -> bool:
        """As many backward passes as a step has had; an epoch may end with fewer."""
        return self.backwards >= min(self._counts, default=1)

    @property
    def touched(self) -> bool:
        """Something wrote to the gradients since the last backward; None was noticed: not known, False."""
        return self._versions is not None and self._versions != self._now()

    def settle(self) -> None:
        """What was done to the gradients is known: take them as they are now."""
        if self._versions is not None:
            self._versions = self._now()

    def taken(self) -> None:
        """The gradients of this step have been taken; a closure may run its backward again."""
        self._taken_after = self.backwards
        self.settle()

    def stepped(self) -> None:
        """A step has ended: what follows belongs to the next."""
        if self.backwards:
            self._counts.append(self._taken_after or self.backwards)
        elif self._last is not None and not stepping_inside():  # it had no gradient: listen to all again
            self._steps, self._last = 0, None
            self.listen(self._parameters())
        self.backwards, self._taken_after, self._versions = 0, 0, None
        self.rivals.stepped(self._task)
        self._stepped_in = torch._C._current_graph_task_id() if stepping_inside() else -2
        self._steps += 1
        last = self._last() if self._last is not None else None
        self.added_up = False
        self._left = _versions(self._heard) if self.learning else []
        self._heard.clear()
        if self._steps == LEARNING and last is not None:
            self.listen([last])

    def _now(self) -> Versions:
        return tuple(_version(p) for p in self._listened)

    def _hook(self) -> Callable[[Tensor], None]:
        weak = weakref.ref(self)

        def hook(parameter: Tensor) -> None:
            self = weak()
            if self is None or torch.compiler.is_compiling():
                return
            task = torch._C._current_graph_task_id()  # a flag would stay set after a backward that raised
            if task == self._stepped_in:
                return
            self._last = weakref.ref(parameter)
            if self.learning:
                self._heard.append(self._last)
            if task != self._task:
                self.rivals.began(parameter, self._task)
                self._task = task
                self._begins(parameter)
                queue: Any = Variable._execution_engine
                # Twice: DDP and FSDP queue the end of their own reduction in the same backward.
                queue.queue_callback(lambda: queue.queue_callback(self._end))

        return hook

    def _begins(self, reached: Tensor) -> None:
        """The first gradient of a backward is there. One that comes last is still as the step has left it, unless it was
        cleared: written to, or taken away. `p.grad.data.zero_()` leaves no trace but zeros; before heads and adapters that
        start as zeros all others are zero too.

        A reentrant checkpoint is a backward within another: what came last before still does."""
        if not self._left or self.unversioned:
            self.added_up = False
            return
        last, version = self._left[-1][0](), self._left[-1][1]
        if last is None or last is reached:
            return
        if _version(last) != version:
            self.added_up, self._left = False, []
        else:  # only here are values looked at, which waits for a device
            there = ((ref(), version) for ref, version in reversed(self._left))
            self.added_up = any(p is not None and _version(p) == version and _any(p) for p, version in there)

    def _end(self) -> None:
        if self._task == self._stepped_in:  # nothing of this backward is left for the next step
            return
        self.backwards += 1
        self._versions = self._now()
        self.rivals.ended(self._listened)
        if self.added_up:  # the next micro-batch finds them as this one leaves them
            self._left = _versions([ref for ref, _ in self._left])
        self._ended()


def stepping_inside() -> bool:
    """A backward is running: the optimizer steps in a hook of its parameters, as each gradient comes."""
    return torch._C._current_graph_task_id() >= 0


def _nothing() -> None: ...


def _versions(parameters: Sequence[weakref.ref[Tensor]]) -> list[tuple[weakref.ref[Tensor], tuple[int, int]]]:
    return [(ref, _version(p)) for ref in parameters if (p := ref()) is not None]


def _any(parameter: Tensor) -> bool:
    """Has it a gradient that is not zero?"""
    gradient = parameter.grad
    if gradient is None:
        return False
    return bool((gradient._values() if gradient.is_sparse else gradient).any())


def _version(parameter: Tensor) -> tuple[int, int]:
    gradient = parameter.grad
    if gradient is None:
        return 0, 0
    return id(gradient), gradient._version


class Closure:
    """A step's closure that tells when its first evaluation has left a gradient."""

    def __init__(self, closure: Callable[[], Any], evaluated: Callable[[], None]) -> None:
        self._closure = closure
        self._evaluated = evaluated
        self._first = True

    def __call__(self) -> Any:
        loss = self._closure()
        if self._first:
            self._first = False
            self._evaluated()
        return loss


def inner(optimizer: Any) -> Optimizer:
    """torch's optimizer inside the wrappers of Accelerate, Fabric and Lightning.

    Raises:
        TypeError: there is none.
    """
    while isinstance(wrapped := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = wrapped
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"watch takes optimizers of torch, this is a {type(optimizer).__name__}: "
            "pass optimizer=None, and call monitor.step() after each step while the gradients are there"
        )
    return optimizer
