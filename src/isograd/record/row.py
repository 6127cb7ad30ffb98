"""What stands in the tables, as plain data: rows that need no torch, and readings that do."""

from __future__ import annotations

import ctypes
import json
import sys
from array import array
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from isograd.diagnosis import Finding
    from isograd.monitor.reading import Reading


GUARDED = "isograd.Guard: "
"""Begins a note of what a guard has done."""
BEGINS = "a training begins here: its optimizer remembers no step"
"""Note of a step that was recorded behind those of another training, which its own are not to be held against."""
PERHAPS = "a training begins here, or goes on: its first loss tells"
"""The same, where the optimizer does not tell: it never remembers a step, or another one goes on with the same model."""
RIVALS = "a loss of one network runs through weights that are trained on another: it has no level of its own"
"""Note of the first step at which that was seen."""
PROCESSES = (
    "of several processes that train together: the gradients are those of all, the loss is that of process 0"
)
"""Note of the first step."""
ELSEWHERE = (
    "the network that this one is trained against had made a step before with gradients that are not finite"
)
"""Note of a step that breaks of it."""


@dataclass(frozen=True)
class Layout:
    """What the values of a row are of; written once, and again when the parameters or columns change."""

    sites: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    columns: tuple[str, ...]

    @staticmethod
    def of(reading: Reading) -> Layout:
        return Layout(reading.sites, reading.shapes, tuple(reading.columns))

    def encoded(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def decoded(text: str) -> Layout:
        found = json.loads(text)
        shapes = tuple(tuple(shape) for shape in found["shapes"])
        return Layout(tuple(found["sites"]), shapes, tuple(found["columns"]))


@dataclass(frozen=True)
class Row:
    """One step as it was recorded."""

    step: int
    time: float
    """Seconds since the epoch."""
    layout: Layout
    scalars: dict[str, float]
    notes: tuple[str, ...]
    content: bytes
    """float32, little-endian, shape (column, site)."""

    def column(self, name: str) -> Sequence[float]:
        """One value a site; nan where nothing was measured.

        Raises:
            KeyError: this column was not measured on this step.
        """
        if name not in self.layout.columns:
            raise KeyError(name)
        width = 4 * len(self.layout.sites)
        first = self.layout.columns.index(name) * width
        values = array("f")
        values.frombytes(self.content[first : first + width])
        if sys.byteorder == "big":
            values.byteswap()
        return values

    def reading(self) -> Reading:
        """The same with tensors, as the monitor made it."""
        import torch

        from isograd.monitor.reading import Reading

        columns = {name: torch.tensor(self.column(name)) for name in self.layout.columns}
        layout = self.layout
        return Reading(self.step, layout.sites, columns, self.scalars, self.notes, self.time, layout.shapes)


def content(reading: Reading) -> bytes:
    """The columns of a reading as float32, little-endian, shape (column, site)."""
    import torch

    if not reading.columns:
        return b""
    values = torch.stack([column.detach().float() for column in reading.columns.values()]).cpu().contiguous()
    raw = ctypes.string_at(values.data_ptr(), values.nbytes)  # numpy is no dependency of ours
    if sys.byteorder == "big":
        swapped = array("f", raw)
        swapped.byteswap()
        raw = swapped.tobytes()
    return raw


@dataclass(frozen=True)
class Told:
    """A finding as it was recorded; `id` counts them."""

    id: int
    step: int
    content: dict[str, Any]
    """code, name, severity, message, cause, sites, evidence, remedies."""

    def finding(self) -> Finding:
        from isograd.diagnosis import Finding, Severity

        found = self.content
        return Finding(
            found["code"],
            found["name"],
            Severity[found["severity"]],
            found["message"],
            found["cause"],
            tuple(found["sites"]),
            found["evidence"],
            tuple(found["remedies"]),
        )


def encoded(finding: Finding) -> str:
    """A finding as JSON; NaN and Infinity as Python and JSON5 write them."""
    names = ("code", "name", "message", "cause", "sites", "evidence", "remedies")
    return json.dumps({name: getattr(finding, name) for name in names} | {"severity": finding.severity.name})
