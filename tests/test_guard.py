"""A guard: bitwise nothing where nothing breaks, and a training that goes on where something does."""

from __future__ import annotations

import copy
import json
import math
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from click.testing import CliRunner
from test_monitor import batches, net
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import isograd
from isograd.cli import cli
from isograd.monitor.guard import BROKEN, LONG, MOST, SETTLED, _together
from isograd.monitor.parts import Reader
from isograd.monitor.sharding import local
from isograd.monitor.snapshot import Snapshot
from isograd.record import Run


def trained(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: int,
    *,
    spoil: Callable[[int, Tensor], Tensor] = lambda _step, x: x,
    guard: isograd.Guard | None = None,
) -> list[float]:
    """The losses."""
    losses: list[float] = []
    for step, (x, y) in enumerate(batches(steps)):
        loss = functional.cross_entropy(model(spoil(step, x)), y)
        optimizer.zero_grad()
        loss.backward()
        if guard is None:
            optimizer.step()
        else:
            guard.step(loss)
        losses.append(float(loss.detach()))
    return losses


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_an_adaptive_clip_follows_the_norms_and_learns_nothing_from_what_is_not_finite() -> None:
    limit = isograd.AdaptiveClip(z=3, warm_up=10)
    generator = torch.Generator().manual_seed(0)
    norms = 10 ** (1 + 0.1 * torch.randn(200, generator=generator))
    given = [limit.limit(norm) for norm in norms]
    assert all(math.isinf(value) for value in given[:10])
    assert 10**1.2 <= float(given[-1]) <= 10**1.5  # three spreads of a tenth of a decade above ten
    before = limit.state_dict()
    for bad in (math.nan, math.inf, 0.0):
        limit.limit(torch.tensor(bad))
        assert limit.state_dict() == before
    spike = limit.limit(torch.tensor(1e6))
    assert float(spike) == pytest.approx(float(given[-1]), rel=0.1)
    after = float(limit.limit(norms[0]))
    assert float(spike) < after < 1.3 * float(spike)  # the spike counts as the limit that it was clipped to
    again = isograd.AdaptiveClip(z=3, warm_up=10)
    again.load_state_dict(json.loads(json.dumps(limit.state_dict())))
    assert torch.equal(again.limit(norms[1]), limit.limit(norms[1]))


def test_a_spike_of_the_gradient_is_clipped_to_what_is_usual() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    limit = isograd.AdaptiveClip()
    with isograd.watch(model, optimizer) as monitor:
        for step, (x, y) in enumerate(batches(60)):
            optimizer.zero_grad()
            (functional.cross_entropy(model(x), y) * (1e4 if step == 50 else 1)).backward()
            monitor.clip_(limit)
            optimizer.step()
            shown = monitor.latest().scalars
            if step == 50:
                assert shown["grad_norm"] > 1e3
                assert shown["clipped_norm"] < 2
            elif step != 51:
                assert shown["clipped_norm"] == pytest.approx(shown["grad_norm"], rel=0.5)


def test_each_unit_is_clipped_to_a_share_of_its_weights() -> None:
    """Rows of a matrix, filters of a convolution, whole vectors; what is not finite stays where it is."""
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    torch.manual_seed(0)
    with isograd.watch(model, optimizer) as monitor:
        model(torch.randn(5, 1, 8, 8)).square().sum().mul(1e3).backward()
        head = model[2].weight.grad
        assert isinstance(head, Tensor)
        head[1, 0] = math.nan
        raw = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        norm = monitor.clip_units_(0.01)
        assert not norm.isfinite()
        optimizer.step()
        monitor.latest()
    for p, before in zip(model.parameters(), raw, strict=True):
        assert p.grad is not None
        rows = [(p, p.grad, before)] if p.ndim == 1 else list(zip(p, p.grad, before, strict=True))
        for weight, gradient, old in rows:
            limit = 0.01 * max(float(weight.detach().norm()), 1e-3)
            if not old.isfinite().all():
                assert torch.equal(gradient.nan_to_num(), old.nan_to_num())
            elif old.norm() <= limit:
                assert torch.equal(gradient, old)
            else:
                assert float(gradient.norm()) == pytest.approx(limit, rel=1e-4)


