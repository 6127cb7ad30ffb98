"""What this process holds of a tensor, and how the parts of all processes make one statistic."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed, nn

SQUARES = ("grad_norm", "weight_norm", "update_norm")
COUNTS = ("nonfinite", "nonzero")
PLAIN = frozenset({Tensor, nn.Parameter})
"""Types that need no second look: this is asked of every parameter at every step."""
PATIENCE = timedelta(seconds=120)
"""How long the host thread waits for a process that takes no part any more."""


def local(tensor: Tensor) -> Tensor:
    """The values this process holds: its shard of a DTensor, the values of a sparse tensor, or all.

    Of complex numbers the real and imaginary parts, one by one: torch's optimizers treat them so.
    """
    if type(tensor) in PLAIN and tensor.layout is torch.strided:
        return torch.view_as_real(tensor) if tensor.is_complex() else tensor
    if is_sharded(tensor):
        spread: Any = tensor
        if any(
            placement.is_partial() for placement in spread.placements
        ):  # as a bias under sequence parallel
            spread = spread.redistribute(placements=[_whole(p) for p in spread.placements])
        tensor = spread._local_tensor
    tensor = tensor.coalesce().values() if tensor.layout is torch.sparse_coo else tensor
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def is_sharded(tensor: Tensor) -> bool:
    """A DTensor: several processes hold it, in parts or as copies."""
    return type(tensor) not in PLAIN and hasattr(tensor, "_local_tensor") and hasattr(tensor, "device_mesh")


def _whole(placement: Any) -> Any:
    from torch.distributed.tensor import Replicate

    return Replicate() if placement.is_partial() else placement


def rank() -> int:
    """Number of this process; 0 alone writes."""
    return distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0


def together() -> bool:
    """Are there several processes?"""
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


@dataclass(frozen=True)
class Held:
    """How a parameter is held."""

    ranks: tuple[int, ...]
    """Processes that reduce it."""
    counts: bool
    """This process's part is no copy of what another process holds."""


class Shards:
    """Makes whole statistics of parameters that several processes hold: one all-reduce for all of them.

    The processes of a mesh have a group of their own for it: what the monitor sends can never meet what the
    training sends. A parameter on a part of a mesh (sharded for data, copied for tensor parallel) is reduced
    with those on all of it.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self._held: dict[int, Held] = {}
        sharded = [p for p in parameters if is_sharded(p)]
        meshes = {_ranks(p) for p in sharded}
        whole = {ranks: max((m for m in meshes if set(ranks) <= set(m)), key=len) for ranks in meshes}
        self._groups: dict[tuple[int, ...], Any] = {
            ranks: distributed.new_group(list(ranks), use_local_synchronization=True)
            for ranks in sorted(set(whole.values()))
        }
        self._whole = whole

    def __bool__(self) -> bool:
        """Any parameter is held by several processes."""
        return bool(self._groups)

    def split(self, parameters: Sequence[Tensor]) -> list[list[Tensor]]:
        """Sharded parameters by the processes that reduce them."""
        parts: dict[tuple[int, ...], list[Tensor]] = {}
        for parameter in parameters:
            parts.setdefault(self._known(parameter).ranks, []).append(parameter)
        return list(parts.values())

    def reduce(
        self, parameters: Sequence[Tensor], rows: dict[str, Tensor]
    ) -> tuple[list[str], Callable[[], Tensor]]:
        """Start the reduction of this process's statistics to those of the whole parameters.

        Args:
            parameters: sharded, all held by the same processes.
            rows: by column, this process's statistics, of shape (parameter,). The columns must be the same
                in every process.

        Returns:
            The names of the columns, and a function that waits for them: (column, parameter), float64.
        """
        group = self._groups[self._known(parameters[0]).ranks]
        processes, me = distributed.get_world_size(group), distributed.get_rank(group)
        sums = [name for name in (*SQUARES, *COUNTS) if name in rows]
        maxima = [name for name in rows if name not in sums]
        device = next(iter(rows.values())).device
        counted = torch.tensor([self._known(p).counts for p in parameters], device=device)
        # A maximum by a sum: each process has a row of its own, and the others leave it at 0.
        sent = torch.zeros(
            len(sums) + processes * len(maxima), len(parameters), dtype=wide(device), device=device
        )
        for i, name in enumerate(sums):
            row = rows[name].to(sent.dtype)
            # Copies are counted once. Not by a factor: 0 * NaN is NaN.
            sent[i] = torch.where(counted, row.square() if name in SQUARES else row, 0.0)
        for i, name in enumerate(maxima):
            sent[len(sums) + i * processes + me] = rows[name].to(sent.dtype)
        work = distributed.all_reduce(sent, group=group, async_op=True)

        def wait() -> Tensor:
            if work is not None:
                work.wait(PATIENCE)
            whole = [sent[i].sqrt() if name in SQUARES else sent[i] for i, name in enumerate(sums)]
            rest = sent[len(sums) :].view(len(maxima), processes, sent.shape[1])
            return torch.stack([*whole, *(part.amax(0) for part in rest)])

        return [*sums, *maxima], wait

    def _known(self, parameter: Tensor) -> Held:
        if id(parameter) not in self._held:
            mesh = _ranks(parameter)
            ranks = self._whole[mesh]
            # Of the copies on other parts of the mesh, those on the part of its first process count.
            self._held[id(parameter)] = Held(ranks, _first_copy(parameter) and ranks[0] in mesh)
        return self._held[id(parameter)]


def _ranks(parameter: Any) -> tuple[int, ...]:
    """Processes that hold a parameter."""
    return tuple(sorted(parameter.device_mesh.mesh.flatten().tolist()))


def _first_copy(parameter: Any) -> bool:
    """This process holds a part that is not a copy of what a process before it holds."""
    place = parameter.device_mesh.get_coordinate() or ()
    return all(
        at == 0 for at, placement in zip(place, parameter.placements, strict=True) if placement.is_replicate()
    )


def wide(device: torch.device) -> torch.dtype:
    """The widest floating-point type that a device has."""
    return torch.float32 if device.type == "mps" else torch.float64
