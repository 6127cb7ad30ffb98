"""What one optimizer step of a watched training showed."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from torch import Tensor

from isograd.flow import Flow

ADDED_UP = "not cleared: the gradients of the step before were still there, and these were added to them"
"""Note of a step."""

CLEARED = (
    "cleared before the step: the gradients that the backward had left were gone when the optimizer stepped"
)
"""Note of a step."""


@dataclass(frozen=True)
class Reading:
    """Statistics of one step, one value a site.

    Absent means not measured: a column that was not read on this step is missing, a site that had no
    value in a column holds nan.
    """

    step: int
    """Optimizer steps so far; the first is 0."""
    sites: tuple[str, ...]
    """Names of the parameters, in the order of `model.named_parameters()`."""
    columns: dict[str, Tensor]
    """grad_norm, grad_max, nonfinite, zeros, weight_norm, update_norm: float32 on the CPU, shape (site,)."""
    scalars: dict[str, float] = field(default_factory=dict[str, float])
    """loss and what else was logged; grad_norm (global, raw), clipped_norm, scale (of the loss, AMP), lr."""
    notes: tuple[str, ...] = ()
    """How this step was read when not in full: 'overflow: the optimizer did not step', 'clipped' …"""
    time: float = 0.0
    """Seconds since the epoch when the step ended."""
    shapes: tuple[tuple[int, ...], ...] = ()
    """Shape of each parameter, whole where it is sharded, in the order of the sites; empty: not known."""
    flow: Flow | None = None
    """The flow along the backbone, on steps that were looked at from inside (`deep_every`)."""

    def flat(self, *, prefix: str = "isograd/", sites: bool = True) -> dict[str, float]:
        """The numbers as loggers take them: `isograd/loss`, `isograd/grad_norm`, `isograd/grad_norm/fc1.weight` …

        Absent values (nan) are left out; not-finite values that were measured stay as they are. With `sites`
        false, only what holds for the whole model.
        """
        flat = {prefix + name: value for name, value in self.scalars.items()}
        if sites:
            for column, values in self.columns.items():
                for site, value in zip(self.sites, values.tolist(), strict=True):
                    if not math.isnan(value):
                        flat[f"{prefix}{column}/{site}"] = value
        return flat
