"""Statistics of many tensors in a handful of operations, without waiting for any of them.

Each function takes tensors of one device and dtype and returns one scalar tensor for each, in their order.
Half precision is accumulated in float32; the tensors themselves are never widened.
"""

# torch exports its multi-tensor functions under private names only.
# pyright: reportPrivateImportUsage=false
from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from isograd.monitor.sharding import local

LEAST = 262_144
"""Elements that are worked on at once of any model."""
SHARE = 128
"""Of a larger one, one in so many: with weights, gradients and moments a temporary is below .2% of what is held."""


def norms(tensors: Sequence[Tensor], order: float = 2.0) -> list[Tensor]:
    """Norm of each tensor; order 0 counts what is not zero."""
    wide = torch.float32 if tensors[0].dtype in (torch.float16, torch.bfloat16) else None
    return list(torch._foreach_norm(list(tensors), order, dtype=wide))


def largest(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Largest magnitude of each tensor; NaN if it holds one."""
    if tensors[0].device.type != "cpu":
        return norms(tensors, math.inf)
    # The CPU kernel of the infinity norm is fifteen times slower than that of the maximum.
    return [top for some in chunks(tensors) for top in torch._foreach_max(torch._foreach_abs(some))]


def nonfinite(tensor: Tensor) -> Tensor:
    """Number of elements that are NaN or Inf, as a scalar tensor."""
    return tensor.numel() - tensor.isfinite().sum()


def chunks(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Runs of tensors whose temporaries are small beside them all: of at most so many elements, or of one tensor."""
    sizes = [local(tensor).numel() for tensor in tensors]
    most = max(LEAST, sum(sizes) // SHARE)
    held: list[Tensor] = []
    room = most
    for tensor, size in zip(tensors, sizes, strict=True):
        if held and size > room:
            yield held
            held, room = [], most
        held.append(tensor)
        room -= size
    if held:
        yield held
