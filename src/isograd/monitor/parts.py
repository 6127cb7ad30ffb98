"""Statistics of one optimizer's parameters at one step, still on their device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from isograd.monitor.sharding import is_sharded, local
from isograd.monitor.statistics import largest, nonfinite, norms


@dataclass
class Bucket:
    """Parameters of one device and dtype that have a gradient, and what was read of them.

    Attributes:
        parameters: as the optimizer holds them.
        gradients: what this process holds of their gradients: plain, dense, not empty.
        sharded: several processes hold them: what is read here is not yet the whole.
        rows: by column, one scalar tensor a parameter.
    """

    parameters: list[Tensor]
    gradients: list[Tensor]
    sharded: bool = False
    rows: dict[str, list[Tensor]] = field(default_factory=dict[str, "list[Tensor]"])
    _norms: Tensor | None = None
    """The row of norms as one tensor, where it was looked at."""

    @property
    def weights(self) -> list[Tensor]:
        """What this process holds of the parameters."""
        return [local(p) for p in self.parameters]

    def read(self, full: bool) -> None:
        """Read the gradients: their norms, and all else if `full` or if a norm is suspicious."""
        rows = {"grad_norm": norms(self.gradients)}
        suspicious: list[int] = []
        if self.gradients[0].device.type == "cpu":  # there the values can be looked at without waiting
            self._norms = torch.stack(rows["grad_norm"])
            values: list[float] = self._norms.tolist()
            suspicious = [i for i, value in enumerate(values) if not math.isfinite(value) or value == 0]
        if suspicious:
            self._scrutinise(rows, suspicious)
        if full:
            rows["grad_max"] = largest(self.gradients)
            rows["nonzero"] = norms(self.gradients, 0)
        self.rows = rows

    def _scrutinise(self, rows: dict[str, list[Tensor]], suspicious: list[int]) -> None:
        """Tell values that are not finite from squares that over- or underflow in float32."""
        count = [torch.zeros((), device=g.device) for g in self.gradients[:1]] * len(self.gradients)
        for i in suspicious:
            gradient = self.gradients[i]
            count[i] = nonfinite(gradient).float()
            rows["grad_norm"][i] = torch.linalg.vector_norm(gradient, dtype=torch.float64).float()
        rows["nonfinite"] = count

    def pack(self) -> Tensor:
        """All rows as one tensor, one after the other, in their order."""
        if len(self.rows) == 1 and self._norms is not None:
            return self._norms
        return torch.stack([value for row in self.rows.values() for value in row])


@dataclass
class Part:
    """What one optimizer's step showed: `Bucket`s, and how they were read."""

    buckets: list[Bucket]
    full: bool
    sharded: list[Tensor] = field(default_factory=list[Tensor])
    """Parameters with a gradient that several processes hold, also those of which this one holds nothing."""
    scale: Tensor | None = None
    """Factor of the loss that the gradients still carried when they were read (AMP)."""
    notes: list[str] = field(default_factory=list[str])

    @property
    def parameters(self) -> list[Tensor]:
        return [p for bucket in self.buckets for p in bucket.parameters]

    def shares(self, parameters: Sequence[Tensor]) -> dict[str, Tensor]:
        """This process's rows for some of `sharded`, the same columns in every process."""
        columns = ["grad_norm", "nonfinite"]
        if self.full:
            columns += ["grad_max", "nonzero", "weight_norm", "update_norm"]
        place = {id(p): i for i, p in enumerate(parameters)}
        rows = {
            name: torch.zeros(len(parameters), dtype=torch.float64, device=local(parameters[0]).device)
            for name in columns
        }
        for bucket in self.buckets:
            mine = [i for i, p in enumerate(bucket.parameters) if id(p) in place]
            at = [place[id(bucket.parameters[i])] for i in mine]
            if not mine:  # plain parameters, or held by other processes
                continue
            for name, row in bucket.rows.items():
                rows[name][at] = torch.stack([row[i] for i in mine]).double()
            if "nonfinite" not in bucket.rows:
                rows["nonfinite"][at] = torch.where(rows["grad_norm"][at].isfinite(), 0.0, math.nan).double()
        return rows


def read(parameters: Sequence[Tensor], full: bool) -> Part:
    """Read the gradients of these parameters as they are now."""
    groups: dict[tuple[torch.device, torch.dtype, bool], Bucket] = {}
    sharded: list[Tensor] = []
    bucket = Bucket([], [])
    of: tuple[torch.device, torch.dtype, bool] | None = None
    with torch.no_grad():
        for parameter in parameters:
            gradient = parameter.grad
            if gradient is None:
                continue
            several = is_sharded(parameter)
            if several:
                sharded.append(parameter)
            gradient = local(gradient)
            if not gradient.numel():
                continue
            key = gradient.device, gradient.dtype, several
            if key != of:
                bucket, of = groups.setdefault(key, Bucket([], [], several)), key
            bucket.parameters.append(parameter)
            bucket.gradients.append(gradient)
        for bucket in groups.values():
            bucket.read(full)
    return Part(list(groups.values()), full, sharded)
