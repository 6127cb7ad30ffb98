"""Mistakes that monitors of today make, by the number they have in our list of them; each as a test.

5, 7 and 23 are tested with real processes in tests/distributed, 11 and 18 by counting in test_monitor_cost.py.
"""

from __future__ import annotations

import json
import warnings
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from test_monitor import batches, by_hand, net, same
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import isograd
from benchmarks.monitor import Step, plain, row
from benchmarks.workloads import Setting
from isograd.measure import Loss
from isograd.monitor import Reading
from isograd.monitor.detectors import Detectors
from isograd.record import Run


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


def test_06_hooks_that_will_not_fire_are_said() -> None:
    """Of parameters and optimizers from which nothing can be heard, why; nothing of those that can be heard."""

    def told(model: nn.Module, optimizer: torch.optim.Optimizer) -> str:
        with isograd.watch(model, optimizer) as monitor:
            return monitor.diagnosis().unexamined.get("hooks", "")

    model = net()
    assert told(model, torch.optim.SGD(model.parameters())) == ""
    with torch.inference_mode():
        assert "inference_mode" in told(model, torch.optim.SGD(model.parameters()))
        made = net()
    assert "inference tensors" in told(made, torch.optim.SGD(made.parameters()))
    assert all(p.grad is None for p in model.parameters())
    model.requires_grad_(False)
    assert "none of the 6 parameters" in told(model, torch.optim.SGD(model.parameters()))

    class Replaced(torch.optim.SGD):
        pass

    other = net()
    optimizer = Replaced(other.parameters())
    Replaced.step = lambda self, closure=None: None
    assert "was replaced" in told(other, optimizer)


def test_06_steps_that_were_not_seen_are_said() -> None:
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


def test_13_decades_stay_apart(tmp_path: Path) -> None:
    """Gradients of 1e-18 beside those of 1: each keeps its own size, in the reading and in the record."""
    model, optimizer, _ = watched()
    model = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(4)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with isograd.watch(model, optimizer, run=tmp_path / "run") as monitor:
        for i, p in enumerate(model.parameters()):
            p.register_hook(lambda g, i=i: g / g.norm() * 10.0 ** (-6 * i))
        model(torch.ones(2, 4)).sum().backward()
        optimizer.step()
        reading = monitor.latest()
    with Run.open(tmp_path / "run") as run:
        (kept,) = run.readings()
    for seen in (reading, kept):
        assert seen.columns["grad_norm"].log10().tolist() == pytest.approx([0, -6, -12, -18], abs=1e-5)


def test_14_the_largest_element_is_the_largest_and_the_batch_is_no_dimension() -> None:
    """One outlier of 256 elements, whole; and samples that come twice change nothing under a mean loss."""
    model, optimizer, monitor = watched()
    with monitor:
        step(model, optimizer)
        x, y = next(batches(1))
        optimizer.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        once = monitor.latest()
        outlier = torch.zeros(16, 16)
        outlier[3, 7] = 1e3
        hook = model[2].weight.register_hook(lambda gradient: gradient + outlier)
        step(model, optimizer)
        assert monitor.latest().columns["grad_max"][2].item() == pytest.approx(1e3, rel=1e-3)
        hook.remove()
        optimizer.param_groups[0]["lr"] = 0.0
        for repeats in (1, 3):
            optimizer.zero_grad()
            functional.cross_entropy(model(x.repeat(repeats, 1)), y.repeat(repeats)).backward()
            optimizer.step()
            if repeats == 1:
                once = monitor.latest()
        same(monitor.latest(), {name: once.columns[name] for name in ("grad_norm", "grad_max")}, rtol=1e-5)


def test_16_a_run_goes_on_with_what_its_detectors_knew(tmp_path: Path) -> None:
    """What was known goes through JSON, values that are not finite too, and the steps go on counting."""
    model, optimizer, _ = watched()
    monitor = isograd.watch(model, optimizer, run=tmp_path / "run")
    for i in range(20):
        step(model, optimizer, factor=torch.nan if i == 12 else 1.0)
        monitor.log(loss=1.0)
        if i == 12:
            model.load_state_dict(net().state_dict())
    monitor.close()
    state = json.loads(json.dumps(monitor._detectors.state()))
    fresh = Detectors()
    fresh.restore(state)
    assert json.dumps(fresh.state()) == json.dumps(monitor._detectors.state())
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with isograd.watch(model, optimizer, run=tmp_path / "run") as resumed:
        step(model, optimizer)
        assert resumed.latest().step == 20
    assert resumed._detectors.history.count == 20  # 19 finite ones before, and this


def test_17_what_the_page_says_is_what_happens() -> None:
    """The listing of docs/watch.md runs, and its table names the columns that a full reading has."""
    page = (Path(__file__).parents[1] / "docs" / "watch.md").read_text(encoding="utf-8")
    listing = page.split("```python\n")[1].split("```")[0]
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    given = {"model": model, "optimizer": optimizer, "batches": list(batches(3)), "isograd": isograd}
    exec(listing, given | {"cross_entropy": functional.cross_entropy, "print": lambda *_: None})
    table = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `")]
    told = {name for cell in table for name in cell.split("`")[1::2]}
    with isograd.watch(model, optimizer, deep_every=1) as monitor:
        step(model, optimizer)
        assert set(monitor.latest().columns) == told


def test_24_the_benchmark_can_fail() -> None:
    """A method that does the step's work four times over is seen to cost it, by the same rows as ours."""

    def fourfold(model: nn.Module, loss: Loss, optimizer: torch.optim.Optimizer, stack: ExitStack) -> Step:
        once = plain(model, loss, optimizer, stack)
        return lambda: [once() for _ in range(4)] and None

    model = net(256)
    x, y = torch.randn(256, 8), torch.zeros(256, dtype=torch.long)
    setting = Setting(True, "cpu", 1)
    cells = row(
        "fourfold", model, lambda m: functional.cross_entropy(m(x), y), 5, setting, ("torch", fourfold)
    )
    assert float(cells[3].split()[0]) > 2


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


def test_19_steps_in_a_cuda_graph_are_not_seen_and_said_to_be_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """While a graph is captured nothing is read, for reading would become part of it; what follows is not seen."""
    model, optimizer, monitor = watched()
    capturing = False
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    with monitor:
        for _ in range(3):  # warm-up
            step(model, optimizer)
        assert "training" not in monitor.diagnosis().unexamined
        capturing = True
        for _ in range(2):
            step(model, optimizer)
        capturing = False
        assert monitor.latest().step == 2
        assert "steps went into a CUDA graph" in monitor.diagnosis().unexamined["training"]


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
        monkeypatch.setattr("isograd.monitor.parts.Reader.read", lambda *_: 1 / 0)
        for _ in range(3):
            step(model, optimizer)
    assert len(told) == 1


def test_25_nothing_of_the_size_of_the_model_is_kept_between_steps() -> None:
    model, optimizer, monitor = watched()
    with monitor:
        step(model, optimizer)
        held = monitor._host.held
        assert held is not None
        assert sum(packed.values().numel() for packed in held.packed) <= 6 * len(list(model.parameters()))
        assert all(tap._part is None and not tap._sampled._copies for tap in monitor._taps)