def test_units_clipped_beside_a_reading_that_is_raw() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with isograd.watch(model, optimizer) as monitor:
        for x, y in batches(3):
            optimizer.zero_grad()
            functional.cross_entropy(100 * model(x), y).backward()
            raw = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm()
            norm = monitor.clip_units_(0.01)
            now = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm()
            optimizer.step()
            shown = monitor.latest()
            assert float(norm) == pytest.approx(float(raw), rel=1e-5)
            assert shown.scalars["grad_norm"] == pytest.approx(float(raw), rel=1e-5)
            assert shown.scalars["clipped_norm"] == pytest.approx(float(now), rel=1e-5)
            assert shown.notes == ()


def whats(guard: isograd.Guard) -> list[str]:
    return [event.what for event in guard.events]


@pytest.fixture
def guarded() -> Iterator[tuple[nn.Sequential, torch.optim.Optimizer, isograd.Guard]]:
    model = net()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    with isograd.watch(model, optimizer):
        yield model, optimizer, isograd.Guard(model, optimizer, every=20, recover=30)


def test_where_nothing_breaks_the_weights_are_bitwise_those_without_it() -> None:
    def made(with_it: bool) -> tuple[Tensor, Tensor]:
        model = net()
        model.append(nn.Dropout(0.1))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        torch.manual_seed(1)
        with isograd.watch(model, optimizer):
            guard = isograd.Guard(model, optimizer, every=20) if with_it else None
            trained(model, optimizer, 200, guard=guard)
            assert guard is None or not guard.events
        return flat(model), torch.get_rng_state()

    for alone, beside in zip(made(False), made(True), strict=True):
        assert torch.equal(alone, beside)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_batch_that_is_not_finite_is_left_out_and_leaves_no_trace(bad: float) -> None:
    """Also in the averages of a batch normalisation, which its forward has reached."""
    model = net()
    model.insert(1, nn.BatchNorm1d(16))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def spoil(step: int, x: Tensor) -> Tensor:
        return x.index_fill(0, torch.tensor([0]), bad) if step in (30, 31) else x

    with isograd.watch(model, optimizer) as monitor:
        guard = isograd.Guard(model, optimizer, every=20)
        trained(model, optimizer, 31, spoil=spoil, guard=guard)
        assert whats(guard) == ["left out"]
        assert any(note.startswith("isograd.Guard: left out") for note in monitor.latest().notes)
        before = flat(model), int(next(iter(optimizer.state.values()))["step"])
        trained(model, optimizer, 1, spoil=lambda _step, x: x * bad, guard=guard)
    assert torch.equal(flat(model), before[0])
    assert int(next(iter(optimizer.state.values()))["step"]) == before[1] == 30
    assert all(bool(buffer.isfinite().all()) for buffer in model.buffers())


Guarded = tuple[nn.Sequential, torch.optim.Optimizer, isograd.Guard]


def test_batches_that_stay_bad_are_left_out_and_the_rate_is_given_back(guarded: Guarded) -> None:
    model, optimizer, guard = guarded
    trained(model, optimizer, 50, guard=guard)
    with pytest.warns(UserWarning, match="left out 20 steps in a row.*find_nonfinite"):
        trained(model, optimizer, LONG + 5, spoil=lambda _step, x: x * math.nan, guard=guard)
    assert whats(guard).count("went back") == 2  # at once, and to the oldest when nothing else comes
    assert "the batch is to blame" in next(e.why for e in guard.events if e.what == "gave back")
    assert guard.factor == 1
    assert all(math.isfinite(loss) for loss in trained(model, optimizer, 20, guard=guard))


def test_weights_that_broke_are_those_of_a_snapshot_again_and_the_optimizer_too(guarded: Guarded) -> None:
    model, optimizer, guard = guarded
    trained(model, optimizer, 20, guard=guard)
    kept = flat(model), [state["exp_avg"].clone() for state in optimizer.state.values()]
    trained(model, optimizer, SETTLED, guard=guard)
    with torch.no_grad():
        nn.init.constant_(cast("nn.Linear", model[2]).weight, math.inf)
    trained(model, optimizer, BROKEN, guard=guard)
    assert whats(guard) == ["left out"] * (BROKEN - 1) + ["went back"]
    assert "to step 20" in guard.events[-1].why
    assert torch.equal(flat(model), kept[0])
    for state, moment in zip(optimizer.state.values(), kept[1], strict=True):
        assert torch.equal(state["exp_avg"], moment)
        assert int(state["step"]) == 20


