"""Hugging Face Trainer: `Trainer(…, callbacks=[IsogradCallback()])`.

None of the Trainer's events sees a gradient before it is clipped: the monitor reads them where they arise.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from isograd.integrations.loss import AccumulatedLoss
from isograd.monitor import Monitor, watch

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ImportError:
    raise ImportError("the Trainer callback needs transformers: pip install 'isograd[hf]'") from None


class IsogradCallback(TrainerCallback):
    """Watches `trainer.train()`: raw gradients (accumulated, before clipping) and what they mean.

    The loss is what the model returns with its output: the Trainer's own log averages it over
    `logging_steps` and leaves values out that are not finite.
    """

    def __init__(
        self,
        run: str | Path | None = None,
        *,
        every: int = 1,
        deep_every: int | None = None,
        budget: float = 0.01,
    ) -> None:
        self.run, self.every, self.deep_every, self.budget = run, every, deep_every, budget
        self.monitor: Monitor | None = None
        self._hook: Any = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        **kwargs: Any,
    ) -> None:
        assert model is not None
        monitor = watch(
            model,
            optimizer,
            run=self.run,
            every=self.every,
            deep_every=self.deep_every,
            budget=self.budget,
        )
        accumulated = AccumulatedLoss(model)

        def returned(module: nn.Module, inputs: Any, output: Any) -> None:
            loss = output.get("loss") if isinstance(output, dict) else None
            if module.training and isinstance(loss, torch.Tensor):
                accumulated.before_backward()
                monitor.log(loss=accumulated.add(loss))

        self.monitor, self._hook = monitor, model.register_forward_hook(returned)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.monitor is not None:
            self._hook.remove()
            self.monitor.close()
