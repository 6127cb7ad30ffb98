"""Raw gradients in the training loops people write: accumulated, unscaled, unclipped, none lost."""

from __future__ import annotations

import contextlib
import copy
import gc
import io
import math
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_monitor import batches, by_hand, net, same, weights
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import swa_utils
from torch.utils.checkpoint import checkpoint

import isograd
from isograd.monitor.reading import ADDED_UP
from isograd.record import Run


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return functional.cross_entropy(model(batch[0]), batch[1])


def clip_norm(model: nn.Module) -> None:
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)


def clip_value(model: nn.Module) -> None:
    nn.utils.clip_grad_value_(model.parameters(), 1e-4)


def clip_in_place(model: nn.Module) -> None:
    for p in model.parameters():
        assert p.grad is not None
        p.grad.mul_(1e-3)


def clip_by_assignment(model: nn.Module) -> None:
    for p in model.parameters():
        assert p.grad is not None
        p.grad = p.grad * 1e-3


CLIPS: list[Callable[[nn.Module], None]] = [clip_norm, clip_value, clip_in_place, clip_by_assignment]


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("micro", [1, 3])
@pytest.mark.parametrize("set_to_none", [True, False])
def test_clipped_gradients_are_read_before(
    clip: Callable[[nn.Module], None], micro: int, set_to_none: bool
) -> None:
    model = net()
    optimizer = torch.optim.AdamW(model.parameters())
    with isograd.watch(model, optimizer) as monitor:
        for _ in range(6):
            for batch in batches(micro):
                (loss_of(model, batch) / micro).backward()
            expected = by_hand(model)
            clip(model)
            clipped = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
            optimizer.step()
            optimizer.zero_grad(set_to_none=set_to_none)
            reading = monitor.latest()
            same(reading, expected)
            assert reading.notes == ()
            assert reading.scalars["clipped_norm"] == pytest.approx(float(clipped))


def test_clipping_that_starts_later_is_told_once_and_read_before_from_then_on() -> None:
    model = net()
    optimizer = torch.optim.AdamW(model.parameters())
    notes: list[tuple[str, ...]] = []
    with isograd.watch(model, optimizer) as monitor:
        for step, batch in enumerate(batches(9)):
            optimizer.zero_grad()
            loss_of(model, batch).backward()
            expected = by_hand(model)
            if step > 4:
                clip_norm(model)
            optimizer.step()
            reading = monitor.latest()
            notes.append(reading.notes)
            if step != 5:
                same(reading, expected)
    assert [bool(n) for n in notes] == [False] * 5 + [True] + [False] * 3
    assert notes[5][0].startswith("clipped before they were read")


