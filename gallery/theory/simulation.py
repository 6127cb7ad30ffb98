"""Draw a chain of operations with random weights and measure it with autograd: an oracle for `isograd.theory`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from isograd import theory


@dataclass(frozen=True)
class Simulated:
    """One draw: what each operation did, input first."""

    mean_square: tuple[float, ...]
    """Of each operation's output."""
    decades: tuple[float, ...]
    """log10 of gradient norm at each operation's input over that at its output."""

    @property
    def total(self) -> float:
        return sum(self.decades)


def simulate(
    chain: Sequence[theory.Operation], x: Tensor, seed: int, cotangent: Tensor | None = None
) -> Simulated:
    """Draw the weights of a chain, send x: (sample, unit) through it and a random gradient back, in x's precision."""
    generator = torch.Generator().manual_seed(seed)
    course = [x.detach().requires_grad_()]
    for operation in chain:
        course.append(_forward(operation, course[-1], generator))
    if cotangent is None:
        cotangent = torch.randn(course[-1].shape, dtype=x.dtype, generator=generator)
    gradients = torch.autograd.grad(course[-1], course, cotangent)
    norms = torch.stack([gradient.double().norm() for gradient in gradients]).log10()
    return Simulated(
        tuple(float(h.detach().double().square().mean()) for h in course[1:]),
        tuple((norms[:-1] - norms[1:]).tolist()),
    )


def _forward(operation: theory.Operation, h: Tensor, generator: torch.Generator) -> Tensor:
    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=h.dtype, generator=generator)

    match operation:
        case theory.Linear():
            weight = normal(operation.fan_out, operation.fan_in)
            if operation.orthogonal:
                weight = torch.linalg.qr(weight).Q * operation.fan_in**0.5
            bias = operation.bias_std * normal(operation.fan_out)
            return F.linear(h, operation.weight_std * weight, bias)
        case theory.Elementwise():
            phi = operation.phi
            return theory.NAMES[phi](h) if isinstance(phi, str) else phi(h)
        case theory.LayerNorm():
            return operation.weight * F.layer_norm(h, h.shape[-1:], eps=operation.eps)
        case theory.RMSNorm():
            return operation.weight * F.rms_norm(h, h.shape[-1:], eps=operation.eps)
        case theory.BatchNorm():
            return operation.weight * F.batch_norm(h, None, None, training=True, eps=operation.eps)
        case theory.Dropout():
            keep = torch.rand(h.shape, dtype=h.dtype, generator=generator) >= operation.p
            return h * keep / (1 - operation.p)
        case theory.Residual():
            inner = h
            for inside in operation.branch:
                inner = _forward(inside, inner, generator)
            return operation.skip * h + operation.scale * inner
        case _:
            raise NotImplementedError(type(operation).__name__)


def dense(
    phi: theory.Phi, layers: int, width: int, sigma_w: float, sigma_b2: float = 0.0
) -> list[theory.Operation]:
    """Layers of phi then weights, so that x is a pre-activation and q the variance it starts with."""
    linear = theory.Linear(width, width, sigma_w / width**0.5, sigma_b2**0.5)
    return [theory.Elementwise(phi), linear] * layers
