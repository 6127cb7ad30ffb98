"""Statistics of many tensors in a handful of operations, without waiting for any of them.

Each function takes tensors of one device and dtype and returns one scalar tensor for each, in their order.
Half precision is accumulated in float32; the tensors themselves are never widened.
"""

# torch exports its multi-tensor functions under private names only.
# pyright: reportPrivateImportUsage=false
from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def norms(tensors: Sequence[Tensor], order: float = 2.0) -> list[Tensor]:
    """Norm of each tensor; order 0 counts what is not zero."""
    wide = torch.float32 if tensors[0].dtype in (torch.float16, torch.bfloat16) else None
    return list(torch._foreach_norm(list(tensors), order, dtype=wide))


def largest(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Largest magnitude of each tensor; NaN if it holds one."""
    if tensors[0].device.type != "cpu":
        return norms(tensors, math.inf)
    # The CPU kernel of the infinity norm is fifteen times slower than that of the maximum.
    return list(torch._foreach_max(torch._foreach_abs(list(tensors))))


def nonfinite(tensor: Tensor) -> Tensor:
    """Number of elements that are NaN or Inf, as a scalar tensor."""
    return tensor.numel() - tensor.isfinite().sum()
