"""Where the numbers of a watched run can go: a sink is any callable `(scalars, step) -> None`.

The log function of most loggers is one already: `wandb_run.log`, `trackio.log`, `mlflow.log_metrics`,
`accelerator.log`, Lightning's `logger.log_metrics`, Fabric's `fabric.log_dict`. TensorBoard takes one scalar
at a time: `tensorboard(writer)`.
"""

from __future__ import annotations

from typing import Protocol

from isograd.monitor.host import Sink


class SummaryWriter(Protocol):
    """What is used of `torch.utils.tensorboard.SummaryWriter`."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int, /) -> object: ...


def tensorboard(writer: SummaryWriter) -> Sink:
    """A sink that writes to TensorBoard."""

    def sink(scalars: dict[str, float], step: int) -> None:
        for name, value in scalars.items():
            writer.add_scalar(name, value, step)

    return sink
