"""What a watched step shows, against statistics taken by hand in the loop."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer

import isograd
from isograd.monitor import Reading
from isograd.monitor.detectors import Detectors
from isograd.monitor.host import Ended, Packed, reading_of
from isograd.monitor.statistics import largest, norms
from isograd.record import Run


def net(width: int = 16) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(8, width), nn.Tanh(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 4)
    )


def batches(count: int) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        yield torch.randn(12, 8, generator=generator), torch.randint(4, (12,), generator=generator)


def by_hand(model: nn.Module, *, scale: float = 1.0) -> dict[str, Tensor]:
    """What should be read of the gradients as they are now."""
    grads = [p.grad.double() / scale for p in model.parameters() if p.grad is not None]
    return {
        "grad_norm": torch.stack([g.norm() for g in grads]),
        "grad_max": torch.stack([g.abs().max() for g in grads]),
        "zeros": torch.stack([(g == 0).sum() for g in grads]),
        "nonfinite": torch.stack([(~g.isfinite()).sum() for g in grads]),
    }


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def same(reading: Reading, expected: dict[str, Tensor], rtol: float = 1e-6) -> None:
    for name, column in expected.items():
        torch.testing.assert_close(reading.columns[name].double(), column.double(), rtol=rtol, atol=1e-12)


OPTIMIZERS: dict[str, Callable[[nn.Module], Optimizer]] = {
    "SGD": lambda m: torch.optim.SGD(m.parameters(), lr=0.1),
    "SGD decay": lambda m: torch.optim.SGD(m.parameters(), lr=0.1, weight_decay=0.1),
    "SGD momentum": lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1),
    "SGD dampening": lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9, dampening=0.5),
    "SGD Nesterov": lambda m: torch.optim.SGD(
        m.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1
    ),
    "SGD maximize": lambda m: torch.optim.SGD(
        m.parameters(), lr=1e-3, momentum=0.9, nesterov=True, weight_decay=0.1, maximize=True
    ),
    "SGD fused": lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9, fused=True),
    "SGD foreach": lambda m: torch.optim.SGD(m.parameters(), lr=0.1, weight_decay=0.1, foreach=True),
    "SGD tensor rate": lambda m: torch.optim.SGD(m.parameters(), lr=torch.tensor(0.1)),
    "SGD groups": lambda m: torch.optim.SGD(
        [
            {"params": list(m.parameters())[:2], "momentum": 0.9},
            {"params": list(m.parameters())[2:4], "weight_decay": 0.1},
            {"params": list(m.parameters())[4:], "momentum": 0.8, "nesterov": True},
        ],
        lr=0.1,
    ),
    "Adam": lambda m: torch.optim.Adam(m.parameters(), weight_decay=0.1),
    "Adam amsgrad": lambda m: torch.optim.Adam(m.parameters(), amsgrad=True, maximize=True),
    "Adam fused": lambda m: torch.optim.Adam(m.parameters(), fused=True),
    "AdamW": lambda m: torch.optim.AdamW(m.parameters(), weight_decay=0.1),
    "AdamW fused": lambda m: torch.optim.AdamW(m.parameters(), amsgrad=True, maximize=True, fused=True),
    "AdamW foreach": lambda m: torch.optim.AdamW(m.parameters(), weight_decay=0.1, foreach=True),
    "AdamW groups": lambda m: torch.optim.AdamW(
        [
            {"params": [p for p in m.parameters() if p.dim() > 1]},
            {"params": [p for p in m.parameters() if p.dim() < 2], "weight_decay": 0.0, "lr": 0.01},
        ]
    ),
    "AdamW tensor rate": lambda m: torch.optim.AdamW(m.parameters(), lr=torch.tensor(0.01)),
    "RMSprop": lambda m: torch.optim.RMSprop(m.parameters()),
    "Adafactor": lambda m: torch.optim.Adafactor(m.parameters()),
    "NAdam": lambda m: torch.optim.NAdam(m.parameters()),
}


@pytest.mark.parametrize("rule", OPTIMIZERS)
def test_every_column_of_every_step(rule: str) -> None:
    model = net()
    optimizer = OPTIMIZERS[rule](model)
    with isograd.watch(model, optimizer) as monitor:
        for step, (x, y) in enumerate(batches(6)):
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(x), y)
            loss.backward()
            expected, before = by_hand(model), weights(model)
            optimizer.step()
            monitor.log(loss=loss)
            reading = monitor.latest()
            assert reading.step == step
            assert reading.sites == tuple(dict(model.named_parameters()))
            assert reading.scalars["loss"] == pytest.approx(float(loss))
            assert reading.scalars["grad_norm"] == pytest.approx(float(expected["grad_norm"].norm()))
            same(reading, expected)
            after = weights(model)
            same(reading, {"weight_norm": torch.stack([w.norm() for w in after])})
            moved = torch.stack([(a.double() - b).norm() for a, b in zip(after, before, strict=True)])
            same(reading, {"update_norm": moved}, rtol=2e-4)  # the weights are rounded to float32


@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_is_known_too(nesterov: bool) -> None:
    model = nn.Sequential(nn.Linear(8, 16, bias=False), nn.Tanh(), nn.Linear(16, 4, bias=False))
    optimizer = torch.optim.Muon(model.parameters(), lr=0.02, nesterov=nesterov)
    with isograd.watch(model, optimizer) as monitor:
        for x, y in batches(4):
            functional.cross_entropy(model(x), y).backward()
            before = weights(model)
            optimizer.step()
            optimizer.zero_grad()
            moved = torch.stack([(a - b).norm() for a, b in zip(weights(model), before, strict=True)])
            same(monitor.latest(), {"update_norm": moved}, rtol=1e-5)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Muon])
def test_a_decay_that_leaves_nothing_of_the_weight(kind: Callable[..., Optimizer]) -> None:
    """A rate that explodes is what a monitor is for: the update is not known, and all else is read."""
    model = nn.Sequential(nn.Linear(8, 16, bias=False), nn.Tanh(), nn.Linear(16, 4, bias=False))
    optimizer = kind(model.parameters(), lr=10.0, weight_decay=0.1)
    with isograd.watch(model, optimizer) as monitor:
        for x, y in batches(3):
            optimizer.zero_grad()
            functional.cross_entropy(model(x), y).backward()
            expected = by_hand(model)
            optimizer.step()
            reading = monitor.latest()
            same(reading, expected)
            assert reading.columns["update_norm"].isnan().all()


def test_latest_before_any_step_says_what_to_do() -> None:
    model = net()
    with (
        isograd.watch(model, torch.optim.SGD(model.parameters())) as monitor,
        pytest.raises(RuntimeError, match=r"call latest\(\) after optimizer\.step\(\)"),
    ):
        monitor.latest()


def test_every_third_step_and_those_that_are_not_finite() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    steps: list[int] = []
    with isograd.watch(model, optimizer, every=3, sinks=[lambda _, step: steps.append(step)]):
        for step, (x, y) in enumerate(batches(10)):
            optimizer.zero_grad()
            (functional.cross_entropy(model(x), y) * (math.nan if step == 4 else 1.0)).backward()
            optimizer.step()
            with torch.no_grad():
                for p in model.parameters():
                    p.nan_to_num_()
    assert steps == [0, 3, 4, 6, 9]


@pytest.mark.parametrize(("option", "value"), [("every", 0), ("deep_every", 0), ("budget", 0.0)])
def test_options_out_of_range_say_what_to_give(option: str, value: float) -> None:
    model = net()
    with pytest.raises(ValueError, match="give"):
        isograd.watch(model, torch.optim.SGD(model.parameters()), **{option: value})  # type: ignore[arg-type]


def test_another_kind_of_optimizer() -> None:
    """Keras and the like: the loop says when a step has ended."""
    model = net()
    with isograd.watch(model, None) as monitor:
        for x, y in batches(3):
            model.zero_grad()
            functional.cross_entropy(model(x), y).backward()
            expected = by_hand(model)
            monitor.step()
            same(monitor.latest(), expected)
    with pytest.raises(TypeError, match=r"monitor\.step\(\)"):
        isograd.watch(model, object())  # type: ignore[arg-type]


class Own(torch.optim.Optimizer):
    """Finds its learning rate by itself, as Adafactor's relative step does."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(p.grad / (1 + p.grad.norm()))
        return None