@pytest.mark.parametrize("clip", [None, clip_norm])
def test_accumulation_that_ends_early(clip: Callable[[nn.Module], None] | None) -> None:
    """The last step of an epoch has fewer batches."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with isograd.watch(model, optimizer) as monitor:
        for micro in (4, 4, 4, 4, 2, 4, 2):
            for batch in batches(micro):
                loss_of(model, batch).backward()
            expected = by_hand(model)
            if clip is not None:
                clip(model)
            optimizer.step()
            optimizer.zero_grad()
            reading = monitor.latest()
            assert reading.notes == ()
            norms = torch.stack([reading.columns["grad_norm"], expected["grad_norm"].float()])
            torch.testing.assert_close(norms[0], norms[1], rtol=1e-6, atol=0)


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_overflows_under_a_scaler_is_read(clip: bool, fused: bool) -> None:
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with isograd.watch(model, optimizer) as monitor:
        for step, batch in enumerate(batches(9)):
            optimizer.zero_grad()
            loss = loss_of(model, batch)
            scale = scaler.get_scale()
            scaler.scale(loss * (torch.inf if step in (2, 6) else 1.0)).backward()
            expected = by_hand(model, scale=scale)
            if clip:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), 1e-2)
            before = weights(model)
            scaler.step(optimizer)
            scaler.update()
            reading = monitor.latest()
            assert reading.step == step
            assert torch.equal(reading.columns["nonfinite"].double(), expected["nonfinite"].double())
            if step in (2, 6):
                assert all(torch.equal(a, b) for a, b in zip(before, weights(model), strict=True))
                assert float(reading.columns["nonfinite"].sum()) > 0
                assert fused or reading.notes == ("overflow: the optimizer did not step",)
            else:
                same(reading, expected)
                if clip or not fused:
                    assert reading.scalars["scale"] == scale


def test_several_optimizers_in_one_step_and_out_of_step() -> None:
    model = net()
    parameters = list(model.parameters())
    first = torch.optim.SGD(parameters[:2], lr=0.1)
    second = torch.optim.Adam(parameters[2:])
    with isograd.watch(model, [first, second]) as monitor:
        for batch in batches(3):
            model.zero_grad()
            loss_of(model, batch).backward()
            expected = by_hand(model)
            first.step()
            second.step()
            same(monitor.latest(), expected)
        steps = []
        for step, batch in enumerate(batches(4)):  # as with a critic that learns more often
            model.zero_grad()
            loss_of(model, batch).backward()
            expected = by_hand(model)
            first.step()
            if step % 2:
                second.step()
            reading = monitor.latest()
            steps.append(reading.step)
            column = reading.columns["grad_norm"]
            assert torch.allclose(column[:2].double(), expected["grad_norm"][:2], rtol=1e-6)
            assert bool(column[2:].isnan().all()) == (step % 2 == 0)
    assert steps == sorted(steps)


def test_a_closure_is_read_at_its_first_evaluation() -> None:
    model = net()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=4)
    with isograd.watch(model, optimizer) as monitor:
        for batch in batches(5):
            seen: list[dict[str, Tensor]] = []

            def closure(batch: tuple[Tensor, Tensor] = batch, seen: list[dict[str, Tensor]] = seen) -> Tensor:
                optimizer.zero_grad()
                loss = loss_of(model, batch)
                loss.backward()
                seen.append(by_hand(model))
                return loss

            before = weights(model)
            optimizer.step(closure)
            assert len(seen) > 1
            reading = monitor.latest()
            same(reading, seen[0])
            moved = [(a - b).norm() for a, b in zip(weights(model), before, strict=True)]
            same(reading, {"update_norm": torch.stack(moved)}, rtol=1e-5)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant: bool) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with isograd.watch(model, optimizer) as monitor:
        for x, y in batches(5):
            optimizer.zero_grad()
            hidden = checkpoint(model[:3], x.requires_grad_(), use_reentrant=reentrant)
            functional.cross_entropy(model[3:](hidden), y).backward()
            expected = by_hand(model)
            clip_norm(model)
            optimizer.step()
            same(monitor.latest(), expected)


def test_parameters_frozen_thawed_and_added() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with isograd.watch(model, optimizer) as monitor:
        for step, batch in enumerate(batches(12)):
            model[0].requires_grad_(not 3 <= step < 6)
            if step == 8:
                model.append(nn.Linear(4, 4))
                optimizer.add_param_group({"params": list(model[5].parameters())})
            optimizer.zero_grad()
            loss_of(model, batch).backward()
            norms = [torch.nan if p.grad is None else float(p.grad.norm()) for p in model.parameters()]
            optimizer.step()
            reading = monitor.latest()
            assert reading.sites == tuple(dict(model.named_parameters()))
            torch.testing.assert_close(
                reading.columns["grad_norm"], torch.tensor(norms), equal_nan=True, rtol=1e-5, atol=0
            )


@pytest.mark.parametrize("clip", [None, clip_norm])
def test_a_backward_that_was_not_heard_of_is_told(clip: Callable[[nn.Module], None] | None) -> None:
    """Of a step only the last parameter of its backward is listened to; when that is frozen the next step
    cannot know whether it was clipped."""
    model = net()
    optimizer = torch.optim.AdamW(model.parameters())
    notes: list[int] = []
    with isograd.watch(model, optimizer) as monitor:
        for step, batch in enumerate(batches(12)):
            if step == 5:
                model[0].requires_grad_(False)
            optimizer.zero_grad()
            loss_of(model, batch).backward()
            norm = float(by_hand(model)["grad_norm"].norm())
            if clip is not None:
                clip(model)
            optimizer.step()
            reading = monitor.latest()
            if reading.notes:
                notes.append(step)
                assert reading.notes[0].startswith("no backward was heard of before this step")
            else:
                assert reading.scalars["grad_norm"] == pytest.approx(norm, rel=1e-5)
    assert notes == [5]


def test_gradients_set_by_hand_are_read_in_full() -> None:
    """`torch.autograd.grad` and `torch.func.grad` end no backward that could be heard of."""
    model = net()
    optimizer = torch.optim.AdamW(model.parameters())
    with isograd.watch(model, optimizer) as monitor:
        for batch in batches(12):
            parameters = list(model.parameters())
            for p, gradient in zip(
                parameters, torch.autograd.grad(loss_of(model, batch), parameters), strict=True
            ):
                p.grad = gradient
            before = weights(model)
            optimizer.step()
            moved = [float((p.detach() - old).norm()) for p, old in zip(parameters, before, strict=True)]
            columns = monitor.latest().columns
            torch.testing.assert_close(columns["update_norm"], torch.tensor(moved), rtol=1e-3, atol=1e-6)


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.head = nn.Linear(8, 8), nn.Linear(8, 4)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for i, block in enumerate(self.blocks):
            x = checkpoint(block, x, use_reentrant=i % 2 == 1)
        return self.head(x)


@pytest.mark.parametrize("cleared", [True, False])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("zeros", [True, False])
def test_gradients_that_add_up_are_noticed_in_checkpoints_and_where_most_are_zero_at_first(
    cleared: bool, accumulate: int, zeros: bool
) -> None:
    """A head that was drawn as zeros passes no gradient on in the first step."""
    model = net() if zeros else Checkpointed()
    if zeros:
        nn.init.zeros_(model[-1].weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    noted: list[bool] = []
    with isograd.watch(model, optimizer) as monitor:
        for batch in batches(3):
            for _ in range(accumulate):
                loss_of(model, batch).backward()
            optimizer.step()
            if cleared:
                optimizer.zero_grad()
            noted.append(ADDED_UP in monitor.latest().notes)
    assert noted == [False, not cleared, not cleared]


class Odd(nn.Module):
    """Complex numbers, a parameter without dimensions and one without elements."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.matrix = nn.Parameter(torch.randn(4, 8, dtype=torch.complex64))
        self.shift = nn.Parameter(torch.tensor(1 - 2j))
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.empty = nn.Parameter(torch.empty(0, 3))

    def forward(self, x: Tensor) -> Tensor:
        spectrum = x.to(torch.complex64) @ self.matrix.T + self.shift
        return spectrum.abs() * self.scale + self.empty.sum()


