"""Watching changes no bit: weights and random state after 200 steps with and without it, in each trainer."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import isograd
from isograd.record import Run

os.environ.setdefault("KERAS_BACKEND", "torch")
STEPS = 200


def net() -> nn.Sequential:
    """With dropout, so that the random state matters."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Dropout(0.2), nn.Linear(16, 3))


def batches(count: int = STEPS) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        yield torch.randn(8, 6, generator=generator), torch.randint(0, 3, (8,), generator=generator)


def loop(watched: bool, folder: Path, *, accumulated: int = 1, bf16: bool = False) -> nn.Module:
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    watch = isograd.watch(model, optimizer, run=folder, deep_every=50) if watched else nullcontext()
    with watch:
        for number, (x, y) in enumerate(batches(STEPS * accumulated), 1):
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                loss = F.cross_entropy(model(x), y) / accumulated
            loss.backward()
            if number % accumulated == 0:
                nn.utils.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
                optimizer.zero_grad()
    return model


def accumulate(watched: bool, folder: Path) -> nn.Module:
    return loop(watched, folder, accumulated=3)


def autocast(watched: bool, folder: Path) -> nn.Module:
    return loop(watched, folder, bf16=True)


def lightning(watched: bool, folder: Path) -> nn.Module:
    L = pytest.importorskip("lightning")
    from isograd.integrations.lightning import IsogradCallback

    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def training_step(self, batch: Any, index: int) -> Tensor:
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=1e-2)

    module = Module()
    L.Trainer(
        max_steps=STEPS,
        accelerator="cpu",
        gradient_clip_val=0.5,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=str(folder.parent),
        callbacks=[IsogradCallback(folder)] if watched else [],
    ).fit(module, torch.utils.data.DataLoader(list(batches()), batch_size=None))
    return module


class WithLoss(nn.Module):
    """As the Trainer wants it: labels in, a dict with the loss out."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.net(x)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def hugging_face(watched: bool, folder: Path) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    from isograd.integrations.huggingface import IsogradCallback

    rows = [{"x": x, "labels": y} for batch in batches() for x, y in zip(*batch, strict=True)]
    arguments = transformers.TrainingArguments(
        output_dir=str(folder.parent / "out"),
        max_steps=STEPS,
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    model = WithLoss()
    callbacks = [IsogradCallback(folder)] if watched else []
    transformers.Trainer(model, arguments, train_dataset=rows, callbacks=callbacks).train()
    return model


def accelerate(watched: bool, folder: Path) -> nn.Module:
    library = pytest.importorskip("accelerate")
    from isograd.integrations.accelerate import watch

    accelerator = library.Accelerator(cpu=True)
    model = net()
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
    with watch(accelerator, model, optimizer, run=folder) if watched else nullcontext():
        for x, y in batches():
            accelerator.backward(F.cross_entropy(model(x), y))
            accelerator.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
    return model


def fabric(watched: bool, folder: Path) -> nn.Module:
    library = pytest.importorskip("lightning.fabric")
    from isograd.integrations.fabric import watch

    runs = library.Fabric(accelerator="cpu", devices=1)
    model = net()
    model, optimizer = runs.setup(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
    with watch(runs, model, optimizer, run=folder) if watched else nullcontext():
        for x, y in batches():
            runs.backward(F.cross_entropy(model(x), y))
            runs.clip_gradients(model, optimizer, max_norm=0.5)
            optimizer.step()
            optimizer.zero_grad()
    return model


def keras(watched: bool, folder: Path) -> nn.Module:
    library = pytest.importorskip("keras")
    from isograd.integrations.keras import IsogradCallback

    library.utils.set_random_seed(0)
    layers = library.layers
    model = library.Sequential(
        [library.Input((6,)), layers.Dense(16, "tanh"), layers.Dropout(0.2, seed=0), layers.Dense(3)]
    )
    model.compile(
        library.optimizers.AdamW(1e-2), library.losses.SparseCategoricalCrossentropy(from_logits=True)
    )
    x, y = (torch.cat(parts).numpy() for parts in zip(*batches(), strict=True))
    callbacks = [IsogradCallback(folder)] if watched else []
    model.fit(x, y, batch_size=8, epochs=1, shuffle=False, verbose=0, callbacks=callbacks)
    return model


@pytest.mark.parametrize(
    "train", [loop, accumulate, autocast, lightning, hugging_face, accelerate, fabric, keras]
)
def test_no_bit_is_changed(train: Callable[[bool, Path], nn.Module], tmp_path: Path) -> None:
    ends: list[tuple[list[Tensor], Tensor]] = []
    for watched in (False, True):
        torch.manual_seed(3)
        model = train(watched, tmp_path / "run")
        ends.append(([p.detach().clone() for p in model.parameters()], torch.get_rng_state()))
    (plain, state), (seen, state_seen) = ends
    assert all(torch.equal(a, b) for a, b in zip(plain, seen, strict=True))
    assert torch.equal(state, state_seen)
    with Run.open(tmp_path / "run") as run:
        assert run.last == STEPS - 1