def test_what_diverges_goes_back_at_half_the_rate_and_no_scheduler_sees_it(guarded: Guarded) -> None:
    model, optimizer, guard = guarded
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.999)
    trained(model, optimizer, 60, guard=guard)
    good = flat(model)
    with torch.no_grad():
        for p in model.parameters():
            p *= 8
    used: list[float] = []
    optimizer.register_step_pre_hook(lambda o, _args, _kwargs: used.append(o.param_groups[0]["lr"]))
    trained(model, optimizer, 10, guard=guard)
    scheduler.step()
    back = next(event for event in guard.events if event.what == "went back")
    assert "the loss" in back.why
    assert (good - flat(model)).norm() < 0.5 * good.norm()
    assert guard.factor == 0.5
    assert used[-1] == pytest.approx(5e-3)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-2 * 0.999)
    trained(model, optimizer, 40, guard=guard)
    assert whats(guard)[-1] == "gave back"
    assert guard.factor == 1


def test_a_rate_that_is_too_high_is_lowered_until_the_training_holds() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=30.0)
    with isograd.watch(model, optimizer):
        guard = isograd.Guard(model, optimizer, every=20)
        losses = trained(model, optimizer, 250, guard=guard)
    assert guard.factor < 0.5
    assert losses[-1] < 1.5 * losses[0]
    assert "went back" in repr(guard)


def test_where_no_lower_rate_helps_it_gives_up_once() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    @torch.no_grad()
    def swell(*_: object) -> None:
        for p in model.parameters():
            p *= 1.3

    optimizer.register_step_post_hook(swell)
    with isograd.watch(model, optimizer):
        guard = isograd.Guard(model, optimizer)
        with pytest.warns(UserWarning, match=f"went back {MOST} times and gives up") as told:
            trained(model, optimizer, 30 * MOST, guard=guard)
    assert len(told) == 1
    assert whats(guard).count("went back") == MOST
    assert whats(guard).count("gave up") == 1


def test_a_training_whose_first_batches_are_bad_begins_with_the_first_that_is_not(guarded: Guarded) -> None:
    model, optimizer, guard = guarded
    start = flat(model)
    trained(model, optimizer, 8, spoil=lambda step, x: x * math.nan if step < BROKEN + 2 else x, guard=guard)
    assert guard.factor == 1
    assert int(next(iter(optimizer.state.values()))["step"]) == 8 - BROKEN - 2
    assert not torch.equal(start, flat(model))


def test_batches_that_are_far_out_are_left_out_and_others_go_on(guarded: Guarded) -> None:
    """At weights whose loss was well it is the batch; where nothing else comes, that is what there is to learn."""
    model, optimizer, guard = guarded
    model[1] = nn.ReLU()  # no tanh that holds it back
    trained(model, optimizer, 60, guard=guard)

    def far(step: int, x: Tensor) -> Tensor:
        return 300 * x if step < 12 else x

    trained(model, optimizer, 40, spoil=far, guard=guard)
    assert whats(guard)[:2] == ["went back", "gave back"]
    assert set(whats(guard)[2:]) == {"left out"}
    assert guard.factor == 1
    with pytest.warns(UserWarning, match="left out 20 steps in a row"):
        trained(model, optimizer, 60, spoil=lambda _step, x: 300 * x, guard=guard)
    stepped = flat(model)
    trained(model, optimizer, 1, spoil=lambda _step, x: 300 * x, guard=guard)
    assert not torch.equal(stepped, flat(model))


def test_an_overflow_is_the_scalers_matter() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=5)
    with isograd.watch(model, optimizer):
        guard = isograd.Guard(model, optimizer)
        for x, y in batches(60):
            loss = functional.cross_entropy(100 * model(x), y)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            guard.step(loss, scaler=scaler)
    assert scaler.get_scale() < 2.0**127
    assert not guard.events


