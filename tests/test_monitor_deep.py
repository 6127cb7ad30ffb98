"""Steps looked at from inside: the flow of the training's own batch and loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from test_monitor import batches, net
from torch import Tensor, nn
from torch.nn import functional

import isograd
from isograd.monitor.replay import REPLAYS


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


class Unit(nn.Module):
    """Rows of length one; a row of zeros has none."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.out = nn.Linear(8, 16, bias=False), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.inp(x)
        h = nn.functional.dropout(h, 0.1)
        h = h / h.norm(dim=-1, keepdim=True)  # here
        return self.out(h)


LINE = next(i for i, text in enumerate(Path(__file__).read_text().splitlines(), 1) if text.endswith("# here"))


def broken(
    spoil: Callable[[Tensor], Tensor], term: Callable[[Tensor], Tensor], *, replay: bool = True
) -> tuple[isograd.Diagnosis, Tensor]:
    """Twenty steps; one batch is spoiled, and has a term of its own in its loss."""
    torch.manual_seed(0)
    model = Unit()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with isograd.watch(model, optimizer, replay=replay) as monitor:
        for step, (x, y) in enumerate(batches(20)):
            out = model(spoil(x) if step == 15 else x)
            loss = functional.cross_entropy(out, y) + (term(out) if step == 15 else 0.0)
            optimizer.zero_grad()
            loss.backward()
            if step < 19:
                optimizer.step()
        return monitor.diagnosis(), torch.get_rng_state()


def nothing(out: Tensor) -> Tensor:
    return out.sum() * 0


def test_a_step_that_breaks_is_repeated_and_what_broke_it_has_its_line() -> None:
    found, state = broken(lambda x: x.index_fill(0, torch.tensor([2]), 0.0), nothing)
    first = next(finding for finding in found.findings if finding.code == "NF401")
    assert str(first.evidence["source"]).endswith(f"test_monitor_deep.py:{LINE}")
    assert first.evidence["operation"] == "div"
    assert first.message.startswith("at step 15: ")
    assert sum(finding.code == "NF401" for finding in found.findings) == 1
    _, alone = broken(lambda x: x.index_fill(0, torch.tensor([2]), 0.0), nothing, replay=False)
    assert torch.equal(state, alone)  # the dropout of the repetition drew nothing


def test_of_a_step_that_the_loss_broke_that_is_said() -> None:
    found, _ = broken(lambda x: x, lambda out: (out - out.detach()).square().sum().sqrt())
    (said,) = [finding for finding in found.findings if finding.code == "NF402"]
    assert "the output of the model is finite" in said.message
    assert said.evidence["phase"] == "loss"


def test_of_a_step_that_its_batch_broke_that_is_said() -> None:
    found, _ = broken(lambda x: x * torch.nan, nothing)
    (said,) = [finding for finding in found.findings if finding.code == "NF401"]
    assert "argument x holds a NaN" in said.message


def test_a_model_that_cannot_be_repeated_is_said_to_be_unexamined() -> None:
    model = torch.compile(Unit(), backend="eager")
    assert isinstance(model, nn.Module)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with isograd.watch(model, optimizer, replay=True) as monitor:
        assert "compiled" in monitor.diagnosis().unexamined["replay"]
        for x, y in batches(REPLAYS + 1):
            functional.cross_entropy(model(x * torch.nan), y).backward()
            optimizer.step()
        assert "compiled" in monitor.diagnosis().unexamined["replay"]  # also when all have been tried


class Returning(nn.Module):
    """Logits beside the hidden state that they are made from, in a container."""

    def __init__(self, wrap: Callable[[Tensor, Tensor], object]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head, self.wrap = nn.Linear(8, 16), nn.Linear(16, 4), wrap

    def forward(self, x: Tensor) -> object:
        hidden = torch.tanh(self.body(x))
        return self.wrap(self.head(hidden), hidden)


@dataclass
class Output:
    logits: Tensor
    hidden: Tensor


@pytest.mark.parametrize(
    ("wrap", "take"),
    [
        (lambda out, hidden: (out, hidden), lambda all: all[0]),
        (lambda out, hidden: {"hidden": [hidden], "logits": out}, lambda all: all["logits"]),
        (Output, lambda all: all.logits),
        (lambda out, _hidden: torch.distributions.Categorical(logits=out), lambda all: all.logits),
    ],
    ids=["tuple", "dict", "dataclass", "distribution"],
)
def test_whatever_the_model_returns_its_step_is_looked_at(
    wrap: Callable[[Tensor, Tensor], object], take: Callable[[Any], Tensor]
) -> None:
    """The gradient of what is made from a hidden state counts once, and a term of the loss on that state too."""
    model = Returning(wrap)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with isograd.watch(model, optimizer, deep_every=1, replay=True) as monitor:
        for x, y in batches(2):
            optimizer.zero_grad()
            out = model(x)
            loss = functional.cross_entropy(take(out), y)
            (loss + out[1].square().mean() if isinstance(out, tuple) else loss).backward()
            optimizer.step()
            reading = monitor.latest()
            assert reading.flow is not None
            inside = torch.tensor([10**p.grad_norm_log10 for p in reading.flow.parameters])
            torch.testing.assert_close(inside, reading.columns["grad_norm"], rtol=1e-4, atol=0)
        functional.cross_entropy(take(model(x)) * torch.nan, y).backward()
        optimizer.step()
        (said,) = [finding for finding in monitor.diagnosis().findings if finding.code == "NF402"]
    assert "targets" in said.cause
