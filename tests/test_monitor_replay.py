"""What broke a step, where a model has several forwards in it, or is called part by part."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from test_monitor import batches
from test_monitor_deep import LINE, Unit
from torch import Tensor, nn
from torch.nn import functional

import isograd
from isograd.diagnosis import Finding
from isograd.monitor.call import Call
from isograd.monitor.monitor import Monitor


def located(monitor: Monitor) -> Finding:
    (found,) = [f for f in monitor.diagnosis().findings if f.matches(("NF401", "NF402"))]
    return found


def test_a_step_that_was_not_located_is_said_to_be_unexamined() -> None:
    """As where a script calls functions on the weights."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, _ = next(batches(1))
    with isograd.watch(model, optimizer, replay=True) as monitor:
        functional.linear(x, model[0].weight).mul(torch.nan).sum().backward()
        optimizer.step()
        assert "no forward of the model or of its parts" in monitor.diagnosis().unexamined["replay"]


class Parted(nn.Module):
    """As a trainer calls it: its parts, and never the whole."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.bodies = nn.ModuleList([nn.Linear(8, 16), nn.Linear(8, 16)])
        self.unit, self.loss = Unit(), nn.CrossEntropyLoss()

    def forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError


@pytest.mark.parametrize("between", [False, True])
def test_a_model_whose_parts_are_called_is_repeated_part_by_part(between: bool) -> None:
    """`between`: what is done with the output of a part breaks, and not the part."""
    model = Parted()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with isograd.watch(model, optimizer, replay=True) as monitor:
        for step, (x, y) in enumerate(batches(5)):
            out = model.unit(x * 0 if step == 4 and not between else x)
            loss = model.loss(out * torch.nan if step == 4 and between else out, y)
            loss = loss + model.bodies[1](x).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        said = located(monitor)
    if between:
        assert (
            said.message
            == "at step 4: the output of unit is finite, and the gradient that the loss sends back to it is not"
        )
    else:
        assert "in unit: " in said.message
        assert str(said.evidence["source"]).endswith(f":{LINE}")


@pytest.mark.parametrize("accumulated", [True, False])
def test_of_several_forwards_the_one_that_broke_is_repeated(accumulated: bool) -> None:
    """Micro-batches that were well are let go; both forwards of a critic are kept until their backward."""
    torch.manual_seed(0)
    model = Unit()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with isograd.watch(model, optimizer, replay=True) as monitor:
        losses: list[Tensor] = []
        for i, (x, y) in enumerate(batches(20 if accumulated else 4)):
            losses.append(functional.cross_entropy(model(x * 0 if i == 1 else x), y))
            if accumulated:
                losses.pop().backward()
                assert len(monitor._replay._calls) <= 2
        if losses:
            torch.stack(losses).sum().backward()
        optimizer.step()
        assert str(located(monitor).evidence["source"]).endswith(f":{LINE}")


def test_what_another_network_made_is_repeated_without_its_graph() -> None:
    """A generator's backward goes through the critic, and uses its own graph up."""
    torch.manual_seed(0)
    maker, critic = nn.Linear(4, 8), Unit()
    optimizer = torch.optim.SGD(critic.parameters(), lr=0.1)
    with isograd.watch(critic, optimizer, replay=True) as monitor:
        critic(maker(torch.zeros(3, 4)) * 0).sum().backward()
        optimizer.step()
        assert str(located(monitor).evidence["source"]).endswith(f":{LINE}")


class Once(nn.Module):
    """Breaks in its first forward only: what a repetition does not bring back."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.calls = nn.Linear(8, 4), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.layer(x) * (torch.nan if self.calls == 1 else 1.0)


def test_what_does_not_break_again_is_not_blamed_on_the_loss() -> None:
    model = Once()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with isograd.watch(model, optimizer, replay=True) as monitor:
        x, y = next(batches(1))
        functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        diagnosis = monitor.diagnosis()
    assert not any(f.matches(("NF401", "NF402")) for f in diagnosis.findings)
    assert "when it was repeated" in diagnosis.unexamined["replay"]


def test_steps_of_another_kind_of_optimizer_are_not_repeated() -> None:
    model = Unit()
    with isograd.watch(model, None, replay=True) as monitor:
        x, y = next(batches(1))
        functional.cross_entropy(model(x * 0), y).backward()
        monitor.step()
        assert "none of torch's" in monitor.diagnosis().unexamined["replay"]


@pytest.mark.parametrize("devices", [False, True])
def test_the_random_state_of_an_accelerator_is_kept_too(
    devices: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def get() -> str:
        asked.append("get")
        return "state"

    ending = "_all" if devices else ""
    methods = {f"get_rng_state{ending}": get, f"set_rng_state{ending}": lambda s: asked.append(f"set {s}")}
    monkeypatch.setattr(torch, "get_device_module", lambda: SimpleNamespace(**methods))
    model = nn.Linear(8, 4)
    call = Call(model, (torch.randn(2, 8),), {})
    out = model(torch.randn(2, 8))
    call.returned(out)
    out.sum().backward()
    assert asked == ["get"]
    call.loss()[0](model)
    assert asked == ["get", "set state"]
