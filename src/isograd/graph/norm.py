"""The norm of tensors, in whatever format and of whatever size."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def norm(tensors: Iterable[Tensor | None]) -> Tensor:
    """L2 norm of all elements of the given tensors together, as a float64 scalar on their device.

    Accumulates in float32, and in float64 where float32 would over- or underflow: a norm of 1e25s
    is not infinite and a norm of 1e-30s is not zero (both are real readings of deep networks).
    """
    parts = [_norm(tensor) for tensor in tensors if tensor is not None]
    return parts[0] if len(parts) == 1 else torch.linalg.vector_norm(torch.stack(parts))


def _norm(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    if tensor.is_sparse:
        tensor = tensor.coalesce().values()
    if tensor.is_complex():  # of a Fourier transform
        tensor = torch.view_as_real(tensor.resolve_conj())
    if tensor.numel() == 0:
        return torch.zeros((), dtype=torch.float64, device=tensor.device)
    if tensor.is_cuda or tensor.dtype == torch.float64:  # on a GPU the cast is fused into the reduction
        return torch.linalg.vector_norm(tensor, dtype=torch.float64)
    value = torch.linalg.vector_norm(tensor, dtype=torch.float32)
    # Reading a value on the CPU costs nothing; a float64 pass costs a copy, so only where it is needed.
    if tensor.device.type == "cpu" and not 1e-15 < value.item() < 1e18:
        return torch.linalg.vector_norm(tensor, dtype=torch.float64)
    return value.double()
