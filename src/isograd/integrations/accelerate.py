"""Accelerate: `with watch(accelerator, model, optimizer) as monitor:` around the loop."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from isograd.monitor import Monitor
from isograd.monitor import watch as watch_model

try:
    from accelerate import Accelerator  # pyright: ignore[reportMissingTypeStubs]
except ImportError:
    raise ImportError("this needs Accelerate: pip install 'isograd[hf]'") from None


def watch(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    run: str | Path | None = None,
    every: int = 1,
    deep_every: int | None = None,
    budget: float = 0.01,
) -> Monitor:
    """A monitor of what `accelerator.prepare` returned; the scalars go to the accelerator's trackers too."""
    return watch_model(
        model,
        optimizer,
        run=run,
        every=every,
        deep_every=deep_every,
        budget=budget,
        sinks=[lambda scalars, step: accelerator.log(scalars, step=step)] if accelerator.trackers else [],
    )