ODD: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "SGD": lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1),
    "Adam": lambda m: torch.optim.Adam(m.parameters(), lr=0.01),
    "AdamW": lambda m: torch.optim.AdamW(m.parameters(), lr=0.01, amsgrad=True),
    "RMSprop": lambda m: torch.optim.RMSprop(m.parameters(), lr=0.01),
}


@pytest.mark.parametrize("rule", ODD)
def test_complex_numbers_are_pairs_and_any_shape_is_read(rule: str) -> None:
    model = Odd()
    optimizer = ODD[rule](model)
    with isograd.watch(model, optimizer) as monitor, warnings.catch_warnings():
        warnings.simplefilter("error")
        for batch in batches(4):
            optimizer.zero_grad()
            loss_of(model, batch).backward()
            held = [p for p in model.parameters() if p.numel()]
            grads = [torch.view_as_real(p.grad) if p.is_complex() else p.grad for p in held]
            before = weights(model)[:3]
            optimizer.step()
            column = {name: values[:3] for name, values in monitor.latest().columns.items()}
            moved = [(a - b).abs().double().norm() for a, b in zip(weights(model)[:3], before, strict=True)]
            expected = {
                "grad_norm": torch.stack([g.double().norm() for g in grads]),  # type: ignore[union-attr]
                "grad_max": torch.stack([g.abs().max() for g in grads]),  # type: ignore[union-attr]
                "zeros": torch.zeros(3),
                "nonfinite": torch.zeros(3),
                "update_norm": torch.stack(moved),
            }
            for name, values in expected.items():
                torch.testing.assert_close(column[name].double(), values.double(), rtol=2e-4, atol=0)


