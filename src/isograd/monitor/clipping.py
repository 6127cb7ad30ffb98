"""Clip gradients by a norm that was read already."""

# torch exports its multi-tensor functions under private names only.
# pyright: reportPrivateImportUsage=false
from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from isograd.monitor.parts import Part
from isograd.monitor.sharding import Shards
from isograd.monitor.updates import number

SURELY = 1.001
"""The factor is 1 however it is rounded."""


def clip(parts: Sequence[Part], max_norm: float, shards: Shards) -> Tensor:
    """Scale the gradients that were read to a total norm of at most `max_norm`; the raw norm.

    The factor is that of `torch.nn.utils.clip_grad_norm_`, bit by bit. On the CPU, where the norm can be
    looked at without waiting, nothing is scaled that need not be.
    """
    with torch.no_grad():
        total = total_norm(parts, shards)
        if total.device.type == "cpu":
            norm = number(total)
            if not math.isfinite(norm) or max_norm > SURELY * (norm + 1e-6):
                return total
        factor = torch.clamp(max_norm / (total + 1e-6), max=1.0)
        if total.device.type != "cpu":  # where it is not finite, 0 * NaN would spread it
            factor = torch.where(total.isfinite(), factor, 1.0)
        for part in parts:
            for bucket in part.buckets:
                dense = [g for p in bucket.parameters if (g := p.grad) is not None and g.is_sparse]
                for gradient in dense:
                    gradient.mul_(factor)
                if not dense:
                    torch._foreach_mul_(bucket.gradients, factor.to(bucket.gradients[0].device))
        return total


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
