"""What this process holds of a tensor, and how the parts of all processes make one statistic."""

from __future__ import annotations

import torch
from torch import Tensor


def local(tensor: Tensor) -> Tensor:
    """The values this process holds: a shard of a DTensor, the values of a sparse tensor, or all."""
    shard: Tensor | None = getattr(tensor, "_local_tensor", None)
    tensor = tensor if shard is None else shard
    return tensor.coalesce().values() if tensor.layout is torch.sparse_coo else tensor