def test_two_optimizers_step_together_and_go_back_together() -> None:
    model = net()
    first, second = (torch.optim.SGD(model[i].parameters(), lr=0.1, momentum=0.9) for i in (0, 2))
    with isograd.Guard(model, [first, second]) as guard:
        start = flat(model)
        trained(model, first, 20, guard=guard)
        assert not torch.equal(flat(model), start)
        with torch.no_grad():
            nn.init.constant_(cast("nn.Linear", model[0]).weight, math.nan)
        trained(model, first, BROKEN, guard=guard)
    assert torch.equal(flat(model), start)
    assert not first.state
    assert not second.state


def test_a_training_that_is_resumed_knows_its_rate(guarded: Guarded) -> None:
    model, optimizer, guard = guarded
    trained(model, optimizer, 40, guard=guard)
    with torch.no_grad():
        nn.init.constant_(cast("nn.Linear", model[2]).weight, math.nan)
    trained(model, optimizer, BROKEN, guard=guard)
    state = json.loads(json.dumps(guard.state_dict()))
    again = isograd.Guard(model, optimizer)
    again.load_state_dict(state)
    assert again.factor == guard.factor == 0.5
    assert again.state_dict() == state
    trained(model, optimizer, 5, guard=again)


def test_the_report_of_a_run_tells_what_was_done(tmp_path: Path) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with isograd.watch(model, optimizer, run=tmp_path / "run"):
        guard = isograd.Guard(model, optimizer)
        trained(model, optimizer, 20, spoil=lambda step, x: x * math.nan if step > 15 else x, guard=guard)
    assert str(guard.events[0]) == "step 16: left out, the loss is nan"
    said = CliRunner().invoke(cli, ["report", str(tmp_path / "run")]).output
    assert "step 16     isograd.Guard: left out, the loss is nan\n" in said
    assert "step 18     isograd.Guard: went back, to step 0: the loss is nan" in said


def test_wrong_arguments_say_what_to_type() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with isograd.watch(model, optimizer):
        with pytest.raises(ValueError, match="every=16 or more"):
            isograd.Guard(model, optimizer, every=1)
        with pytest.raises(ValueError, match="between 0 and 1"):
            isograd.Guard(model, optimizer, backoff=2)
        with pytest.raises(ValueError, match=r"one number.*\(2,\)"):
            isograd.Guard(model, optimizer).step(torch.ones(2))
        with pytest.raises(ValueError, match=r"watched already: give run to isograd\.watch"):
            isograd.Guard(model, optimizer, run="runs/a")
        with pytest.raises(ValueError, match="all optimizers that are watched together"):
            isograd.Guard(model, [optimizer, torch.optim.SGD(model.parameters(), lr=0.1)])
    with pytest.raises(TypeError, match="give it one of torch's"):
        isograd.Guard(model, None)  # type: ignore[arg-type]


def test_a_guard_alone_watches_and_beside_a_monitor_takes_it(tmp_path: Path) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with isograd.watch(model, optimizer) as monitor:
        with isograd.Guard(model, optimizer) as guard:
            assert guard.monitor is monitor
        trained(model, optimizer, 1)
        assert monitor.latest().step == 0  # it is not the guard's to close
    with isograd.Guard(model, optimizer, run=tmp_path / "run") as guard:
        trained(model, optimizer, 5, guard=guard)
    with Run.open(tmp_path / "run") as kept:
        assert [reading.step for reading in kept.readings()] == [0, 1, 2, 3, 4]


