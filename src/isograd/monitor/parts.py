"""Statistics of one optimizer's parameters at one step, still on their device."""

# torch exports its multi-tensor functions under private names only.
# pyright: reportPrivateImportUsage=false

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from operator import attrgetter

import torch
from torch import Tensor

from isograd.monitor.sharding import PLAIN, is_sharded, local, wide
from isograd.monitor.statistics import largest, nonfinite, norms

KIND = attrgetter("device", "dtype", "layout", "__class__")
"""What decides how a gradient is read."""


@dataclass
class Bucket:
    """Parameters of one device and dtype that have a gradient, and what was read of them.

    Attributes:
        parameters: as the optimizer holds them; the same list in each step in which they are the same.
        gradients: what this process holds of their gradients: plain, dense, not empty.
        sharded: several processes hold them: what is read here is not yet the whole.
        rows: by column, one scalar tensor a parameter.
        suspicious: a gradient is not finite; not known (False) where it would have to be waited for.
    """

    parameters: list[Tensor]
    gradients: list[Tensor]
    sharded: bool = False
    rows: dict[str, list[Tensor]] = field(default_factory=dict[str, "list[Tensor]"])
    suspicious: bool = False

    @property
    def weights(self) -> list[Tensor]:
        """What this process holds of the parameters."""
        return [local(p) for p in self.parameters]

    @cached_property
    def norms(self) -> Tensor:
        """The norms of the gradients in one tensor, (parameter,)."""
        return torch.stack(self.rows["grad_norm"])

    def read(self, full: bool) -> None:
        """Read the gradients: their norms, and all else if `full` or if a norm is suspicious."""
        self.rows["grad_norm"] = norms(self.gradients)
        if self.gradients[0].device.type == "cpu":  # there the values can be looked at without waiting
            values: list[float] = self.norms.tolist()
            if not (all(values) and math.isfinite(math.hypot(*values))):
                self._scrutinise(values)
        if full:
            self.rows["grad_max"] = largest(self.gradients)
            self.rows["nonzero"] = norms(self.gradients, 0)

    def _scrutinise(self, values: Sequence[float]) -> None:
        """Tell values that are not finite from squares that over- or underflow in float32."""
        odd = [i for i, value in enumerate(values) if not math.isfinite(value) or value == 0]
        exact = torch._foreach_norm([self.gradients[i] for i in odd], 2.0, dtype=torch.float64)
        self.norms[odd] = torch.stack(exact).to(self.norms.dtype)
        self.rows["grad_norm"] = list(self.norms.unbind())
        count = [torch.zeros(())] * len(values)
        for i in odd:
            if not math.isfinite(values[i]):
                self.suspicious = True
                count[i] = nonfinite(self.gradients[i]).float()
        if self.suspicious:
            self.rows["nonfinite"] = count

    def pack(self) -> Tensor:
        """All rows as one tensor, one after the other, in their order."""
        if list(self.rows) == ["grad_norm"]:
            return self.norms
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

    @property
    def broken(self) -> bool:
        """Is a norm not finite? Waits for a device."""
        return any(not bool(bucket.norms.isfinite().all()) for bucket in self.buckets)

    def shares(self, parameters: Sequence[Tensor]) -> dict[str, Tensor]:
        """This process's rows for some of `sharded`, the same columns in every process."""
        columns = ["grad_norm", "nonfinite"]
        if self.full:
            columns += ["grad_max", "nonzero", "weight_norm", "update_norm"]
        place = {id(p): i for i, p in enumerate(parameters)}
        device = local(parameters[0]).device
        dtype = wide(device)
        rows = {name: torch.zeros(len(parameters), dtype=dtype, device=device) for name in columns}
        for bucket in self.buckets:
            mine = [i for i, p in enumerate(bucket.parameters) if id(p) in place]
            at = [place[id(bucket.parameters[i])] for i in mine]
            if not mine:  # plain parameters, or held by other processes
                continue
            for name, row in bucket.rows.items():
                rows[name][at] = torch.stack([row[i] for i in mine]).to(dtype)
            if "nonfinite" not in bucket.rows:
                rows["nonfinite"][at] = torch.where(rows["grad_norm"][at].isfinite(), 0.0, math.nan).to(dtype)
        return rows


class Reader:
    """Reads the gradients of one optimizer's parameters.

    Sorting them by device and dtype is remembered: as long as nothing but the values has changed from one step
    to the next, as in nearly all of them, it is looked up.
    """

    def __init__(self, parameters: Callable[[], Sequence[Tensor]]) -> None:
        self.parameters = parameters
        self._ids: list[int] = []
        self._kinds: Sequence[object] = ()
        self._sorted: list[tuple[list[Tensor], list[int]]] = []
        """Parameters of each bucket, and the places of their gradients among all."""

    def read(self, full: bool) -> Part:
        """Read the gradients as they are now."""
        parameters = self.parameters()
        gradients = [g for p in parameters if (g := p.grad) is not None]
        if len(gradients) < len(parameters):
            parameters = [p for p in parameters if p.grad is not None]
        ids, kinds = list(map(id, parameters)), list(map(KIND, gradients))
        with torch.no_grad():
            if not full and ids == self._ids and kinds == self._kinds:
                buckets = [Bucket(held, [gradients[i] for i in places]) for held, places in self._sorted]
                part = Part(buckets, full)
            else:
                part = self._sort(parameters, gradients, full)
                plain = all(type(g) in PLAIN and g.layout is torch.strided for g in gradients)
                self._ids, self._kinds = (ids, kinds) if plain and not part.sharded else ([], ())
            for bucket in part.buckets:
                bucket.read(full)
        return part

    def _sort(self, parameters: Sequence[Tensor], gradients: Sequence[Tensor], full: bool) -> Part:
        groups: dict[tuple[torch.device, torch.dtype, bool], Bucket] = {}
        places: dict[int, list[int]] = {}
        sharded: list[Tensor] = []
        for i, (parameter, whole) in enumerate(zip(parameters, gradients, strict=True)):
            several = is_sharded(parameter)
            if several:
                sharded.append(parameter)
            gradient = local(whole)
            if not gradient.numel():
                continue
            bucket = groups.setdefault((gradient.device, gradient.dtype, several), Bucket([], [], several))
            bucket.parameters.append(parameter)
            bucket.gradients.append(gradient)
            places.setdefault(id(bucket), []).append(i)
        buckets = list(groups.values())
        self._sorted = [(bucket.parameters, places[id(bucket)]) for bucket in buckets]
        return Part(buckets, full, sharded)


def idle(parameters: Sequence[Tensor], stepped: bool) -> list[Bucket]:
    """Those that are to be trained and have no gradient: what they weigh, and that an optimizer leaves them as they are."""
    waiting = [
        p for p in parameters if p.grad is None and p.requires_grad and p.numel() and not is_sharded(p)
    ]
    groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for p in waiting:
        groups.setdefault((p.device, p.dtype), []).append(p)
    buckets = [Bucket(held, []) for held in groups.values()]
    for bucket in buckets:
        bucket.rows["weight_norm"] = norms(bucket.weights)
        if stepped:
            bucket.rows["update_norm"] = [torch.zeros_like(norm) for norm in bucket.rows["weight_norm"]]
    return buckets