@pytest.mark.parametrize("factor", [1e-30, 1e25])
def test_complex_norms_whose_squares_leave_float32(factor: float) -> None:
    model = Odd()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with isograd.watch(model, optimizer) as monitor:
        (loss_of(model, next(batches(1))) * factor).backward()
        norms = [float(p.grad.abs().double().norm()) for p in model.parameters() if p.grad is not None]
        optimizer.step()
        reading = monitor.latest()
    assert reading.columns["grad_norm"][:3].tolist() == pytest.approx(norms[:3], rel=1e-5)
    assert reading.columns["nonfinite"][:3].tolist() == [0, 0, 0]


def test_zero_is_no_gradient_and_no_gradient_is_not_zero() -> None:
    model = nn.Sequential(nn.Linear(8, 4), nn.Linear(8, 4))
    optimizer = torch.optim.SGD(model.parameters())
    with isograd.watch(model, optimizer) as monitor:
        (model[0](torch.randn(3, 8)) * 0).sum().backward()
        optimizer.step()
        column = monitor.latest().columns["grad_norm"]
    assert column[:2].tolist() == [0, 0]
    assert column[2:].isnan().all()


@pytest.mark.parametrize("factor", [1e-35, 1e-28, 1e25, 1e32])
def test_norms_whose_squares_leave_float32(factor: float) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with isograd.watch(model, optimizer) as monitor:
        (loss_of(model, next(batches(1))) * factor).backward()
        expected = by_hand(model)
        optimizer.step()
        same(monitor.latest(), expected, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions(dtype: torch.dtype) -> None:
    model = net(64).to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with isograd.watch(model, optimizer) as monitor:
        loss = model(torch.randn(5, 8, dtype=dtype)).float().square().mean()
        (loss + 200 * model[0].bias.float().sum()).backward()  # the squares are beyond float16
        expected = by_hand(model)
        optimizer.step()
        same(monitor.latest(), expected, rtol=1e-5)


def test_sparse_gradients() -> None:
    model = nn.Sequential(nn.Embedding(50, 4, sparse=True))
    optimizer = torch.optim.SparseAdam(model.parameters())
    with isograd.watch(model, optimizer) as monitor:
        model(torch.tensor([3, 3, 7])).square().sum().backward()
        dense = model[0].weight.grad.to_dense()  # type: ignore[union-attr]
        before = weights(model)
        optimizer.step()
        reading = monitor.latest()
        assert reading.columns["grad_norm"].item() == pytest.approx(float(dense.norm()))
        assert reading.columns["zeros"].item() == int((dense == 0).sum())
        moved = (weights(model)[0] - before[0]).norm()
        assert reading.columns["update_norm"].item() == pytest.approx(float(moved), rel=1e-5)


def test_tied_weights_are_counted_once() -> None:
    model = net()
    model[2].weight = nn.Parameter(torch.randn(16, 16))
    model.append(nn.Linear(4, 4))
    model[5].weight = model[4].weight  # type: ignore[assignment]
    model[4].weight = nn.Parameter(torch.randn(4, 16))
    model[5].weight = nn.Parameter(torch.randn(4, 4))
    model.append(nn.Linear(4, 4))
    model[6].weight = model[5].weight
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with isograd.watch(model, optimizer) as monitor:
        loss_of(model, next(batches(1))).backward()
        expected = by_hand(model)
        optimizer.step()
        assert monitor.latest().sites.count("5.weight") == 1
        assert "6.weight" not in monitor.latest().sites
        same(monitor.latest(), expected)


def test_a_backward_that_raised_is_forgotten() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def fail(grad: Tensor) -> Tensor:
        raise ArithmeticError

    with isograd.watch(model, optimizer) as monitor:
        for step, batch in enumerate(batches(4)):
            optimizer.zero_grad()
            if step == 1:
                x = batch[0].clone().requires_grad_()
                x.register_hook(fail)
                with pytest.raises(ArithmeticError):
                    loss_of(model, (x, batch[1])).backward()
                optimizer.zero_grad()
            loss_of(model, batch).backward()
            expected = by_hand(model)
            clip_norm(model)
            optimizer.step()
            same(monitor.latest(), expected)


def test_what_is_watched_is_left_as_it_was() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step, unscale = torch.amp.GradScaler.step, torch.amp.GradScaler.unscale_
    monitor = isograd.watch(model, optimizer)
    monitor.close()
    monitor.close()
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    assert all(not p._post_accumulate_grad_hooks for p in model.parameters())
    assert (torch.amp.GradScaler.step, torch.amp.GradScaler.unscale_) == (step, unscale)


@pytest.mark.parametrize("deep_every", [None, 1])
def test_copies_and_files_of_what_is_watched_are_plain(deep_every: int | None) -> None:
    """Averages of the weights, target networks, checkpoints: nothing of ours is in them, at any moment."""
    model = net()
    optimizer = torch.optim.AdamW(model.parameters())

    def plain() -> None:
        file = io.BytesIO()
        torch.save((model, optimizer), file)
        file.seek(0)
        assert b"isograd" not in file.getvalue()
        for other, its in (torch.load(file, weights_only=False), copy.deepcopy((model, optimizer))):
            assert not its._optimizer_step_pre_hooks
            assert all(not p._post_accumulate_grad_hooks for p in other.parameters())
            torch.testing.assert_close(other(batch[0]), model(batch[0]))

    with isograd.watch(model, optimizer, deep_every=deep_every) as monitor:
        for batch in batches(3):
            optimizer.zero_grad()
            plain()
            with torch.autocast("cpu", torch.bfloat16):
                loss = loss_of(model, batch)
            loss.backward()
            expected = by_hand(model)
            with torch.no_grad():  # as a validation
                plain()
            optimizer.step()
            same(monitor.latest(), expected)


def test_an_average_of_the_weights_is_taken_beside() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with isograd.watch(model, optimizer, deep_every=2) as monitor:
        average = swa_utils.AveragedModel(model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.9))
        for batch in batches(5):
            optimizer.zero_grad(set_to_none=False)
            loss_of(model, batch).backward()
            expected = by_hand(model)
            optimizer.step()
            average.update_parameters(model)
            average(batch[0])
            same(monitor.latest(), expected)
        assert monitor.latest().sites == tuple(dict(model.named_parameters()))


