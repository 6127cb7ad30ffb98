"""On a GPU: the same numbers as on the host, nothing waited for, no bit of the training changed. `make gpu` runs them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import isograd

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use"),
]
DEVICE = "cuda"
STEPS = 200


def net() -> nn.Sequential:
    """With dropout, so that the random state matters."""
    torch.manual_seed(0)
    layers = [layer for _ in range(8) for layer in (nn.Linear(32, 32), nn.Tanh(), nn.Dropout(0.1))]
    return nn.Sequential(*layers, nn.Linear(32, 5)).to(DEVICE)


def batches(count: int) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        x, y = torch.randn(64, 32, generator=generator), torch.randint(0, 5, (64,), generator=generator)
        yield x.to(DEVICE), y.to(DEVICE)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, batch: tuple[Tensor, Tensor]) -> None:
    optimizer.zero_grad()
    functional.cross_entropy(model(batch[0]), batch[1]).backward()
    optimizer.step()


@pytest.mark.parametrize("fused", [False, True])
def test_watching_changes_neither_weights_nor_random_state(tmp_path: Path, fused: bool) -> None:
    def trained(watched: bool) -> tuple[list[Tensor], Tensor]:
        model = net()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=fused)
        with isograd.watch(model, optimizer, run=tmp_path, deep_every=50) if watched else nullcontext():
            for batch in batches(STEPS):
                train(model, optimizer, batch)
        return [p.detach() for p in model.parameters()], torch.cuda.get_rng_state()

    (plain, state), (watched, its_state) = trained(False), trained(True)
    assert all(torch.equal(a, b) for a, b in zip(plain, watched, strict=True))
    assert torch.equal(state, its_state)


def test_a_step_waits_for_nothing() -> None:
    """torch itself raises where the training thread would wait for the device."""
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    known = list(batches(20))
    with isograd.watch(model, optimizer) as monitor:
        for batch in known[:10]:
            train(model, optimizer, batch)
        torch.cuda.set_sync_debug_mode("error")
        try:
            for batch in known[10:]:
                train(model, optimizer, batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert monitor.latest().step == 19


def test_every_statistic_is_that_of_the_gradients() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with isograd.watch(model, optimizer) as monitor:
        for x, y in batches(3):
            optimizer.zero_grad()
            functional.cross_entropy(model(x), y).backward()
            expected = torch.stack([p.grad.double().norm() for p in model.parameters() if p.grad is not None])
            nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
            optimizer.step()
            seen = monitor.latest().columns["grad_norm"].double()
            torch.testing.assert_close(seen, expected.cpu(), rtol=1e-5, atol=0.0)


def test_the_step_that_overflows_is_not_lost() -> None:
    model = net()
    optimizer = torch.optim.AdamW(model.parameters())
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**16)
    with isograd.watch(model, optimizer) as monitor:
        for step, (x, y) in enumerate(batches(6)):
            optimizer.zero_grad()
            with torch.autocast("cuda", torch.float16):
                loss = functional.cross_entropy(model(x), y)
            scaler.scale(loss * (torch.inf if step == 3 else 1.0)).backward()
            scaler.step(optimizer)
            scaler.update()
            assert (float(monitor.latest().columns["nonfinite"].sum()) > 0) == (step == 3)


def test_the_statistics_of_a_step_are_small_on_the_device() -> None:
    """Below 64 bytes for each parameter and step that waits to be read."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    (batch,) = batches(1)

    def held(steps: int) -> int:
        for _ in range(steps):
            train(model, optimizer, batch)
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    before = held(3)
    with isograd.watch(model, optimizer):
        steps = 50
        more = held(steps) - before
    count = len(list(model.parameters()))
    assert more < 64 * count * steps + 512 * steps  # of which the allocator rounds each step's up


def test_a_captured_step_is_unexamined_and_replays() -> None:
    model = net().eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = next(batches(1))
    with isograd.watch(model, optimizer) as monitor:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                train(model, optimizer, (x, y))
        torch.cuda.current_stream().wait_stream(side)
        seen = monitor.latest().step
        graph = torch.cuda.CUDAGraph()
        optimizer.zero_grad(set_to_none=True)
        with torch.cuda.graph(graph):
            functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        before = [p.detach().clone() for p in model.parameters()]
        graph.replay()
        torch.cuda.synchronize()
        assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        assert monitor.latest().step == seen
        assert "CUDA graph" in monitor.diagnosis().unexamined["training"]


def test_a_check_reads_what_the_host_reads_and_leaves_the_random_state() -> None:
    model = net().eval()
    (x, y) = next(batches(1))
    state = torch.cuda.get_rng_state()
    on_device = isograd.check(model, lambda m: functional.cross_entropy(m(x), y))
    assert torch.equal(state, torch.cuda.get_rng_state())
    x, y = x.cpu(), y.cpu()
    on_host = isograd.check(model.cpu(), lambda m: functional.cross_entropy(m(x), y))
    assert on_device.verdict == on_host.verdict
    assert on_device.flow.decades == pytest.approx(on_host.flow.decades, abs=1e-3)


def test_a_repair_stays_on_the_device() -> None:
    torch.manual_seed(0)
    layers = [layer for _ in range(20) for layer in (nn.Linear(32, 32), nn.Sigmoid())]
    model = nn.Sequential(*layers, nn.Linear(32, 5)).to(DEVICE)
    x, y = next(batches(1))
    repaired = isograd.repair(model, lambda m: functional.cross_entropy(m(x), y))
    assert repaired.cured
    assert {p.device.type for p in repaired.model.parameters()} == {DEVICE}


@pytest.mark.parametrize("fused", [False, True])
def test_a_guard_changes_nothing_until_something_breaks_and_then_goes_back(fused: bool) -> None:
    def trained(guarded: bool) -> list[Tensor]:
        model = net()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=fused)
        with isograd.Guard(model, optimizer, every=16) if guarded else nullcontext() as guard:
            for x, y in batches(60):
                optimizer.zero_grad()
                loss = functional.cross_entropy(model(x), y)
                loss.backward()
                if guard is None:
                    optimizer.step()
                else:
                    guard.step(loss)
            if guard is not None:
                assert not guard.events
                kept = [p.detach().clone() for p in model.parameters()]
                for _ in range(2):
                    (functional.cross_entropy(model(x), y) * torch.nan).backward()
                    assert not guard.step(torch.tensor(torch.nan, device=DEVICE))
                assert all(torch.equal(a, b) for a, b in zip(kept, model.parameters(), strict=True))
                guard.step(torch.tensor(torch.nan, device=DEVICE))
                assert guard.events[-1].what == "went back"
                assert guard.factor == 0.5
        return kept if guard is not None else [p.detach() for p in model.parameters()]

    assert all(torch.equal(a, b) for a, b in zip(trained(False), trained(True), strict=True))


def test_a_limit_that_follows_the_norm_waits_for_nothing() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    limit = isograd.AdaptiveClip(warm_up=4)
    known = list(batches(20))
    with isograd.watch(model, optimizer) as monitor:
        for i, (x, y) in enumerate(known):
            torch.cuda.set_sync_debug_mode("error" if i >= 10 else "default")
            try:
                optimizer.zero_grad()
                functional.cross_entropy(model(x), y).backward()
                monitor.clip_(limit)
                optimizer.step()
            finally:
                torch.cuda.set_sync_debug_mode("default")
    assert limit.state_dict()["count"] == len(known)
