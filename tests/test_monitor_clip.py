"""Clipping by the monitor: the bits of torch's own, and a raw norm that is read once."""

from __future__ import annotations

import pytest
import torch
from test_monitor import batches, by_hand, net, same, weights
from torch import nn
from torch.nn import functional

import isograd


@pytest.mark.parametrize("max_norm", [1e-3, 0.3, 1e3])
def test_the_same_bits_as_torch(max_norm: float) -> None:
    ours, theirs = net(), net()
    optimizers = [torch.optim.AdamW(m.parameters()) for m in (ours, theirs)]
    with isograd.watch(ours, optimizers[0]) as monitor:
        for x, y in batches(12):
            for model, optimizer in zip((ours, theirs), optimizers, strict=True):
                optimizer.zero_grad()
                functional.cross_entropy(model(x), y).backward()
            expected = by_hand(ours)
            norm = monitor.clip_(max_norm)
            assert torch.equal(norm, nn.utils.clip_grad_norm_(theirs.parameters(), max_norm))
            for optimizer in optimizers:
                optimizer.step()
            reading = monitor.latest()
            same(reading, expected)
            assert reading.notes == ()
            assert reading.scalars["clipped_norm"] == pytest.approx(min(float(norm), max_norm))
    for a, b in zip(weights(ours), weights(theirs), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_one_value_that_is_not_finite_stays_one(bad: float) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with isograd.watch(model, optimizer) as monitor:
        x, y = next(batches(1))
        hole = torch.zeros(16, 16)
        hole[0, 0] = bad
        model[2].weight.register_hook(lambda gradient: gradient + hole)
        functional.cross_entropy(model(x), y).backward()
        assert not monitor.clip_(1.0).isfinite()
        assert sum(int((~p.grad.isfinite()).sum()) for p in model.parameters() if p.grad is not None) == 1
        optimizer.step()
        reading = monitor.latest()
        assert reading.columns["nonfinite"].tolist() == [0, 0, 1, 0, 0, 0]


def test_after_unscaling() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=4096.0)
    with isograd.watch(model, optimizer) as monitor:
        for x, y in batches(6):
            optimizer.zero_grad()
            scaler.scale(functional.cross_entropy(model(x), y)).backward()
            scaler.unscale_(optimizer)
            expected = by_hand(model)
            norm = monitor.clip_(0.01)
            assert float(norm) == pytest.approx(float(expected["grad_norm"].norm()), rel=1e-5)
            assert float(by_hand(model)["grad_norm"].norm()) == pytest.approx(0.01, rel=1e-3)
            scaler.step(optimizer)
            scaler.update()
            same(monitor.latest(), expected)


def test_it_clips_when_the_monitor_is_closed() -> None:
    model = net()
    monitor = isograd.watch(model, torch.optim.SGD(model.parameters(), lr=0.1))
    monitor.close()
    x, y = next(batches(1))
    functional.cross_entropy(model(x), y).backward()
    monitor.clip_(1e-3)
    assert float(by_hand(model)["grad_norm"].norm()) == pytest.approx(1e-3, rel=1e-2)


def test_what_was_written_to_the_gradients_is_clipped_and_what_is_read_is_raw() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with isograd.watch(model, optimizer) as monitor:
        for x, y in batches(5):
            optimizer.zero_grad()
            functional.cross_entropy(model(x), y).backward()
            expected = by_hand(model)
            for p in model.parameters():
                p.grad.mul_(10)  # type: ignore[union-attr]
            norm = monitor.clip_(0.01)
            assert float(norm) == pytest.approx(10 * float(expected["grad_norm"].norm()), rel=1e-5)
            optimizer.step()
            same(monitor.latest(), expected)
