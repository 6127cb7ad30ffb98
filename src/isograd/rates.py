"""The largest learning rate that still lowers the loss, from a handful of forward passes.

Along the step that an optimizer would take from here, L(eta) falls and then rises again. Where it is back at L(0), a
plain quadratic has eta = 2 / lambda, lambda the curvature along the step: gradient descent beyond it diverges along
this direction. 2 / eta is the critical sharpness (arXiv:2601.16979): no Hessian, no training.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from isograd.graph.preserve import copied, preserved

Loss = Callable[[nn.Module], Tensor]
Direction = Callable[[Tensor], Tensor]
MOST = 40
"""Doublings of the step: 12 decades of learning rates."""
BISECTIONS = 3
"""Halvings of the last doubling in log space: the answer is within 9%."""


def gradient_descent(gradient: Tensor) -> Tensor:
    """The step of SGD for a learning rate of 1."""
    return gradient


def adam(gradient: Tensor) -> Tensor:
    """The first step of Adam and its kin for a learning rate of 1: the gradient's sign."""
    return gradient.sign()


@dataclass(frozen=True, slots=True)
class Critical:
    """What a search along one direction found."""

    rate: float
    """Learning rate at which the loss is back at where it started; inf: it never came back."""
    forwards: int
    loss: float

    @property
    def sharpness(self) -> float:
        """2 / rate: the curvature along the step, were the loss a quadratic."""
        return 2 / self.rate


def critical_rate(model: nn.Module, loss: Loss, direction: Direction = gradient_descent) -> Critical:
    """The learning rate at which one step along `direction` no longer lowers the loss.

    Args:
        model: not touched: a copy is stepped.
        loss: of one batch. Random layers see the same random numbers at every length of step.
        direction: what the optimizer makes of a gradient, as `gradient_descent` or `adam`.

    Returns:
        The rate, with the number of forward passes it took (about 15, and one backward).

    Raises:
        ValueError: the loss or its gradient is not finite, or the gradient is exactly zero.
    """
    with preserved(model):
        stepped = copied(model)
        start = [p.detach().clone() for p in stepped.parameters() if p.requires_grad]
        moving = [p for p in stepped.parameters() if p.requires_grad]
        torch.manual_seed(0)
        value = loss(stepped)
        gradients = torch.autograd.grad(value, moving, allow_unused=True, materialize_grads=True)
        steps = [direction(gradient) for gradient in gradients]
        slope = sum(float((g.double() * s.double()).sum()) for g, s in zip(gradients, steps, strict=True))
        first = float(value.detach())
        if not math.isfinite(first) or not math.isfinite(slope):
            raise ValueError("the loss or its gradient is not finite: there is no step to try")
        if slope <= 0:
            raise ValueError("the gradient is exactly zero: there is no step to try")
        forwards = 1

        def rises(rate: float) -> bool:
            nonlocal forwards
            forwards += 1
            with torch.no_grad():
                for p, origin, step in zip(moving, start, steps, strict=True):
                    p.copy_(origin - rate * step)
                torch.manual_seed(0)
                return not float(loss(stepped)) < first

        # A step that should lower the loss by a thousandth is in the linear range; rounding must not hide it.
        low, high = 0.0, 1e-3 * max(abs(first), 1e-6) / slope
        for _ in range(MOST):
            if rises(high):
                break
            low, high = high, 2 * high
        else:
            return Critical(math.inf, forwards, first)
        if low == 0.0:  # beyond already: come back from above
            while low == 0.0 and forwards < MOST:
                high /= 2
                low = 0.0 if rises(high) else high
            high = 2 * low if low else high
        for _ in range(BISECTIONS if low else 0):
            middle = math.sqrt(low * high)
            low, high = (low, middle) if rises(middle) else (middle, high)
        return Critical(math.sqrt(low * high) if low else 0.0, forwards, first)
