"""The callbacks in the real trainers: the raw gradient norm equals a hand-written loop's, nothing else changes."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import isograd
from isograd.integrations.loss import AccumulatedLoss
from isograd.record import Run

os.environ.setdefault("KERAS_BACKEND", "torch")
STEPS, ACCUMULATED, CLIP = 4, 2, 0.05


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))


def batches() -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS * ACCUMULATED):
        yield torch.randn(8, 6, generator=generator), torch.randint(0, 3, (8,), generator=generator)


def by_hand(model: nn.Module) -> tuple[list[float], list[float]]:
    """Raw norms and losses of accumulation, then clipping, then AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    norms, losses, loss = [], [], 0.0
    for number, (x, y) in enumerate(batches(), 1):
        part = F.cross_entropy(model(x), y) / ACCUMULATED
        part.backward()
        loss += part.item()
        if number % ACCUMULATED == 0:
            norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), CLIP)))
            losses.append(loss)
            optimizer.step()
            optimizer.zero_grad()
            loss = 0.0
    return norms, losses


def agree(
    record: Path, expected: tuple[list[float], list[float]], trained: nn.Module, twin: nn.Module
) -> None:
    with Run.open(record) as run:
        readings = list(run.readings())
    assert [r.scalars["grad_norm"] for r in readings] == pytest.approx(expected[0], rel=1e-5)
    assert [r.scalars["loss"] for r in readings] == pytest.approx(expected[1], rel=1e-5)
    for one, other in zip(trained.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("automatic", [True, False])
def test_lightning(automatic: bool, tmp_path: Path) -> None:
    pytest.importorskip("lightning")
    import lightning as L

    from isograd.integrations.lightning import IsogradCallback

    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()
            self.automatic_optimization = automatic

        def training_step(self, batch: Any, index: int) -> Tensor | None:
            loss = F.cross_entropy(self.net(batch[0]), batch[1])
            if automatic:
                return loss
            self.manual_backward(loss / ACCUMULATED)
            if (index + 1) % ACCUMULATED == 0:
                optimizer: Any = self.optimizers()
                self.clip_gradients(optimizer, gradient_clip_val=CLIP, gradient_clip_algorithm="norm")
                optimizer.step()
                optimizer.zero_grad(set_to_none=False)
            return None

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=1e-2, weight_decay=0.0)

    module, twin = Module(), net()
    trainer = L.Trainer(
        max_steps=STEPS,
        accelerator="cpu",
        **({"accumulate_grad_batches": ACCUMULATED, "gradient_clip_val": CLIP} if automatic else {}),
        logger=L.pytorch.loggers.CSVLogger(str(tmp_path), name="csv"),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[IsogradCallback(tmp_path / "run", replay=True)],
    )
    trainer.fit(module, torch.utils.data.DataLoader(list(batches()), batch_size=None))
    agree(tmp_path / "run", by_hand(twin), module.net, twin)
    assert "isograd/grad_norm" in next(tmp_path.rglob("metrics.csv")).read_text().splitlines()[0]


