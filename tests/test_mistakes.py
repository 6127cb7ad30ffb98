"""Mistakes that monitors of today make, by the number they have in our list of them; each as a test.

4, 9, 10, 11, 12, 18 and 25 at the size of a step; 5, 7 and 23 with real processes in tests/distributed; 13, 16
and 24 in the tests of the record, the detectors and the benchmarks.
"""

from __future__ import annotations

import warnings
from collections import Counter

import pytest
import torch
from test_monitor import batches, by_hand, net, same
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import isograd
from isograd.monitor import Reading


def step(model: nn.Module, optimizer: torch.optim.Optimizer, factor: float = 1.0, seed: int = 1) -> None:
    optimizer.zero_grad()
    x, y = next(batches(1))
    (functional.cross_entropy(model(x), y) * factor).backward()
    optimizer.step()


def watched() -> tuple[nn.Sequential, torch.optim.Optimizer, isograd.Monitor]:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    return model, optimizer, isograd.watch(model, optimizer)


def test_01_a_nan_is_counted_not_swallowed() -> None:
    sent: list[dict[str, float]] = []
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with isograd.watch(model, optimizer, sinks=[lambda scalars, _: sent.append(scalars)]) as monitor:
        step(model, optimizer, factor=torch.nan)
        assert torch.equal(
            monitor.latest().columns["nonfinite"],
            torch.tensor([float(p.numel()) for p in model.parameters()]),
        )
    assert any("nonfinite" in name for name in sent[0])


def test_02_and_03_a_nan_step_leaves_no_trace_in_what_follows() -> None:
    """Neither in the norms of the next steps nor in what the detectors say of them."""
    model, optimizer, monitor = watched()
    with monitor:
        for i in range(30):
            before = {name: p.detach().clone() for name, p in model.named_parameters()}
            step(model, optimizer, factor=torch.nan if i == 15 else 1.0)
            reading = monitor.latest()
            if i == 15:
                model.load_state_dict(before)
            else:
                assert reading.scalars["grad_norm"] == pytest.approx(
                    float(by_hand(model)["grad_norm"].norm())
                )
                assert reading.columns["nonfinite"].sum() == 0
        findings = monitor.diagnosis().findings
    assert len(findings) == 1
    assert findings[0].code.startswith("NF")


def test_04_clipping_does_not_hide_where_a_nan_came_from() -> None:
    model, optimizer, monitor = watched()
    hole = torch.zeros(4, 16)
    hole[0, 0] = torch.nan
    model[4].weight.register_hook(lambda gradient: gradient + hole)
    with monitor:
        x, y = next(batches(1))
        functional.cross_entropy(model(x), y).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        assert all(bool(p.grad.isnan().all()) for p in model.parameters() if p.grad is not None)
        optimizer.step()
        assert monitor.latest().columns["nonfinite"].tolist() == [0, 0, 0, 0, 1, 0]


def test_06_hooks_that_do_not_fire_are_said() -> None:
    """An optimizer whose steps never reach us: nothing seen is not nothing wrong."""
    model, optimizer, monitor = watched()
    with monitor:
        x, y = next(batches(1))
        functional.cross_entropy(model(x), y).backward()
        assert "no step was seen" in monitor.diagnosis().unexamined["training"]
    del optimizer


@pytest.mark.parametrize("scale", [2.0**16, 2.0**4])
def test_08_a_loss_scale_is_no_explosion(scale: float) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=5)
    with isograd.watch(model, optimizer) as monitor:
        norms: list[float] = []
        for _ in range(14):
            optimizer.zero_grad()
            x, y = next(batches(1))
            scaler.scale(functional.cross_entropy(model(x), y)).backward()
            scaler.step(optimizer)
            scaler.update()
            norms.append(monitor.latest().scalars["grad_norm"])
        assert max(norms) < 1.1 * min(norms)
        assert not monitor.diagnosis().errors


def test_09_and_10_accumulated_and_not_clipped() -> None:
    model, optimizer, monitor = watched()
    with monitor:
        for _ in range(5):
            optimizer.zero_grad()
            for x, y in batches(4):
                functional.cross_entropy(model(x), y).backward()
            expected = by_hand(model)
            nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
            optimizer.step()
            same(monitor.latest(), expected)


@pytest.mark.parametrize("factor", [1e-8, 65536.0])
def test_12_no_threshold_is_absolute(factor: float) -> None:
    model, optimizer, monitor = watched()
    optimizer.param_groups[0]["lr"] = 1e-3 / factor
    with monitor:
        for _ in range(20):
            step(model, optimizer, factor=factor)
        assert not monitor.diagnosis().errors


def test_15_raw_parameters_recurrences_ties_and_the_unused() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.LSTM(8, 4)
            self.scale = nn.Parameter(torch.ones(4))
            self.unused = nn.Linear(2, 2)
            self.out = nn.Linear(4, 4)
            self.tied = nn.Linear(4, 4, bias=False)
            self.tied.weight = self.out.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.tied(self.out(self.rnn(x)[0] * self.scale))

    model = Mixed()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with isograd.watch(model, optimizer) as monitor:
        model(torch.randn(5, 3, 8)).square().sum().backward()
        optimizer.step()
        reading = monitor.latest()
    column = dict(zip(reading.sites, reading.columns["grad_norm"].tolist(), strict=True))
    assert set(column) == {name for name, _ in model.named_parameters()}
    assert Counter(reading.sites)["out.weight"] == 1
    assert "tied.weight" not in column
    assert column["unused.weight"] != column["unused.weight"]  # nan: no gradient, which is not a zero one
    assert min(value for name, value in column.items() if "unused" not in name) > 0


def test_20_norms_of_half_precision_do_not_overflow() -> None:
    model = nn.Sequential(nn.Linear(8, 4)).half()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with isograd.watch(model, optimizer) as monitor:
        (model(torch.full((2, 8), 100.0, dtype=torch.half)).sum() * 100).backward()
        optimizer.step()
        reading = monitor.latest()
    assert reading.columns["grad_norm"][0].item() == pytest.approx(20000 * 32**0.5)
    assert reading.columns["nonfinite"].sum() == 0


def test_21_a_recomputed_forward_is_not_seen_twice() -> None:
    model, optimizer, monitor = watched()
    readings: list[Reading] = []
    with monitor:
        for x, y in batches(4):
            optimizer.zero_grad()
            functional.cross_entropy(checkpoint(model, x, use_reentrant=False), y).backward()
            expected = by_hand(model)
            optimizer.step()
            readings.append(monitor.latest())
            same(readings[-1], expected)
    assert [reading.step for reading in readings] == [0, 1, 2, 3]


def test_22_it_never_ends_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer, monitor = watched()
    with warnings.catch_warnings(record=True) as told, monitor:
        warnings.simplefilter("always")
        monkeypatch.setattr("isograd.monitor.tap.read", lambda *_: 1 / 0)
        for _ in range(3):
            step(model, optimizer)
    assert len(told) == 1


def test_25_nothing_of_the_size_of_the_model_is_kept_between_steps() -> None:
    model, optimizer, monitor = watched()
    with monitor:
        step(model, optimizer)
        held = monitor._held
        assert held is not None
        assert sum(packed.values().numel() for packed in held.packed) <= 6 * len(list(model.parameters()))
        assert all(tap._part is None and not tap._sampled._copies for tap in monitor._taps)