class Sharpness(torch.optim.Optimizer):
    """SAM as it is written everywhere: a step up, a second gradient there, and the base optimizer's step."""

    def __init__(self, parameters: Any, base: type[torch.optim.Optimizer], **options: Any) -> None:
        super().__init__(parameters, options)
        self.base = base(self.param_groups, **options)
        self.param_groups = self.base.param_groups

    @torch.no_grad()
    def climb(self) -> None:
        for p in self.param_groups[0]["params"]:
            self.state[p]["up"] = up = p.grad * 0.05
            p.add_(up)

    @torch.no_grad()
    def descend(self) -> None:
        for p in self.param_groups[0]["params"]:
            p.sub_(self.state[p]["up"])
        self.base.step()


def test_an_optimizer_that_steps_twice() -> None:
    """The base optimizer is watched: its step has the second gradient. Of the outer one's, no step is seen."""
    model = net()
    optimizer = Sharpness(model.parameters(), torch.optim.SGD, lr=0.1)
    with isograd.watch(model, optimizer.base) as monitor:
        for batch in batches(6):
            loss_of(model, batch).backward()
            optimizer.climb()
            optimizer.zero_grad()
            loss_of(model, batch).backward()
            expected = by_hand(model)
            optimizer.descend()
            optimizer.zero_grad()
            same(monitor.latest(), expected)
    with isograd.watch(model, optimizer) as monitor:
        loss_of(model, batch).backward()
        optimizer.climb()
        optimizer.descend()
        assert "no step was seen" in monitor.diagnosis().unexamined["training"]


def test_two_networks_and_a_target() -> None:
    """As in Q-learning: the target follows the online network, and is none of the watched parameters."""
    online, target = net(), net()
    optimizer = torch.optim.Adam(online.parameters())
    with isograd.watch(online, optimizer) as monitor:
        for x, y in batches(5):
            with torch.no_grad():
                aim = target(x).max(dim=1).values
            optimizer.zero_grad()
            functional.smooth_l1_loss(online(x).gather(1, y[:, None])[:, 0], aim).backward()
            expected = by_hand(online)
            clip_value(online)
            optimizer.step()
            for a, b in zip(target.parameters(), online.parameters(), strict=True):
                a.data.lerp_(b.data, 0.1)
            same(monitor.latest(), expected)
        assert "parameters" not in monitor.diagnosis().unexamined


