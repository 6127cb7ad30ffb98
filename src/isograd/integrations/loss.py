"""The loss that belongs to a gradient, when a step accumulates several backwards."""

from __future__ import annotations

import weakref

from torch import Tensor, nn

from isograd.monitor import Monitor

PROBES = 8
"""Parameters by which a backward is seen to have reached a model: it reaches nearly all of them or none."""


class AccumulatedLoss:
    """Sum of the losses since the last step: what the accumulated gradient is the gradient of.

    A step of fewer backwards than the others, as at the end of an epoch, has the sum that it would have had of as many.
    It keeps neither the monitor nor the model alive.
    """

    def __init__(self, monitor: Monitor, model: nn.Module) -> None:
        self._monitor, self._model = weakref.ref(monitor), weakref.ref(model)
        self.value: Tensor | None = None
        self._count = self._most = 0
        self._stepped = 0
        self._before: tuple[tuple[int, int], ...] = ()

    def before_backward(self) -> None:
        """A new sum begins after a step, which may leave zeros for gradients, and where there are none: a
        batch that the loop has left out."""
        self._before = self._gradients()
        monitor = self._monitor()
        if monitor is not None and (not self._before or self._stepped != monitor.stepped):
            self._most = max(self._most, self._count)
            self.value, self._count, self._stepped = None, 0, monitor.stepped

    def reached(self) -> bool:
        """Whether the backward since `before_backward` reached this model: it left a gradient, or an optimizer that
        steps within the backward has used it up."""
        monitor = self._monitor()
        return self._gradients() != self._before or (monitor is not None and monitor.stepped != self._stepped)

    def add(self, loss: Tensor) -> None:
        """Log the sum with this loss in it; nothing waits for the device.

        A closure may be evaluated many times in a step: its first gradient is read, and its first loss.
        """
        monitor = self._monitor()
        if monitor is None or monitor.taken:
            return
        loss = loss.detach().reshape(())
        self.value = loss if self.value is None else self.value + loss
        self._count += 1
        whole = max(self._most, self._count) / self._count
        monitor.log(loss=self.value if whole == 1 else self.value * whole)

    def _gradients(self) -> tuple[tuple[int, int], ...]:
        """Identity and version of some gradients: a backward changes them."""
        model = self._model()
        trained = [] if model is None else [p for p in model.parameters() if p.requires_grad]
        some = trained[:: max(len(trained) // PROBES, 1)]
        return tuple((id(p.grad), p.grad._version) for p in some if p.grad is not None)
