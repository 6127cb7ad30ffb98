"""What Accelerate and Fabric share: a loop of one's own, around a model and an optimizer that they have prepared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

import torch
from torch import nn

from isograd.monitor import Monitor, watch
from isograd.monitor.host import Sink

Trainer = TypeVar("Trainer")


class Watch(Generic[Trainer]):
    """`watch(trainer, model, optimizer)`: a monitor of what the trainer returned; its loggers get the scalars too."""

    def __init__(self, loggers: Callable[[Trainer], Sequence[Sink]]) -> None:
        self._loggers = loggers

    def __call__(
        self,
        trainer: Trainer,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        run: str | Path | None = None,
        every: int = 1,
        deep_every: int | None = None,
        replay: bool = False,
        budget: float = 0.01,
    ) -> Monitor:
        """See `isograd.watch`."""
        return watch(
            model,
            optimizer,
            run=run,
            every=every,
            deep_every=deep_every,
            replay=replay,
            budget=budget,
            sinks=self._loggers(trainer),
        )