def test_what_no_optimizer_holds_is_said_to_stay_as_it_is() -> None:
    model = net()
    optimizer = torch.optim.SGD(list(model.parameters())[-2:], lr=0.1)
    with isograd.watch(model, optimizer) as monitor:
        for x, y in batches(3):
            optimizer.zero_grad()
            functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        unexamined = monitor.diagnosis().unexamined
    assert "in no watched optimizer, which leaves them as they are: 0.weight" in unexamined["parameters"]
    assert "because they are in no watched optimizer" in unexamined["gradients"]


def test_a_notebook_cell_run_twice_watches_once() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    steps: list[int] = []
    first = isograd.watch(model, optimizer, sinks=[lambda scalars, step: steps.append(step)])
    second = isograd.watch(model, optimizer, sinks=[lambda scalars, step: steps.append(step)])
    for batch in batches(2):
        loss_of(model, batch).backward()
        optimizer.step()
    second.close()
    first.close()
    assert steps == [0, 1]


def test_nothing_of_a_watched_model_is_kept_alive_and_its_last_step_is_kept(tmp_path: Path) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = isograd.watch(model, optimizer, run=tmp_path / "run")
    for batch in batches(3):
        loss_of(model, batch).backward()
        optimizer.step()
    gone = weakref.ref(model)
    del model, optimizer, monitor
    gc.collect()
    assert gone() is None
    with Run.open(tmp_path / "run") as run:
        assert run.last == 2
        assert run.progress().ended


def test_a_model_that_was_watched_is_freed_without_a_garbage_collection() -> None:
    def trained() -> weakref.ref[nn.Module]:
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with isograd.watch(model, optimizer) as monitor:
            for batch in batches(5):
                loss_of(model, batch).backward()
                optimizer.step()
        assert monitor.diagnosis().healthy
        return weakref.ref(model)

    trained()  # what torch keeps of the first of all is not ours
    gc.collect()
    gc.disable()
    try:
        assert trained()() is None
    finally:
        gc.enable()


def test_an_error_inside_is_one_warning_and_the_training_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with isograd.watch(model, optimizer), warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        monkeypatch.setattr(torch, "_foreach_norm", lambda *_, **__: 1 / 0)
        before = weights(model)
        for batch in batches(3):
            loss_of(model, batch).backward()
            optimizer.step()
    assert not torch.equal(before[0], weights(model)[0])
    assert [str(w.message).startswith("isograd.watch failed") for w in told] == [True]


def test_where_warnings_are_errors_the_training_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As under `python -W error`: neither the step nor the thread that takes the readings may raise."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def sink(scalars: dict[str, float], step: int) -> None:
        raise OSError("no network")

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with isograd.watch(model, optimizer, sinks=[sink]) as monitor:
            for batch in batches(3):
                loss_of(model, batch).backward()
                optimizer.step()
            assert monitor.latest().step == 2
            monkeypatch.setattr(torch, "_foreach_norm", lambda *_, **__: 1 / 0)
            loss_of(model, next(iter(batches(1)))).backward()
            optimizer.step()
    told = capsys.readouterr().err
    assert told.count("no network") == 1
    assert told.count("has stopped watching") == 1


def test_a_sink_that_fails_is_one_warning() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def sink(scalars: dict[str, float], step: int) -> None:
        raise OSError("no network")

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with isograd.watch(model, optimizer, sinks=[sink]):
            for batch in batches(3):
                loss_of(model, batch).backward()
                optimizer.step()
    assert len(told) == 1
    assert "no network" in str(told[0].message)