def test_a_scaler_that_is_off_is_none() -> None:
    """`GradScaler(enabled=…)` is how one script serves all number formats: nothing skips an overflow then."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with isograd.Guard(model, optimizer) as guard:
        x, y = next(batches(1))
        functional.cross_entropy(model(x), y).mul(math.inf).backward()
        assert not guard.step(1.0, scaler=torch.amp.GradScaler("cpu", enabled=False))
    assert flat(model).isfinite().all()


def test_no_more_than_two_snapshots_are_in_memory_and_none_after_the_close(
    guarded: Guarded, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer, guard = guarded
    alive: weakref.WeakSet[Snapshot] = weakref.WeakSet()
    most: list[int] = []

    class Counted(Snapshot):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            alive.add(self)
            most.append(len(alive))

    monkeypatch.setattr("isograd.monitor.guard.Snapshot", Counted)
    trained(model, optimizer, 100, guard=guard)
    assert len(most) > 2
    assert max(most) == 2
    guard.close()
    assert not alive
    with pytest.raises(RuntimeError, match="this guard is closed"):
        trained(model, optimizer, 1, guard=guard)


def test_a_cell_that_is_run_again_makes_another_guard(tmp_path: Path) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        guard = isograd.Guard(model, optimizer, run=tmp_path / "run")
        trained(model, optimizer, 3, guard=guard)
    guard.close()
    with Run.open(tmp_path / "run") as kept:
        assert [reading.step for reading in kept.readings()] == [0, 1, 2, 3, 4, 5]


class Kept(nn.Module):
    """Buffers that are other tensors after each forward, one that grows, one that is expanded."""

    average: Tensor
    queue: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.inner = net()
        self.register_buffer("average", torch.zeros(8))
        self.register_buffer("queue", torch.zeros(0))
        self.register_buffer("mask", torch.tensor(-math.inf).expand(4))

    def forward(self, x: Tensor) -> Tensor:
        self.average = 0.9 * self.average + 0.1 * x.mean(0)
        self.queue = torch.cat([self.queue, x.mean().view(1)])
        return self.inner(x)


def test_buffers_go_back_by_their_names() -> None:
    model = Kept()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with isograd.Guard(model, optimizer, every=20) as guard:
        trained(cast("Any", model), optimizer, 20, guard=guard)
        average, queue = model.average.clone(), model.queue.clone()
        trained(cast("Any", model), optimizer, SETTLED, guard=guard)
        trained(cast("Any", model), optimizer, 1, spoil=lambda _step, x: x * math.nan, guard=guard)
        assert torch.equal(model.average, average)
        trained(cast("Any", model), optimizer, BROKEN - 1, spoil=lambda _step, x: x * math.nan, guard=guard)
        assert whats(guard)[-1] == "went back"
    assert torch.equal(model.average, average)
    assert torch.equal(model.queue, queue)


def test_a_loss_that_grows_without_its_gradient_is_no_jump() -> None:
    """As log K does where a queue of K negatives grows; what is added here has no gradient at all."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with isograd.Guard(model, optimizer) as guard:
        for step, (x, y) in enumerate(batches(150)):
            loss = functional.cross_entropy(model(x), y) + (3.0 if step > 60 else 0.0)
            optimizer.zero_grad()
            loss.backward()
            guard.step(loss)
        assert not guard.events


def test_without_a_loss_the_gradients_alone_decide(guarded: Guarded) -> None:
    model, optimizer, guard = guarded
    for step, (x, y) in enumerate(batches(150)):
        loss = functional.cross_entropy(model(x), y) * (100.0 if step > 60 else 1.0)
        optimizer.zero_grad()
        (loss * math.nan if step == 100 else loss).backward()
        assert guard.step(None) == (step != 100)
    assert whats(guard) == ["left out"]


def test_other_data_are_gone_on_with_and_nothing_more_is_undone(guarded: Guarded) -> None:
    """At weights whose loss was well all are far out: the objective is another."""
    model, optimizer, guard = guarded
    model[1] = nn.ReLU()
    trained(model, optimizer, 100, guard=guard)
    with pytest.warns(UserWarning, match=r"data or the objective is another.*guard\.step\(None\)"):
        trained(model, optimizer, 60, spoil=lambda _step, x: 300 * x, guard=guard)
    assert whats(guard).count("went back") == 1
    assert whats(guard)[-1] == "went on"
    assert guard.factor == 1


def test_an_optimizer_that_finds_its_rate_is_refused() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.param_groups[0]["lr"] = None
    with pytest.raises(ValueError, match="finds its own"):
        isograd.Guard(model, optimizer)


