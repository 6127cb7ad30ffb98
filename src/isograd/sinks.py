"""Where the numbers of a watched run can go: a sink is any callable `(scalars, step) -> None`.

The log function of most loggers is one already: `wandb_run.log`, `trackio.log`, `mlflow.log_metrics`,
`accelerator.log`, Lightning's `logger.log_metrics`, Fabric's `fabric.log_dict`. TensorBoard takes one scalar
at a time: `tensorboard(writer)`.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from contextvars import copy_context
from typing import Protocol

from isograd.monitor.reading import Reading

Sink = Callable[[dict[str, float], int], None]


class SummaryWriter(Protocol):
    """What is used of `torch.utils.tensorboard.SummaryWriter`."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int, /) -> object: ...


def tensorboard(writer: SummaryWriter) -> Sink:
    """A sink that writes to TensorBoard."""

    def sink(scalars: dict[str, float], step: int) -> None:
        for name, value in scalars.items():
            writer.add_scalar(name, value, step)

    return sink


def bound(sink: Sink) -> Sink:
    """The sink as another thread can call it: loggers keep the run that is active per context or per thread."""
    if sink is getattr(sys.modules.get("mlflow"), "log_metrics", None):
        mlflow = sys.modules["mlflow"]
        run = mlflow.active_run() or mlflow.start_run()
        return lambda scalars, step: mlflow.log_metrics(scalars, step, run_id=run.info.run_id)
    context = copy_context()
    return lambda scalars, step: context.run(sink, scalars, step)


def scalars(reading: Reading, *, prefix: str = "isograd/", sites: bool = True) -> dict[str, float]:
    """The reading as loggers take it: `isograd/loss`, `isograd/grad_norm`, `isograd/grad_norm/fc1.weight` …

    Absent values (nan) are left out; not-finite values that were measured stay as they are. With `sites`
    false, only what holds for the whole model.
    """
    flat = {prefix + name: value for name, value in reading.scalars.items()}
    if sites:
        for column, values in reading.columns.items():
            for site, value in zip(reading.sites, values.tolist(), strict=True):
                if not math.isnan(value):
                    flat[f"{prefix}{column}/{site}"] = value
    return flat