def test_a_generator_and_its_critic_step_together(tmp_path: Path) -> None:
    """The generator's backward reaches the critic, whose step that is not."""
    torch.manual_seed(0)
    critic, generator = nn.Linear(4, 1), nn.Linear(2, 4)
    both = nn.ModuleDict({"critic": critic, "generator": generator})
    optimizers = [torch.optim.SGD(part.parameters(), lr=0.01) for part in (critic, generator)]
    expected: list[tuple[float, float, float]] = []
    with isograd.watch(both, optimizers, run=tmp_path / "run") as monitor:
        for _ in range(12):
            fake = generator(torch.randn(8, 2))
            optimizers[0].zero_grad()
            critic(fake.detach()).square().mean().backward()
            norm = float(critic.weight.grad.norm())
            optimizers[0].step()
            monitor.log(critic=norm)
            optimizers[1].zero_grad()
            loss = -critic(fake).mean()
            loss.backward()
            expected.append((norm, float(generator.weight.grad.norm()), loss.item()))
            optimizers[1].step()
            monitor.log(loss=loss)
    assert "UP509" not in {f.code for f in monitor.diagnosis().findings}
    with Run.open(tmp_path / "run") as run:
        kept = list(run.readings())
    assert [reading.step for reading in kept] == list(range(12))
    for reading, (first, second, loss) in zip(kept, expected, strict=True):
        norms = dict(zip(reading.sites, reading.columns["grad_norm"].tolist(), strict=True))
        assert norms["critic.weight"] == pytest.approx(first)
        assert norms["generator.weight"] == pytest.approx(second)
        assert (reading.scalars["critic"], reading.scalars["loss"]) == pytest.approx((first, loss))


@pytest.mark.parametrize("value", [1.0, math.nan])
def test_a_backward_that_ended_the_training_counts_if_it_was_not_finite(value: float) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with isograd.watch(model, optimizer) as monitor, contextlib.suppress(RuntimeError):
        for step, (x, y) in enumerate(batches(5)):
            optimizer.zero_grad()
            loss_of(model, (x * value if step == 4 else x, y)).backward()
            if step == 4:
                raise RuntimeError("as of clip_grad_norm_(error_if_nonfinite=True)")
            optimizer.step()
    broken = not math.isfinite(value)
    assert monitor.latest().step == 3 + broken
    assert [f.code for f in monitor.diagnosis().findings] == ["NF405"] * broken
    assert bool(monitor.latest().notes) == broken


CLEARED: dict[str, Callable[[nn.Module], object]] = {
    "to None": lambda model: model.zero_grad(),
    "to zero": lambda model: model.zero_grad(set_to_none=False),
    "behind the counters": lambda model: [
        p.grad.data.zero_() for p in model.parameters() if p.grad is not None
    ],
}


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("clear", [None, *CLEARED])
def test_gradients_that_nothing_clears_are_told(clear: str | None, micro_batches: int) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with isograd.watch(model, optimizer) as monitor:
        for batch in batches(6):
            for _ in range(micro_batches):
                loss_of(model, batch).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            if clear is not None:
                CLEARED[clear](model)
    assert [f.code for f in monitor.diagnosis().findings] == ["UP509"] * (clear is None)


@pytest.mark.parametrize("clear", [None, "to None", "to zero"])
def test_sparse_gradients_that_nothing_clears_are_told(clear: str | None) -> None:
    model = nn.ModuleList(nn.Embedding(20, 4, sparse=True) for _ in range(2))
    optimizer = torch.optim.SparseAdam(list(model.parameters()), lr=0.01)
    with isograd.watch(model, optimizer) as monitor:
        for _ in range(6):
            words = torch.randint(0, 20, (8,))
            (model[0](words) * model[1](words)).square().mean().backward()
            optimizer.step()
            if clear is not None:
                CLEARED[clear](model)
    assert [f.code for f in monitor.diagnosis().findings] == ["UP509"] * (clear is None)


def test_the_state_of_an_optimizer_gets_nothing_from_being_watched() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with isograd.watch(model, optimizer):
        for batch in batches(3):
            loss_of(model, batch).backward()
            optimizer.step()
    assert optimizer.state_dict()["state"] == {}


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.RMSprop])
def test_the_first_step_may_overflow(make: type[torch.optim.Optimizer]) -> None:
    """As it does at the scale that a scaler begins with: the optimizer has no state then."""
    model = net()
    optimizer = make(model.parameters(), lr=1e-3)  # type: ignore[call-arg]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    with isograd.watch(model, optimizer) as monitor:
        for step, (x, y) in enumerate(batches(3)):
            optimizer.zero_grad()
            scaler.scale(functional.cross_entropy(model(x), y) * (1e3 if step == 0 else 1e-3)).backward()
            scaler.step(optimizer)
            scaler.update()
            moved = monitor.latest().columns["update_norm"]
            assert bool(moved.isnan().all() if step == 0 else (moved > 0).all())


