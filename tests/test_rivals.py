"""Networks trained against each other or on each other: seen without a look at a graph, and their losses have no level."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import isograd
from isograd.monitor import rivals
from isograd.monitor.detectors import Detectors
from isograd.monitor.reading import Reading
from isograd.record.row import ELSEWHERE, RIVALS


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))


Loss = Callable[[nn.Module, nn.Module, Tensor], Tensor]


def frozen(network: nn.Module, act: Callable[[], None]) -> None:
    network.requires_grad_(False)
    act()
    network.requires_grad_(True)


def alternate(
    first: Loss, second: Loss, *, freeze: bool = False, to_none: bool = True, steps: int = 8
) -> list[bool]:
    """Which of two networks is told to have a rival; the second is frozen while the first steps, or what it got is thrown away."""
    torch.manual_seed(0)
    one, other = network(), network()
    optimizers = [torch.optim.Adam(n.parameters(), 1e-3) for n in (one, other)]
    with isograd.watch(one, optimizers[0]) as a, isograd.watch(other, optimizers[1]) as b:

        def step(which: int, loss: Loss) -> None:
            optimizers[which].zero_grad(set_to_none=to_none)
            loss(one, other, torch.randn(8, 4)).backward()
            optimizers[which].step()

        for _ in range(steps):
            step(1, second)
            if freeze:
                frozen(other, lambda: step(0, first))
            else:
                step(0, first)
        return [
            "TR701" in m.diagnosis().unexamined and m.diagnosis().unexamined["TR701"] == RIVALS
            for m in (a, b)
        ]


def through(one: nn.Module, other: nn.Module, x: Tensor) -> Tensor:
    return other(one(x)).square().mean()


def alone(one: nn.Module, other: nn.Module, x: Tensor) -> Tensor:
    return functional.softplus(other(x)).mean()


@pytest.mark.parametrize("freeze", [False, True])
@pytest.mark.parametrize("to_none", [False, True])
def test_a_loss_through_the_weights_of_another_is_seen(freeze: bool, to_none: bool) -> None:
    assert alternate(through, alone, freeze=freeze, to_none=to_none) == [True, True]


def test_networks_that_are_trained_beside_each_other_are_no_rivals() -> None:
    assert alternate(lambda one, _other, x: one(x).square().mean(), alone) == [False, False]


@pytest.mark.parametrize("accumulated", [1, 3])
def test_optimizers_of_one_loss_are_no_rivals(accumulated: int) -> None:
    """Also where one steps at every other backward only, and gradients are clipped between."""
    torch.manual_seed(0)
    one, other = network(), network()
    optimizers = [torch.optim.Adam(n.parameters(), 1e-3) for n in (one, other)]
    with isograd.watch(nn.Sequential(one, other), optimizers) as monitor:
        for i in range(12):
            other(one(torch.randn(8, 4))).square().mean().backward()
            nn.utils.clip_grad_norm_(one.parameters(), 0.1)
            if i % accumulated == accumulated - 1:
                for optimizer in optimizers:
                    optimizer.step()
                    optimizer.zero_grad()
        assert RIVALS not in monitor.diagnosis().unexamined.values()


def test_the_loss_of_a_rival_is_no_plateau_and_no_spike_and_the_rest_is_told() -> None:
    for noted in (False, True):
        detectors = Detectors()
        found: set[str] = set()
        for step in range(400):
            notes = (RIVALS,) if noted and step == 3 else ()
            scalars = {"loss": 1.0 + 0.001 * (step % 7) + 5.0 * (step > 350), "grad_norm": 1.0}
            columns = {name: torch.ones(1) for name in ("grad_norm", "weight_norm", "update_norm")}
            row = Reading(step, ("weight",), columns, scalars, notes, float(step), ((4, 4),))
            found |= {finding.code for finding in detectors.observe(row)}
        assert bool(found & {"TR701", "TR702"}) != noted
        assert (detectors.outcomes()[1].get("TR701") == RIVALS) == noted


@pytest.mark.parametrize(("which", "of"), [(1, 0), (0, 1)])
def test_what_another_network_broke_is_told_as_its_fault(which: int, of: int) -> None:
    """The critic steps first and the generator after it; one of them breaks, and by its weights the other."""
    torch.manual_seed(0)
    one, other = network(), network()
    optimizers = [torch.optim.Adam(n.parameters(), 1e-3) for n in (one, other)]
    with isograd.watch(one, optimizers[0], replay=True) as a, isograd.watch(other, optimizers[1]) as b:
        for i in range(16):
            for turn in (1, 0):
                optimizers[turn].zero_grad()
                made = one(torch.randn(8, 4))
                loss = other(made if turn == 0 else made.detach()).square().mean()
                (loss * (math.nan if i == 12 and turn == which else 1)).backward()
                optimizers[turn].step()
        told = [next(f for f in m.diagnosis().findings if f.code == "NF405") for m in (a, b)]
        assert told[which].evidence["cause"] == "sudden"
        assert told[of].evidence["cause"] == "other-network"
        if of == 0:
            assert a.diagnosis().unexamined["replay"] == ELSEWHERE
            assert "NF402" not in {f.code for f in a.diagnosis().findings}
        else:
            assert a.diagnosis().unexamined.get("replay") != ELSEWHERE


def test_a_monitor_that_was_closed_is_no_rival() -> None:
    one, other = network(), network()
    watched = [isograd.watch(n, torch.optim.SGD(n.parameters(), 1e-3)) for n in (one, other)]
    own = [m._taps[0].provenance.rivals for m in watched]
    watched[1].close()
    assert own[0] in rivals._all
    assert own[1] not in rivals._all
    own[0]._frozen_for.add(own[1])
    watched[0]._taps[0].provenance.rivals.began(next(one.parameters()), -1)
    assert own[0]._seen == 0
    watched[0].close()
