"""What watching costs, counted: operations, synchronisations, memory, graph breaks; and that it changes no bit."""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Callable, Sequence
from threading import Event
from typing import Any

import pytest
import torch
import transformers
from test_monitor import batches, net, weights
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import isograd
from isograd.diagnosis import Finding
from isograd.monitor import Reading, host, statistics
from isograd.monitor import cost as cost_module
from isograd.monitor.cost import ALERT, YOUNG, Cost, Pace
from isograd.monitor.detectors import Detectors
from isograd.monitor.host import Ended, Host, alike, reading_of, readings_of

SYNCHRONISING = {"aten._local_scalar_dense", "aten.item", "aten.nonzero", "aten.equal", "aten.is_nonzero"}


class Count(TorchDispatchMode):
    """Counts the operations that are called on this thread."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.largest = 0
        """Bytes of the largest result."""

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.calls[str(function).rpartition(".")[0]] += 1
        result = function(*args, **(kwargs or {}))
        made = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        self.largest = max(self.largest, sum(t.numel() * t.element_size() for t in made))
        return result

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


def test_temporaries_are_below_a_hundredth_of_what_training_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of weights, gradients and two moments; all columns, from gradients and updates."""
    monkeypatch.setattr(statistics, "LEAST", 1)
    monkeypatch.setattr(Cost, "interval", lambda self, budget: 1)
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(32, 32) for _ in range(100)))
    held = 4 * sum(p.numel() * p.element_size() for p in model.parameters())
    optimizer = torch.optim.AdamW(model.parameters())
    with isograd.watch(model, optimizer), Count() as count:
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.ones(2, 32)).sum().backward()
            optimizer.step()
    assert count.calls["aten._foreach_abs"] > 3
    assert count.largest < held / 100


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


# -- steps that are taken together -------------------------------------------------------------------------


def ended(steps: int, monkeypatch: pytest.MonkeyPatch, every: int = 3) -> list[Ended]:
    """Steps as the training thread hands them over, one in `every` read in full."""
    monkeypatch.setattr(Cost, "interval", lambda self, budget: every)
    handed: list[Ended] = []
    monkeypatch.setattr(Host, "put", lambda self, ended, now=False: handed.append(ended))
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=5)
    with isograd.watch(model, optimizer) as monitor:
        for step, (x, y) in enumerate(batches(steps)):
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(x), y)
            scaler.scale(loss * (torch.nan if step == 12 else 1.0)).backward()
            scaler.step(optimizer)
            scaler.update()
            monitor.log(loss=loss)
    monkeypatch.undo()
    return handed


def test_readings_made_together_are_those_made_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = ended(30, monkeypatch)
    runs = list(alike(steps))
    assert 5 < len(runs) < 30
    together = [reading for run in runs for reading in readings_of(run)]
    for one, other in zip(map(reading_of, steps), together, strict=True):
        assert (one.step, one.sites, one.notes, one.shapes) == (
            other.step,
            other.sites,
            other.notes,
            other.shapes,
        )
        assert one.scalars == pytest.approx(other.scalars, rel=1e-12, nan_ok=True)
        assert one.columns.keys() == other.columns.keys()
        for name, column in one.columns.items():
            assert torch.equal(column.nan_to_num(-1.0), other.columns[name].nan_to_num(-1.0)), name


def test_detectors_find_the_same_in_steps_taken_together(monkeypatch: pytest.MonkeyPatch) -> None:
    readings = [reading_of(step) for step in ended(60, monkeypatch)]
    readings[20].scalars["loss"] = torch.inf
    single, together = Detectors(), Detectors()
    found = [single.observe(reading) for reading in readings]
    assert any(found)
    assert [f for i in range(0, 60, 16) for f in together.follow(readings[i : i + 16])] == found
    assert json.dumps(single.state()) == json.dumps(together.state())