@pytest.mark.parametrize("cleared", [True, False])
def test_gradients_that_add_up_are_told_in_a_loop_that_updates_by_hand(cleared: bool) -> None:
    model = net()
    with isograd.watch(model, None) as monitor:
        for x, y in batches(5):
            if cleared:
                model.zero_grad()
            functional.cross_entropy(model(x), y).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            for parameter in model.parameters():
                assert parameter.grad is not None
                parameter.data.add_(parameter.grad, alpha=-0.1)
            monitor.step()
        assert [f.code for f in monitor.diagnosis().findings] == ["UP509"] * (not cleared)


@pytest.mark.parametrize("away", [True, False])
@pytest.mark.parametrize("rule", [torch.optim.SGD, torch.optim.Adam, torch.optim.RMSprop])
def test_gradients_that_are_cleared_before_the_step_are_told(
    rule: type[torch.optim.Optimizer], away: bool
) -> None:
    torch.manual_seed(0)
    model = net()
    optimizer = rule(model.parameters(), lr=0.1)  # pyright: ignore[reportCallIssue]
    with warnings.catch_warnings(), isograd.watch(model, optimizer) as monitor:
        warnings.simplefilter("error")
        for batch in batches(40):
            loss_of(model, batch).backward()
            optimizer.zero_grad(set_to_none=away)
            optimizer.step()
        found = {finding.code: finding for finding in monitor.diagnosis().findings}
    assert found["UP507"].evidence["cause"] == "cleared"


@pytest.mark.parametrize("rule", [torch.optim.SGD, torch.optim.Adam])
def test_a_gradient_that_is_taken_away_before_the_step_moves_nothing(
    rule: type[torch.optim.Optimizer],
) -> None:
    model = net()
    optimizer = rule(model.parameters(), lr=0.1)  # pyright: ignore[reportCallIssue]
    first, *_ = model.parameters()
    with isograd.watch(model, optimizer) as monitor:
        for batch in batches(6):
            optimizer.zero_grad()
            loss_of(model, batch).backward()
            first.grad = None
            optimizer.step()
            reading = monitor.latest()
        updates = reading.columns["update_norm"]
    assert updates[0] == 0
    assert bool((updates[1:] > 0).all())


def test_the_learning_rate_is_the_largest_of_the_groups() -> None:
    model = net()
    first, *others = model.parameters()
    for lr in (0.0, torch.tensor(0.0)):
        optimizer = torch.optim.SGD([{"params": [first], "lr": lr}, {"params": others}], lr=0.25)
        with isograd.watch(model, optimizer) as monitor:
            for batch in batches(2):
                loss_of(model, batch).backward()
                optimizer.step()
            assert monitor.latest().scalars["lr"] == 0.25


def test_what_is_clipped_before_it_is_unscaled_has_the_norm_of_what_is_left() -> None:
    """`unscale_` is forgotten: a limit of 1 is then one of a thousandth."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with isograd.watch(model, optimizer) as monitor:
        for batch in batches(3):
            optimizer.zero_grad()
            scaler.scale(loss_of(model, batch)).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            reading = monitor.latest()
    assert reading.scalars["clipped_norm"] == pytest.approx(1 / 1024, rel=1e-3)
    assert reading.scalars["grad_norm"] > 0.01


def test_a_layer_that_was_exchanged_after_the_optimizer_was_made_is_told() -> None:
    model = net()
    optimizer = torch.optim.Adam(model.parameters())
    assert isinstance(model, nn.Sequential)
    model[-1] = nn.Linear(model[-1].in_features, model[-1].out_features)
    with isograd.watch(model, optimizer) as monitor:
        for batch in batches(50):
            optimizer.zero_grad()
            loss_of(model, batch).backward()
            optimizer.step()
        (found,) = monitor.diagnosis().findings
    assert (found.code, found.severity.name) == ("UP505", "WARNING")
    assert "exchanged after the optimizer was made" in str(found.cause)
