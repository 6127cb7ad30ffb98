"""Clip gradients by a norm that was read already."""

# torch exports its multi-tensor functions under private names only.
# pyright: reportPrivateImportUsage=false
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from isograd.monitor.parts import Part
from isograd.monitor.sharding import Shards
from isograd.monitor.updates import number


def clip(parts: Sequence[Part], max_norm: float, shards: Shards) -> Tensor:
    """Scale the gradients that were read to a total norm of at most `max_norm`; the raw norm.

    The factor is that of `torch.nn.utils.clip_grad_norm_`, bit by bit. On the CPU, where the norm can be
    looked at without waiting, nothing is scaled that need not be.
    """
    with torch.no_grad():
        total = total_norm(parts, shards)
        factor = torch.clamp(max_norm / (total + 1e-6), max=1.0)
        if total.device.type == "cpu":
            if not total.isfinite().tolist() or number(factor) >= 1:
                return total
        else:  # where it is not finite, 0 * NaN would spread it
            factor = torch.where(total.isfinite(), factor, 1.0)
        for part in parts:
            for bucket in part.buckets:
                dense = [p.grad for p in bucket.parameters if p.grad is not None and p.grad.is_sparse]
                for gradient in dense:
                    gradient.mul_(factor)
                if not dense:
                    torch._foreach_mul_(bucket.gradients, factor.to(bucket.gradients[0].device))
        return total


def total_norm(parts: Sequence[Part], shards: Shards) -> Tensor:
    """Norm of all gradients as one vector, from the norms of each."""
    norms: list[Tensor] = []
    for part in parts:
        read = [norm for bucket in part.buckets if not bucket.sharded for norm in bucket.rows["grad_norm"]]
        for parameters in shards.split(part.sharded):
            row = part.shares(parameters)["grad_norm"]
            read.append(torch.linalg.vector_norm(shards.reduce(parameters, {"grad_norm": row})[1]()))
        norms += read if part.scale is None else [norm / part.scale for norm in read]
    if not norms:
        return torch.zeros(())
    return torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]))
