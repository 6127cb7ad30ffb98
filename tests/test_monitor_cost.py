"""What watching costs, counted: operations, synchronisations, memory, graph breaks; and that it changes no bit."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from test_monitor import batches, net, weights
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

import isograd
from isograd.monitor.cost import Cost

SYNCHRONISING = {"aten._local_scalar_dense", "aten.item", "aten.nonzero", "aten.equal", "aten.is_nonzero"}


class Count(TorchDispatchMode):
    """Counts the operations that are called on this thread."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.calls[str(function).rpartition(".")[0]] += 1
        return function(*args, **(kwargs or {}))

    @property
    def waits(self) -> int:
        """Calls for which the host must wait for a device."""
        return sum(count for name, count in self.calls.items() if name in SYNCHRONISING)


def gpt() -> nn.Module:
    """A GPT-2 of 148 parameters."""
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_layer=12, n_embd=16, n_head=2, vocab_size=64, n_positions=16)
    )
    assert len(list(model.parameters())) == 148
    return model


TOKENS = torch.arange(16).view(2, 8)
Step = Callable[[nn.Module, torch.optim.Optimizer], None]


def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    optimizer.step()


def counted(model: nn.Module, optimizer: torch.optim.Optimizer, step: Step = train) -> Count:
    with Count() as count:
        step(model, optimizer)
    return count


def extra(rule: Callable[[nn.Module], torch.optim.Optimizer], steps: int) -> tuple[list[int], list[int]]:
    """Operations and waits that watching adds to each step."""
    plain, watched = gpt(), gpt()
    optimizers = [rule(m) for m in (plain, watched)]
    operations: list[int] = []
    waits: list[int] = []
    with isograd.watch(watched, optimizers[1]):
        for _ in range(steps):
            base, more = (counted(m, o) for m, o in zip((plain, watched), optimizers, strict=True))
            operations.append(sum(more.calls.values()) - sum(base.calls.values()))
            waits.append(more.waits - base.waits)
    return operations, waits


RULES: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "AdamW": lambda m: torch.optim.AdamW(m.parameters()),
    "AdamW fused": lambda m: torch.optim.AdamW(m.parameters(), fused=True),
    "Adam": lambda m: torch.optim.Adam(m.parameters()),
    "SGD": lambda m: torch.optim.SGD(m.parameters(), lr=0.1),
    "SGD momentum": lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1),
}


@pytest.mark.parametrize("rule", RULES)
def test_all_statistics_of_148_parameters_in_12_operations_and_no_wait(
    rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Cost, "interval", lambda self, budget: 1)  # every step in full
    operations, waits = extra(RULES[rule], 14)
    assert max(operations) <= 12
    assert waits == [0] * 14


def test_the_norms_alone_are_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between full readings: one multi-tensor norm, and its results in one tensor."""
    monkeypatch.setattr(Cost, "interval", lambda self, budget: 1000)
    operations, waits = extra(RULES["AdamW"], 16)
    assert set(operations[10:]) == {2}
    assert waits == [0] * 16


def test_the_counter_catches_a_wait() -> None:
    model = gpt()
    optimizer = RULES["SGD"](model)
    base = counted(model, optimizer).waits

    def reads(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        train(model, optimizer)
        for p in model.parameters():
            if p.grad is not None:
                p.grad.norm().item()

    assert counted(model, optimizer, reads).waits == base + 148


def test_memory_of_a_step_that_waits_to_be_read() -> None:
    model = gpt()
    optimizer = RULES["AdamW"](model)
    with isograd.watch(model, optimizer) as monitor:
        train(model, optimizer)
        held = monitor._host.held
        assert held is not None
        assert sum(packed.values().nbytes for packed in held.packed) < 64 * 148


@pytest.mark.parametrize("clip", [False, True])
def test_bitwise_the_same_after_200_steps(clip: bool) -> None:
    def run(watched: bool) -> tuple[list[Tensor], Tensor]:
        model = nn.Sequential(*net(), nn.Dropout(0.1))
        optimizer = torch.optim.AdamW(model.parameters())
        monitor = isograd.watch(model, optimizer, deep_every=50) if watched else None
        torch.manual_seed(3)
        for x, y in batches(200):
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(x), y)
            loss.backward()
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            if monitor is not None:
                monitor.log(loss=loss)
        if monitor is not None:
            assert monitor.latest().step == 199
            monitor.close()
        return weights(model), torch.get_rng_state()

    (plain, state), (watched, state_watched) = run(False), run(True)
    assert all(torch.equal(a, b) for a, b in zip(plain, watched, strict=True))
    assert torch.equal(state, state_watched)


def test_no_graph_break_and_no_recompilation() -> None:
    """Graphs, breaks and frames are counted by dynamo; its aot_eager backend needs no compiler."""

    def run(watched: bool) -> dict[str, int]:
        torch._dynamo.reset()
        counters.clear()
        model = net()
        compiled = torch.compile(model, backend="aot_eager")
        optimizer = torch.optim.AdamW(compiled.parameters())
        monitor = isograd.watch(compiled, optimizer) if watched else None
        for x, y in batches(14):
            optimizer.zero_grad()
            functional.cross_entropy(compiled(x), y).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
        if monitor is not None:
            reading = monitor.latest()
            assert reading.sites == tuple(dict(model.named_parameters()))
            assert reading.step == 13
            assert not reading.columns["grad_norm"].isnan().any()
            monitor.close()
        return {
            "graphs": counters["stats"]["unique_graphs"],
            "breaks": sum(counters["graph_break"].values()),
            "frames": counters["frames"]["total"],
        }

    assert run(True) == run(False) == {"graphs": 1, "breaks": 0, "frames": run(False)["frames"]}


def test_a_compiled_step_is_left_whole() -> None:
    """An optimizer that is compiled too runs without us: nothing is read, and no graph is broken."""
    torch._dynamo.reset()
    counters.clear()
    model = net()
    twin = copy.deepcopy(model)
    for watched in (False, True):
        optimizer = torch.optim.SGD((twin if watched else model).parameters(), lr=0.1)
        compiled = torch.compile(optimizer.step, backend="eager")
        if watched:
            isograd.watch(twin, optimizer)
        for x, y in batches(3):
            optimizer.zero_grad()
            functional.cross_entropy((twin if watched else model)(x), y).backward()
            compiled()
    assert all(torch.equal(a, b) for a, b in zip(weights(model), weights(twin), strict=True))


def test_the_budget_spaces_full_readings_and_latest_asks_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    cost = Cost()
    cost._steps.extend([0.1] * 10)
    cost._full.extend([0.0105] * 4)
    cost._lean.extend([0.0001] * 4)
    assert cost.interval(0.01) == 12  # 10.4 ms more, 0.9 ms a step to spend
    assert cost.interval(0.2) == 1
    monkeypatch.setattr(Cost, "interval", lambda self, budget: 1000)
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with isograd.watch(model, optimizer) as monitor:
        for step, (x, y) in enumerate(batches(16)):
            optimizer.zero_grad()
            functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            if step in (13, 14):
                assert ("update_norm" in monitor.latest().columns) == (step == 14)
                assert "grad_norm" in monitor.latest().columns