class Following(torch.optim.Optimizer):
    """Keeps its state in its groups, as schedule-free methods and Prodigy do: a count, a distance, and a tensor."""

    def __init__(self, parameters: Iterator[nn.Parameter], lr: float = 0.1) -> None:
        super().__init__(
            parameters, {"lr": lr, "k": 0, "d": 1e-3, "sum": torch.zeros(()), "weight_decay": 0.0}
        )

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["k"] += 1
            group["d"] *= 1.01
            for p in group["params"]:
                if p.grad is not None:
                    group["sum"] += p.grad.square().sum()
                    p -= group["lr"] * group["d"] * p.grad


def test_what_an_optimizer_keeps_in_its_groups_is_gone_back_to_and_a_schedule_is_not() -> None:
    model = net()
    optimizer = Following(model.parameters())
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.99**step)
    with isograd.Guard(model, optimizer) as guard:
        for x, y in batches(40):
            loss = functional.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            guard.step(loss if guard.steps < 30 else loss * math.nan)
            schedule.step()
            (group,) = optimizer.param_groups
            group["weight_decay"] += 1e-3
            if guard.events and guard.events[-1].what == "went back":
                break
        assert guard.events[-1].why.startswith("to step 0")
        assert (group["k"], group["d"], float(group["sum"])) == (0, 1e-3, 0.0)
        assert group["lr"] == pytest.approx(0.1 * 0.99**guard.steps)
        assert group["weight_decay"] == pytest.approx(1e-3 * guard.steps)
        assert schedule.last_epoch == guard.steps


@pytest.mark.parametrize("at", range(6))
def test_going_back_is_done_to_its_end_when_it_is_interrupted(
    at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = net()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    trained(model, optimizer, 3)
    with isograd.watch(model, optimizer) as monitor:
        snapshot = Snapshot(0, monitor, [], [])
        kept = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        trained(model, optimizer, 3)
        calls = iter(range(1000))

        def interrupted(tensor: Tensor) -> Tensor:
            if next(calls) == at:
                raise KeyboardInterrupt
            return local(tensor)

        monkeypatch.setattr("isograd.monitor.snapshot.local", interrupted)
        with pytest.raises(KeyboardInterrupt):
            snapshot.restore()
    now = tree_leaves((model.state_dict(), optimizer.state_dict()))
    for was, one in zip(tree_leaves(kept), now, strict=True):
        assert torch.equal(was, one) if isinstance(was, Tensor) else was == one


def test_a_snapshot_that_is_interrupted_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with isograd.Guard(model, optimizer, every=16) as guard:
        trained(model, optimizer, 15, guard=guard)

        def interrupted(tensor: Tensor) -> Tensor:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr("isograd.monitor.snapshot._copy", interrupted)
            with pytest.raises(KeyboardInterrupt):
                trained(model, optimizer, 1, guard=guard)
        assert [group["lr"] for group in optimizer.param_groups] == [0.1]
        with torch.no_grad():
            nn.init.constant_(cast("nn.Linear", model[0]).weight, math.nan)
        trained(model, optimizer, BROKEN, guard=guard)
        assert flat(model).isfinite().all()


def test_an_overflow_of_half_precision_is_the_scalers_matter() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=1000)
    with isograd.Guard(model, optimizer) as guard:
        for x, y in batches(40):
            with torch.autocast("cpu", torch.float16):
                loss = functional.cross_entropy(100 * model(x), y)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            guard.step(loss, scaler=scaler)
        assert not guard.events
        assert guard.factor == 1
    assert scaler.get_scale() < 2.0**20
    assert flat(model).isfinite().all()


class Narrow(TorchDispatchMode):
    """A device without float64."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        assert not any(isinstance(leaf, Tensor) and leaf.dtype == torch.float64 for leaf in tree_leaves(made))
        return made


def test_nothing_wider_is_made_on_a_device_that_has_no_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("clipping", "guard", "parts"):
        monkeypatch.setattr(f"isograd.monitor.{module}.wide", lambda _device: torch.float32)
    limit, norm, model = isograd.AdaptiveClip(), torch.tensor(2.0), net()
    limit._seen = limit._seen.float()
    model(next(iter(batches(1)))[0]).sum().backward()
    part = Reader(lambda: list(model.parameters())).read(full=True)
    with Narrow():
        limit.limit(norm)
        assert _together(torch.tensor(1.0), norm) == (1.0, 2.0)
        part.shares(list(model.parameters()))
