"""Steps looked at from inside: the flow of the training's own batch and loss."""

from __future__ import annotations

import pytest
import torch
from test_monitor import batches, net
from torch import nn
from torch.nn import functional

import isograd


def test_the_flow_of_the_step_itself() -> None:
    """With dropout: the same masks, the same gradients as those of the training."""
    model = nn.Sequential(*net(), nn.Dropout(0.3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with isograd.watch(model, optimizer, deep_every=3) as monitor:
        for step, (x, y) in enumerate(batches(7)):
            optimizer.zero_grad()
            functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            reading = monitor.latest()
            assert (reading.flow is not None) == (step % 3 == 0)
            if reading.flow is not None:
                inside = torch.tensor([10**p.grad_norm_log10 for p in reading.flow.parameters])
                torch.testing.assert_close(inside, reading.columns["grad_norm"], rtol=1e-5, atol=0)
                assert reading.flow.layers == 3
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_a_vanishing_gradient_is_found_while_it_trains() -> None:
    torch.manual_seed(0)
    layers = [m for _ in range(20) for m in (nn.Linear(16, 16), nn.Sigmoid())]
    model = nn.Sequential(nn.Linear(8, 16), nn.Sigmoid(), *layers, nn.Linear(16, 4))
    optimizer = torch.optim.Adam(model.parameters())
    with isograd.watch(model, optimizer, deep_every=5) as monitor:
        for x, y in batches(6):
            optimizer.zero_grad()
            functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        diagnosis = monitor.diagnosis()
    assert diagnosis.verdict == "vanishing"
    assert "VG101" in [finding.code for finding in diagnosis.findings]
    assert diagnosis.flow.layers > 20


@pytest.mark.parametrize("wrapped", ["compiled", "parallel"])
def test_what_cannot_be_looked_at_is_said(wrapped: str) -> None:
    model = net()
    outer = torch.compile(model, backend="eager") if wrapped == "compiled" else nn.DataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with isograd.watch(outer, optimizer, deep_every=1) as monitor:
        for x, y in batches(2):
            functional.cross_entropy(outer(x), y).backward()
            optimizer.step()
        reading = monitor.latest()
        assert reading.sites == tuple(dict(model.named_parameters()))
        assert reading.flow is None
        assert wrapped in monitor.diagnosis().unexamined["activations"]


def test_what_was_not_given_is_unexamined() -> None:
    model = net()
    optimizer = torch.optim.RMSprop(list(model.parameters())[:-1])
    with isograd.watch(model, optimizer) as monitor:
        assert "no step was seen" in monitor.diagnosis().unexamined["training"]
        x, y = next(batches(1))
        functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        said = monitor.diagnosis().unexamined
    assert "monitor.log(loss=loss)" in said["loss"]
    assert "deep_every" in said["activations"]
    assert "4.bias" in said["parameters"]
    assert "RMSprop" in said["updates"]
    assert "training" not in said


def test_dead_units_are_counted_also_of_layers_without_biases() -> None:
    """Nothing else tells them there: no bias has a gradient of zero. Of each look the share of the flow."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(8, 16, bias=False), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)
    )
    with torch.no_grad():
        model[2].bias[:12] = -100.0
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with isograd.watch(model, optimizer, deep_every=1) as monitor:
        for x, y in batches(1):
            functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        reading = monitor.latest()
    dead = dict(zip(reading.sites, reading.columns["dead"].tolist(), strict=True))
    assert dead["2.bias"] == 0.75
    assert 0 <= dead["0.weight"] < 0.5
    assert all(dead[name] != dead[name] for name in ("2.weight", "4.weight", "4.bias"))


def test_units_that_die_are_told_from_looks_alone() -> None:
    """A layer without biases, whose inputs turn to the wrong side: looks from inside see it, four of them suffice."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32, bias=False), nn.ReLU(), nn.Linear(32, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with isograd.watch(model, optimizer, deep_every=2) as monitor:
        for step, (x, y) in enumerate(batches(30)):
            if step == 10:
                with torch.no_grad():
                    model[0].weight[:28, 0] = -1e3
            optimizer.zero_grad()
            functional.cross_entropy(model(torch.cat([x[:, :1].abs() + 1, x[:, 1:]], 1)), y).backward()
            optimizer.step()
        found = {finding.code: finding for finding in monitor.diagnosis().findings}
    assert found["SA303"].sites == ("0.weight",)
