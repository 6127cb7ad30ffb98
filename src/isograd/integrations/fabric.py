"""Lightning Fabric: `with watch(fabric, model, optimizer) as monitor:` around the loop."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from isograd.monitor import Monitor
from isograd.monitor import watch as watch_model

try:
    from lightning.fabric import Fabric
except ImportError:
    raise ImportError("this needs Lightning: pip install 'isograd[lightning]'") from None


def watch(
    fabric: Fabric,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    run: str | Path | None = None,
    every: int = 1,
    deep_every: int | None = None,
    budget: float = 0.01,
) -> Monitor:
    """A monitor of what `fabric.setup` returned; the scalars go to the fabric's loggers too."""
    return watch_model(
        model,
        optimizer,
        run=run,
        every=every,
        deep_every=deep_every,
        budget=budget,
        sinks=[logger.log_metrics for logger in fabric.loggers],
    )
