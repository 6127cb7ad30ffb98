"""Lightning: `Trainer(callbacks=[IsogradCallback()])`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from isograd.integrations.loss import AccumulatedLoss
from isograd.monitor import Monitor, watch

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError:
    raise ImportError("the Lightning callback needs Lightning: pip install 'isograd[lightning]'") from None


class IsogradCallback(Callback):
    """Watches the fit: raw gradients (accumulated, unscaled, before clipping), the loss, and what they mean.

    The scalars of each step go to the trainer's loggers too; `sites` adds those of every parameter.
    """

    def __init__(
        self,
        run: str | Path | None = None,
        *,
        every: int = 1,
        deep_every: int | None = None,
        replay: bool = False,
        budget: float = 0.01,
    ) -> None:
        self.run, self.every, self.deep_every = run, every, deep_every
        self.replay, self.budget = replay, budget
        self.monitor: Monitor | None = None
        self._loss: AccumulatedLoss | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.monitor = watch(
            pl_module,
            trainer.optimizers,
            run=self.run,
            every=self.every,
            deep_every=self.deep_every,
            replay=self.replay,
            budget=self.budget,
            sinks=[logger.log_metrics for logger in trainer.loggers],
        )
        self._loss = AccumulatedLoss(self.monitor, pl_module)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        assert self._loss is not None
        scaler: Any = getattr(trainer.precision_plugin, "scaler", None)
        self._loss.before_backward()
        # in 16-mixed the loss comes here multiplied by the scale
        self._loss.add(loss if scaler is None else loss / scaler._scale)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._close()

    def _close(self) -> None:
        if self.monitor is not None:
            self.monitor.close()
