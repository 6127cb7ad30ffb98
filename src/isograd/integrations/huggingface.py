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
from isograd.monitor.call import Staying

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ImportError:
    raise ImportError("the Trainer callback needs transformers: pip install 'isograd[hf]'") from None


class IsogradCallback(TrainerCallback):
    """Watches `trainer.train()`: raw gradients (accumulated, before clipping) and what they mean.

    The loss is what the model returns with its output, as the Trainer weighs it over the batches of a step;
    the Trainer's own log averages it over `logging_steps` and leaves values out that are not finite.
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
        self._close()  # a training that raised has no end
        monitor = watch(
            model,
            optimizer,
            run=self.run,
            every=self.every,
            deep_every=self.deep_every,
            replay=self.replay,
            budget=self.budget,
        )
        accumulated = AccumulatedLoss(monitor, model)
        scaler: Any = getattr(optimizer, "scaler", None)

        def returned(module: nn.Module, inputs: Any, output: Any) -> None:
            loss = output.get("loss") if isinstance(output, dict) else None
            if not module.training or not isinstance(loss, torch.Tensor) or not loss.requires_grad:
                return
            value = loss.detach().clone()

            def weighed(weight: torch.Tensor) -> None:
                accumulated.before_backward()
                accumulated.add(value * (weight if scaler is None else weight / scaler._scale))

            # How much of it goes into the step only the backward knows: the Trainer divides by the number of
            # batches, of tokens, or not at all.
            loss.register_hook(weighed)

        self.monitor, self._hook = monitor, model.register_forward_hook(Staying(returned))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._close()

    def _close(self) -> None:
        if self.monitor is not None:
            self._hook.remove()
            self.monitor.close()
