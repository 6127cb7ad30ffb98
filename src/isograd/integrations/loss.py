"""The loss that belongs to a gradient, when a step accumulates several backwards."""

from __future__ import annotations

from torch import Tensor, nn

PROBES = 8
"""Parameters by which a backward is seen to have reached a model: it reaches nearly all of them or none."""


class AccumulatedLoss:
    """Sum of the losses since the gradients were cleared: what the accumulated gradient is the gradient of."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.value: Tensor | None = None
        self._before: tuple[tuple[int, int], ...] = ()

    def before_backward(self) -> None:
        """Look at the gradients; when there are none, a new step begins, also after one that overflowed."""
        self._before = self._gradients()
        if not self._before:
            self.value = None

    def reached(self) -> bool:
        """Whether the backward since `before_backward` reached this model."""
        return self._gradients() != self._before

    def add(self, loss: Tensor) -> Tensor:
        """The sum with this loss in it, as a tensor without dimensions; nothing waits for the device."""
        loss = loss.detach().reshape(())
        self.value = loss if self.value is None else self.value + loss
        return self.value

    def _gradients(self) -> tuple[tuple[int, int], ...]:
        """Identity and version of some gradients: a backward changes them."""
        trained = [p for p in self.model.parameters() if p.requires_grad]
        some = trained[:: max(len(trained) // PROBES, 1)]
        return tuple((id(p.grad), p.grad._version) for p in some if p.grad is not None)