class WithLoss(nn.Module):
    """As the Trainer wants it: labels in, a dict with the loss out."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.net(x)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def test_hugging_face_trainer(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    from isograd.integrations.huggingface import IsogradCallback

    rows = [{"x": x, "labels": y} for batch in batches() for x, y in zip(*batch, strict=True)]
    model, twin = WithLoss(), net()

    class InOrder(transformers.Trainer):
        def _get_train_sampler(self, *args: Any) -> torch.utils.data.Sampler[int]:
            return torch.utils.data.SequentialSampler(rows)

    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path / "out"),
        max_steps=STEPS,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=ACCUMULATED,
        learning_rate=1e-2,
        weight_decay=0.0,
        lr_scheduler_type="constant",
        max_grad_norm=CLIP,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    InOrder(
        model, arguments, train_dataset=rows, callbacks=[IsogradCallback(tmp_path / "run", replay=True)]
    ).train()
    agree(tmp_path / "run", by_hand(twin), model.net, twin)
    assert not model._forward_hooks


def test_accelerate(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    from isograd.integrations.accelerate import watch

    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATED)
    model, twin = net(), net()
    model, optimizer = accelerator.prepare(
        model, torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    )
    with watch(accelerator, model, optimizer, run=tmp_path / "run", replay=True) as monitor:
        total = 0.0
        for number, (x, y) in enumerate(batches(), 1):
            with accelerator.accumulate(model):
                loss = F.cross_entropy(model(x), y)
                accelerator.backward(loss)
                total += loss.item() / ACCUMULATED
                if number % ACCUMULATED == 0:
                    accelerator.clip_grad_norm_(model.parameters(), CLIP)
                    monitor.log(loss=total)
                    total = 0.0
                optimizer.step()
                optimizer.zero_grad()
    agree(tmp_path / "run", by_hand(twin), model, twin)


def test_fabric(tmp_path: Path) -> None:
    fabrics = pytest.importorskip("lightning.fabric")
    from isograd.integrations.fabric import watch

    fabric = fabrics.Fabric(accelerator="cpu", devices=1)
    model, twin = net(), net()
    model, optimizer = fabric.setup(model, torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0))
    with watch(fabric, model, optimizer, run=tmp_path / "run", replay=True) as monitor:
        total = torch.zeros(())
        for number, (x, y) in enumerate(batches(), 1):
            loss = F.cross_entropy(model(x), y) / ACCUMULATED
            fabric.backward(loss)
            total = total + loss.detach()
            if number % ACCUMULATED == 0:
                fabric.clip_gradients(model, optimizer, max_norm=CLIP)
                monitor.log(loss=total)
                total = torch.zeros(())
                optimizer.step()
                optimizer.zero_grad()
    agree(tmp_path / "run", by_hand(twin), model, twin)
    with Run.open(tmp_path / "run") as run:
        assert next(iter(run.readings())).sites[0] == "0.weight"


def test_keras(tmp_path: Path) -> None:
    keras = pytest.importorskip("keras")
    from isograd.integrations.keras import IsogradCallback

    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Dense(16, "tanh", name="dense"),
            keras.layers.Dense(3, name="head"),
        ]
    )
    model.compile(
        keras.optimizers.SGD(0.1, clipnorm=CLIP), keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    )
    twin = copy.deepcopy([torch.tensor(w) for w in model.get_weights()])
    data = list(batches())
    x, y = (torch.cat(parts).numpy() for parts in zip(*data, strict=True))
    model.fit(
        x, y, batch_size=8, epochs=1, shuffle=False, verbose=0, callbacks=[IsogradCallback(tmp_path / "run")]
    )

    expected, losses = [], []
    for inputs, target in data:
        for w in twin:
            w.requires_grad_(True)
            w.grad = None
        hidden = (inputs @ twin[0] + twin[1]).tanh()
        loss = F.cross_entropy(hidden @ twin[2] + twin[3], target)
        loss.backward()
        losses.append(loss.item())
        grads = [w.grad for w in twin if w.grad is not None]
        expected.append(float(torch.stack([g.norm() for g in grads]).norm()))
        twin = [
            (w - 0.1 * g * (CLIP / torch.clamp(g.norm(), min=CLIP))).detach()
            for w, g in zip(twin, grads, strict=True)
        ]
    with Run.open(tmp_path / "run") as run:
        kept = list(run.readings())
    assert [reading.scalars["grad_norm"] for reading in kept] == pytest.approx(expected, rel=1e-5)
    assert [reading.scalars["loss"] for reading in kept] == pytest.approx(losses, rel=1e-5)
    assert all(reading.scalars["lr"] == pytest.approx(0.1) for reading in kept)
    assert [site.partition("/")[2] for site in kept[0].sites] == [
        "dense/kernel",
        "dense/bias",
        "head/kernel",
        "head/bias",
    ]


def test_the_loss_of_a_closure_is_that_of_its_first_evaluation() -> None:
    model = net()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=4)
    with isograd.watch(model, optimizer) as monitor:
        accumulated = AccumulatedLoss(monitor, model)
        for x, y in batches():
            evaluated: list[float] = []

            def closure(x: Tensor = x, y: Tensor = y, evaluated: list[float] = evaluated) -> Tensor:
                optimizer.zero_grad()
                loss = F.cross_entropy(model(x), y)
                accumulated.before_backward()
                loss.backward()
                accumulated.add(loss)
                evaluated.append(loss.item())
                return loss

            optimizer.step(closure)
            assert len(evaluated) > 1
            assert monitor.latest().scalars["loss"] == pytest.approx(evaluated[0])


def test_a_step_of_fewer_backwards_has_a_loss_of_the_same_level() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    x, y = next(iter(batches()))
    with isograd.watch(model, optimizer) as monitor:
        accumulated = AccumulatedLoss(monitor, model)
        for backwards in (4, 4, 2, 4, 1):
            for _ in range(backwards):
                loss = F.cross_entropy(model(x), y) / 4
                accumulated.before_backward()
                loss.backward()
                accumulated.add(loss)
            optimizer.step()
            optimizer.zero_grad()
            assert monitor.latest().scalars["loss"] == pytest.approx(4 * loss.item())


@pytest.mark.parametrize("name", ["lightning", "huggingface", "accelerate", "fabric", "keras"])
def test_a_missing_library_is_named_with_its_extra(name: str) -> None:
    import subprocess
    import sys

    library = {"huggingface": "transformers", "fabric": "lightning"}.get(name, name)
    code = f"import sys; sys.modules[{library!r}] = None; import isograd.integrations.{name}"
    got = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "pip install 'isograd[" in got.stderr.splitlines()[-1]