class Batches:
    """An observer that keeps how many steps came together."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def follow(self, readings: Sequence[Reading]) -> list[tuple[Finding, ...]]:
        self.sizes.append(len(readings))
        return [()] * len(readings)


def test_steps_wait_for_each_other_and_for_nobody_who_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = ended(12, monkeypatch, every=1)
    monkeypatch.setattr(host, "LINGER", 60.0)
    observer, told = Batches(), Event()
    taken: list[int] = []

    def sink(scalars: dict[str, float], step: int) -> None:
        taken.append(step)
        if step == 11:
            told.set()

    taker = Host(observer, None, [sink], Pace(1.0, Cost()))
    for step in steps[:9]:
        taker.put(step)
    taker.drain()
    assert observer.sizes == [9]
    taker.put(steps[9])
    taker.put(steps[10])
    taker.put(steps[11], now=True)  # as a step is that is not finite
    assert told.wait(30.0)
    assert observer.sizes == [9, 3]
    taker.put(steps[0])
    taker.close()
    assert taken == [*range(12), 0]


def test_a_step_that_is_not_finite_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "LINGER", 60.0)
    told = Event()

    def sink(scalars: dict[str, float], step: int) -> None:
        if step == 3:
            told.set()

    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with isograd.watch(model, optimizer, sinks=[sink]):
        for step, (x, y) in enumerate(batches(5)):
            optimizer.zero_grad()
            (functional.cross_entropy(model(x), y) * (torch.nan if step == 3 else 1.0)).backward()
            optimizer.step()
        assert told.wait(30.0)


def test_what_the_host_thread_takes_keeps_to_its_share() -> None:
    def plain(step: int, norm: float = 1.0, **columns: Tensor) -> Reading:
        return Reading(step, ("w",), {"grad_norm": torch.ones(1), **columns}, {"grad_norm": norm})

    cost = Cost()
    pace = Pace(0.005, cost)
    assert all(pace.keeps(plain(step)) for step in range(YOUNG))
    assert pace.spacing == 1
    cost.step = 0.01
    for _ in range(8):
        pace.took(0.003, 10)  # 0.3 ms a reading, 10 ms a step: 50 us of them are its share
    assert pace.spacing == 6
    start = YOUNG
    assert [i for i in range(24) if pace.keeps(plain(start + i))] == [5, 11, 17, 23]
    start += 24
    assert pace.keeps(plain(start, norm=2.0)), "it stands out"
    assert all(pace.keeps(plain(start + i)) for i in range(1, ALERT))
    start += ALERT
    assert not pace.keeps(plain(start))
    assert pace.keeps(plain(start + 1, weight_norm=torch.ones(1))), "a full reading"
    assert not any(pace.keeps(plain(start + i), due=False) for i in range(2, 20))


# -- readings between those in full ------------------------------------------------------------------------


def unfreeze(model: nn.Sequential, optimizer: torch.optim.Optimizer, step: int) -> None:
    model[0].requires_grad_(not 3 <= step < 6)


def grow(model: nn.Sequential, optimizer: torch.optim.Optimizer, step: int) -> None:
    if step == 3:
        model.append(nn.Linear(4, 4))
        optimizer.add_param_group({"params": list(model[5].parameters())})


def convert(model: nn.Sequential, optimizer: torch.optim.Optimizer, step: int) -> None:
    """The same parameters in another precision, and then in two."""
    if step == 3:
        model.double()
    if step == 6:
        model[0].float()


CHANGES = [unfreeze, grow, convert]


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_remembered_of_the_parameters_follows_them(
    change: Callable[[nn.Sequential, torch.optim.Optimizer, int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cost_module, "FIRST", 0)
    monkeypatch.setattr(Cost, "interval", lambda self, budget: 1000)
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    found: list[dict[str, float]] = []
    expected: list[dict[str, float]] = []
    with isograd.watch(model, optimizer, sinks=[lambda scalars, step: found.append(scalars)]):
        for step, (x, y) in enumerate(batches(9)):
            change(model, optimizer, step)
            optimizer.zero_grad()
            h = model[0](x.to(model[0].weight.dtype))
            functional.cross_entropy(model[1:](h.to(model[2].weight.dtype)), y).backward()
            expected.append(
                {
                    f"isograd/grad_norm/{name}": float(p.grad.norm())
                    for name, p in model.named_parameters()
                    if p.grad is not None
                }
            )
            optimizer.step()
    for one, other in zip(found, expected, strict=True):
        told = {name: value for name, value in one.items() if name.startswith("isograd/grad_norm/")}
        assert told == pytest.approx(other, rel=1e-5)
    assert "isograd/weight_norm/0.weight" not in found[-1]


def test_zeros_cost_no_operation_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gradient that is exactly zero may be one whose squares underflow: all of them are looked at together."""
    monkeypatch.setattr(Cost, "interval", lambda self, budget: 1000)

    def dead(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        (model(input_ids=TOKENS, labels=TOKENS).loss * 0.0).backward()
        optimizer.step()

    model = gpt()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    base = sum(counted(model, optimizer, dead).calls.values())
    with isograd.watch(model, optimizer):
        operations = [sum(counted(model, optimizer, dead).calls.values()) - base for _ in range(14)]
    assert max(operations[10:]) <= 16


def test_a_clip_that_does_not_clip_scales_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three operations less than torch's, of which one goes through all gradients."""
    monkeypatch.setattr(Cost, "interval", lambda self, budget: 1000)

    def clipped(clip: Callable[[nn.Module], object]) -> Step:
        def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
            optimizer.zero_grad()
            model(input_ids=TOKENS, labels=TOKENS).loss.backward()
            clip(model)
            optimizer.step()

        return step

    model, stock = gpt(), gpt()
    optimizer, other = RULES["AdamW"](model), RULES["AdamW"](stock)
    theirs = clipped(lambda m: nn.utils.clip_grad_norm_(m.parameters(), 1e9))
    with isograd.watch(model, optimizer) as monitor:
        ours = clipped(lambda _: monitor.clip_(1e9))
        for _ in range(12):
            count, torchs = counted(model, optimizer, ours).calls, counted(stock, other, theirs).calls
    assert sum(count.values()) <= sum(torchs.values()) - 3
    assert count["aten._foreach_mul_"] == torchs["aten._foreach_mul_"] - 1
