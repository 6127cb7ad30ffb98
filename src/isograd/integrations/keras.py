"""Keras 3 on torch: `model.fit(…, callbacks=[IsogradCallback()])`.

A Keras optimizer is none of torch's, so the callback says when a step has ended; the gradients are
still there then, as the backward left them: Keras clips copies.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from isograd.monitor import Monitor, watch

try:
    import keras  # pyright: ignore[reportMissingTypeStubs]
except ImportError:
    raise ImportError("the Keras callback needs Keras 3: pip install 'isograd[keras]'") from None


class IsogradCallback(keras.callbacks.Callback):
    """Watches `fit`: the gradients of every variable, and what they mean.

    The loss is that of each batch: what the mean that Keras shows, over the epoch so far, has grown by.
    """

    def __init__(
        self,
        run: str | Path | None = None,
        *,
        every: int = 1,
        budget: float = 0.01,
        opened: Callable[[], Monitor] | None = None,
    ) -> None:
        super().__init__()
        if keras.backend.backend() != "torch":
            raise ValueError(
                f"Keras computes with {keras.backend.backend()} here, and isograd reads torch's gradients: "
                "set KERAS_BACKEND=torch before keras is imported"
            )
        self.monitor: Monitor | None = None
        self._summed: tuple[Any, Any] | None = None
        """Sum of the losses of the epoch so far, and of their weights."""

        def watched() -> Monitor:
            model: Any = self.model
            return watch(model, None, run=run, every=every, budget=budget)

        self._open = opened or watched

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        self.monitor = self._open()

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        assert self.monitor is not None
        loss = self._loss()
        if loss is not None:
            self.monitor.log(loss=loss)
        elif logs and "loss" in logs:
            self.monitor.log(loss=logs["loss"])
        rate = self._rate()
        if rate is not None:
            self.monitor.log(lr=rate)
        self.monitor.step()

    def _rate(self) -> Any:
        """The learning rate, as a tensor that is not waited for; None: the optimizer has none."""
        model: Any = self.model
        rate = getattr(model.optimizer, "learning_rate", None)
        return getattr(rate, "value", rate)

    def _loss(self) -> Any:
        """The loss of the last batch, as a tensor; None: the model keeps no mean of it."""
        model: Any = self.model
        mean = next(
            (m for m in model.metrics if m.name == "loss" and isinstance(m, keras.metrics.Mean)), None
        )
        if mean is None:
            return None
        before, self._summed = (
            self._summed,
            (mean.total.value.detach().clone(), mean.count.value.detach().clone()),
        )
        total, count = self._summed
        return total / count if before is None else (total - before[0]) / (count - before[1])

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        self._summed = None  # Keras begins a new mean

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        if self.monitor is not None:
            self.monitor.close()
