"""Clip gradients: by a norm that was read already, by what it usually is, or unit by unit."""

# torch exports its multi-tensor functions under private names only.
# pyright: reportPrivateImportUsage=false
from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_, get_total_norm

from isograd.monitor.parts import Part
from isograd.monitor.sharding import Shards, wide
from isograd.monitor.updates import number
from isograd.symptoms.loss_spike import LEAST

SURELY = 1.001
"""The factor is 1 however it is rounded."""


class AdaptiveClip:
    """A limit that follows the gradient norm: mean and `z` spreads of the log-norms before, for `monitor.clip_`.

    Norms that are not finite or zero are left out of both, and a norm above the limit counts as the limit. However
    quiet the norms were, one within a fifth of a decade of their mean is none to clip. Nothing waits for a device.

    Args:
        z: spreads of the log-norm above its mean.
        max_norm: a limit that holds from the first step on.
        decay: of the moving mean and variance; 0.97 remembers some thirty steps.
        warm_up: steps whose norms are only learned from.

    Source: Kumar et al. 2025, ZClip, arXiv:2504.02507, which takes the norm where this takes its logarithm.
    """

    def __init__(
        self, z: float = 2.5, *, max_norm: float = math.inf, decay: float = 0.97, warm_up: int = 25
    ) -> None:
        if not (z > 0 and max_norm > 0 and 0 < decay < 1 and warm_up > 1):
            raise ValueError(
                "AdaptiveClip takes z and max_norm above 0, decay between 0 and 1, warm_up above 1"
            )
        self.z, self.max_norm, self.decay, self.warm_up = z, max_norm, decay, warm_up
        self._seen = torch.zeros(3, dtype=torch.float64)  # how many, their mean, their variance

    def limit(self, norm: Tensor) -> Tensor:
        """The limit for this step, whose raw norm is then learned from. Scalar tensors."""
        if self._seen.device != norm.device:
            self._seen = self._seen.to(wide(norm.device)).to(norm.device)
        count, mean, variance = self._seen
        spread = torch.clamp(self.z * variance.sqrt(), min=LEAST)
        ready = count >= self.warm_up
        limit = torch.where(ready, 10 ** (mean + spread), math.inf).clamp(max=self.max_norm)
        level = torch.minimum(norm.to(self._seen.dtype), limit).log10()
        known = level.isfinite() & norm.isfinite()
        weight = torch.clamp(1 / (count + 1), min=1 - self.decay)
        off = torch.where(known, level - mean, 0.0)
        new = torch.stack((count + 1, mean + weight * off, (1 - weight) * (variance + weight * off**2)))
        self._seen = torch.where(known, new, self._seen)
        return limit.to(norm.dtype)

    def state_dict(self) -> dict[str, float]:
        """What was learned, as plain numbers."""
        return dict(zip(("count", "mean", "variance"), self._seen.tolist(), strict=True))

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Go on from `state_dict()`."""
        self._seen = torch.tensor([state[name] for name in self.state_dict()], dtype=torch.float64)


class Taken(Protocol):
    """An optimizer whose gradients are read."""

    def current(self) -> Part: ...
    def parameters(self) -> Sequence[Tensor]: ...
    def clipped_to(self, norm: Tensor) -> None: ...


def clip(taps: Sequence[Taken], max_norm: float | AdaptiveClip, shards: Shards) -> Tensor:
    """Scale the gradients to a total norm of at most `max_norm`, by what is read of them; the raw norm.

    The factor is that of `torch.nn.utils.clip_grad_norm_`, bit by bit. On the CPU, where the norm can be
    looked at without waiting, nothing is scaled that need not be.
    """
    with torch.no_grad():
        parts = [tap.current() for tap in taps]
        total = total_norm(parts, shards)
        limit = max_norm.limit(total) if isinstance(max_norm, AdaptiveClip) else max_norm
        if _needed(total, limit):
            factor = torch.clamp(limit / (total + 1e-6), max=1.0)
            if total.device.type != "cpu":  # where it is not finite, 0 * NaN would spread it
                factor = torch.where(total.isfinite(), factor, 1.0)
            for part in parts:
                _scale(part, factor)
        clipped = torch.clamp(total, max=limit)
        for tap in taps:
            tap.clipped_to(clipped)
        return total


def _needed(total: Tensor, limit: float | Tensor) -> bool:
    """Has anything to be scaled? Where that would have to be waited for, it may have."""
    if total.device.type != "cpu":
        return isinstance(limit, Tensor) or limit < math.inf
    norm = number(total)
    return math.isfinite(norm) and number(limit) <= SURELY * (norm + 1e-6)


def _scale(part: Part, factor: Tensor) -> None:
    for bucket in part.buckets:
        dense = [g for p in bucket.parameters if (g := p.grad) is not None and g.is_sparse]
        for gradient in dense:
            gradient.mul_(factor)
        if not dense:
            torch._foreach_mul_(bucket.gradients, factor.to(bucket.gradients[0].device))


def clip_unread(parameters: Sequence[Tensor], max_norm: float | AdaptiveClip) -> Tensor:
    """The same where nothing is read: an adaptive limit is its `max_norm`."""
    return clip_grad_norm_(parameters, max_norm.max_norm if isinstance(max_norm, AdaptiveClip) else max_norm)


def clip_units(taps: Sequence[Taken], ratio: float, eps: float, shards: Shards) -> Tensor:
    """Scale the gradient of each unit to `ratio` of its weight norm, or of `eps`; the raw total norm."""
    with torch.no_grad():
        raw = total_norm([tap.current() for tap in taps], shards)
        for tap in taps:
            _scale_units(tap.parameters(), ratio, eps)
        clipped = total_norm([tap.current() for tap in taps], shards)
        for tap in taps:
            tap.clipped_to(clipped)
        return raw


def clip_units_unread(parameters: Sequence[Tensor], ratio: float, eps: float) -> Tensor:
    """The same where nothing is read."""
    raw = get_total_norm([p.grad for p in parameters if p.grad is not None])
    _scale_units(parameters, ratio, eps)
    return raw


def _scale_units(parameters: Sequence[Tensor], ratio: float, eps: float) -> None:
    """A unit is a row of a matrix, a filter, a whole vector. Units whose norm is not finite are left as they are, sparse
    gradients too. Source: Brock et al. 2021, arXiv:2102.06171, adaptive gradient clipping."""
    with torch.no_grad():
        for p in parameters:
            gradient = p.grad
            if gradient is None or gradient.is_sparse:
                continue
            weight, norm = _units(p), _units(gradient)
            factor = (ratio * weight.clamp(min=eps) / norm.clamp(min=1e-30)).clamp(max=1.0)
            gradient.mul_(torch.where(norm.isfinite(), factor, 1.0).to(gradient.dtype))


def _units(tensor: Tensor) -> Tensor:
    """Norm of each unit in float32, in a shape that multiplies the tensor."""
    dims = tuple(range(1, tensor.ndim))
    dtype = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    return torch.linalg.vector_norm(tensor, dim=dims or None, keepdim=bool(dims), dtype=dtype)


def total_norm(parts: Sequence[Part], shards: Shards) -> Tensor:
    """Norm of all gradients as one vector, from the norms of each."""
    norms: list[Tensor] = []
    for part in parts:
        read = [bucket.norms for bucket in part.buckets if not bucket.sharded]
        for parameters in shards.split(part.sharded):
            row = part.shares(parameters)["grad_norm"]
            whole = shards.reduce(parameters, {"grad_norm": row})[1]()
            read.append(torch.linalg.vector_norm(whole).view(1))
        norms += read if part.scale is None else [norm / part.scale for norm in read]
    if not norms:
        return torch.zeros(())
    if len(norms) == 1:
        return torch.linalg.vector_norm(norms[0])
    return torch.linalg.vector_norm(torch.cat([norm.to(norms[0].device) for norm in norms]))