@pytest.mark.parametrize("defaults", [{}, {"lr": None}])
def test_an_optimizer_need_not_have_a_learning_rate(defaults: dict[str, Any]) -> None:
    model = net()
    optimizer = Own(model.parameters(), defaults)
    with isograd.watch(model, optimizer) as monitor:
        for x, y in batches(3):
            optimizer.zero_grad()
            functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            same(monitor.latest(), by_hand(model))
        assert monitor.latest().step == 2
        assert "lr" not in monitor.latest().scalars


def test_a_record_is_written_and_continued(tmp_path: Path) -> None:
    for start in (0, 5):
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with isograd.watch(model, optimizer, run=tmp_path / "run") as monitor:
            for x, y in batches(5):
                optimizer.zero_grad()
                loss = functional.cross_entropy(model(x), y)
                loss.backward()
                optimizer.step()
                monitor.log(loss=loss)
            assert monitor.latest().step == start + 4
    with Run.open(tmp_path / "run") as run:
        assert run.last == 9
        assert len(run.series("loss")[1]) == 10


@pytest.mark.parametrize("resumed", [True, False])
def test_another_training_in_the_same_record_is_not_held_against_the_one_before(
    tmp_path: Path, resumed: bool
) -> None:
    """Its loss starts where that of the first had started: no jump. One that is resumed has the optimizer's state."""

    def train(state: dict[str, Any] | None, factor: float) -> tuple[dict[str, Any], list[str]]:
        model = nn.Linear(4, 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
        if state is not None:
            optimizer.load_state_dict(state)
        with isograd.watch(model, optimizer, run=tmp_path / "run") as monitor:
            for step in range(80):
                optimizer.zero_grad()
                loss = (
                    functional.cross_entropy(model(torch.eye(4)), torch.tensor([0, 1, 0, 1])) * factor**step
                )
                loss.backward()
                optimizer.step()
                monitor.log(loss=loss)
        return optimizer.state_dict(), [finding.code for finding in monitor.diagnosis().findings]

    state, found = train(None, 0.9)
    assert found == []
    _, found = train(state if resumed else None, 1.0)  # which does not come back
    assert ("TR702" in found) == resumed
    with Run.open(tmp_path / "run") as run:
        diagnosis = isograd.diagnose(run)
        assert any("begins at step 80" in note for note in diagnosis.flow.notes) == (not resumed)
        assert {f.code for f in diagnosis.findings} == set(found)


@pytest.mark.parametrize("resumed", [True, False])
def test_an_optimizer_that_remembers_nothing_is_told_by_the_first_loss(tmp_path: Path, resumed: bool) -> None:
    model = nn.Linear(4, 2)

    def train() -> list[str]:
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        with isograd.watch(model, optimizer, run=tmp_path / "run") as monitor:
            for _ in range(80):
                optimizer.zero_grad()
                loss = functional.cross_entropy(model(torch.eye(4)), torch.tensor([0, 1, 0, 1]))
                loss.backward()
                optimizer.step()
                monitor.log(loss=loss)
        return [finding.code for finding in monitor.diagnosis().findings]

    assert train() == []
    if not resumed:
        model.reset_parameters()
    assert train() == []
    with Run.open(tmp_path / "run") as run:
        assert any("begins at step 80" in note for note in isograd.diagnose(run).flow.notes) == (not resumed)


def test_an_optimizer_that_steps_within_the_backward_is_read(tmp_path: Path) -> None:
    """One a parameter, in a hook that was there before: the gradient is gone when the backward ends."""
    torch.manual_seed(0)
    model = net()
    optimizers = {p: torch.optim.SGD([p], lr=0.1) for p in model.parameters()}
    expected: list[float] = []

    def step(p: Tensor) -> None:
        assert p.grad is not None
        expected.append(float(p.grad.norm()))
        optimizers[p].step()
        optimizers[p].zero_grad()

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(step)
    with isograd.watch(model, list(optimizers.values()), run=tmp_path / "run"):
        for x, y in batches(12):
            functional.cross_entropy(model(x), y).backward()
    with Run.open(tmp_path / "run") as run:
        readings = list(run.readings())
    assert len(readings) == 12
    for i, reading in enumerate(readings):
        own = expected[i * len(optimizers) :][: len(optimizers)]
        assert sorted(reading.columns["grad_norm"].tolist()) == pytest.approx(sorted(own))
        assert reading.notes == ()


def test_a_scalar_may_be_logged_before_or_after_the_step() -> None:
    for early in (True, False):
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        kept: dict[int, float] = {}
        with isograd.watch(
            model, optimizer, sinks=[lambda s, step, kept=kept: kept.update({step: s["isograd/loss"]})]
        ) as monitor:
            for step, (x, y) in enumerate(batches(5)):
                optimizer.zero_grad()
                loss = functional.cross_entropy(model(x), y)
                if early:
                    monitor.log(loss=step)
                loss.backward()
                optimizer.step()
                if not early:
                    monitor.log(loss=-1.0)
                    monitor.log(loss=step)  # the last value wins
        assert kept == {i: i for i in range(5)}, early


def on_a_device(gradients: list[Tensor], full: bool) -> Reading:
    """As where elements are not counted, because that would have to be waited for; the last site has no gradient."""
    rows = {"grad_norm": norms(gradients)} | ({"grad_max": largest(gradients)} if full else {})
    values = torch.stack([torch.stack(row).float() for row in rows.values()])
    sites = [f"{i}.weight" for i in range(len(gradients))]
    packed = Packed(list(range(len(gradients))), list(rows), lambda: values, [4] * len(gradients))
    shapes = ((2, 2),) * (len(sites) + 1)
    return reading_of(Ended(0, (*sites, "unused.weight"), shapes, [packed], {}, [], 0.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_that_overflows_is_told_from_a_gradient_that_is_not_finite(dtype: torch.dtype) -> None:
    small, large = torch.ones(2, 2, dtype=dtype), torch.full((2, 2), 1e30, dtype=dtype)
    whole = on_a_device([small, large], full=True)
    assert whole.columns["grad_norm"][:2].tolist() == pytest.approx(
        [2.0, 1e30], rel=1e-2
    )  # at least its maximum
    assert whole.columns["nonfinite"][:2].tolist() == [0, 0]
    assert not Detectors().observe(whole)
    (found,) = Detectors().observe(on_a_device([small, large], full=False))
    assert found.message.startswith("the gradient norm of 1 of 3 parameters")


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_is_told_where_elements_are_not_counted(
    value: float, dtype: torch.dtype, full: bool
) -> None:
    broken = torch.tensor([[1.0, value], [1.0, 1.0]], dtype=dtype)
    reading = on_a_device([torch.full_like(broken, 60_000.0), broken], full)
    assert math.isinf(reading.scalars["grad_norm"])
    assert reading.columns["grad_norm"][2].isnan()
    (found,) = Detectors().observe(reading)
    assert (found.code, found.sites) == ("NF405", ("1.weight",))
    told = "gradient" if full or math.isnan(value) else "gradient norm"
    assert found.message.startswith(f"the {told} of 1 of 3")


def test_a_cell_that_makes_its_optimizer_anew_is_run_again(tmp_path: Path) -> None:
    """One monitor hears of the model, not one more each time, and all write to one record; one over other parameters stays."""
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
    monitors: list[isograd.Monitor] = []
    for _ in range(3):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        monitors.append(isograd.watch(model, optimizer, run=tmp_path / "run", replay=True))
        for _ in range(4):
            optimizer.zero_grad()
            model(torch.randn(4, 4)).square().mean().backward()
            optimizer.step()
    hooks = [len(p._post_accumulate_grad_hooks or ()) for p in model.parameters()]
    assert max(hooks) == len(model._forward_hooks) == 1
    assert [monitor._closed for monitor in monitors] == [True, True, False]
    isograd.watch(model, torch.optim.SGD(model[0].parameters(), lr=0.1)).close()
    assert not monitors[-1]._closed
    monitors[-1].close()
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
