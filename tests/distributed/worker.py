"""Sharded trainings, watched, one after the other; every reading is held against an unsharded twin.

A training is given as mode:optimizer:clipping. Below torchrun this is one of its processes; alone it makes as many
as it is told, which need to import torch only once:

python -m torch.distributed.run --nproc-per-node 4 tests/distributed/worker.py 4 fsdp2_tp:adamw:ours
python tests/distributed/worker.py 4 fsdp2_tp:adamw:ours hsdp:adamw:torch
"""

from __future__ import annotations

import copy
import os
import sys
import tempfile
from collections.abc import Callable

import torch
from torch import Tensor, distributed, multiprocessing, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import isograd
from isograd.monitor import sharding

STEPS = 14
BAD = 11
"""The step at which one row of the batch is infinite."""


class Net(nn.Module):
    """Sizes that no number of processes divides, and one parameter smaller than their number."""

    def __init__(self) -> None:
        super().__init__()
        self.inp = nn.Linear(8, 12)
        self.up = nn.Linear(12, 20)
        self.down = nn.Linear(20, 12)
        self.norm = nn.LayerNorm(12)
        self.head = nn.Linear(12, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.inp(x))
        x = x + self.down(torch.relu(self.up(x)))
        return self.head(self.norm(x))


def ddp(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model)


def sharded(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    for module in (model.up, model.down):
        fully_shard(module, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def fsdp2(model: nn.Module) -> nn.Module:
    return sharded(model, init_device_mesh("cpu", (distributed.get_world_size(),)))


def hsdp(model: nn.Module) -> nn.Module:
    half = distributed.get_world_size() // 2
    return sharded(model, init_device_mesh("cpu", (half, 2), mesh_dim_names=("copies", "shards")))


PLAN = {"up": ColwiseParallel(), "down": RowwiseParallel()}


def tp(model: nn.Module) -> nn.Module:
    return parallelize_module(model, init_device_mesh("cpu", (distributed.get_world_size(),)), PLAN)


def fsdp2_tp(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (distributed.get_world_size() // 2, 2), mesh_dim_names=("data", "tensor"))
    return sharded(parallelize_module(model, mesh["tensor"], PLAN), mesh["data"])


MODES: dict[str, Callable[[nn.Module], nn.Module]] = {f.__name__: f for f in (ddp, fsdp2, hsdp, tp, fsdp2_tp)}


def batch_of(step: int, mode: str) -> tuple[Tensor, Tensor]:
    """The whole batch and this process's share of it."""
    generator = torch.Generator().manual_seed(step)
    whole = torch.randn(24, 8, generator=generator, dtype=torch.float64)
    if step == BAD:
        whole[3] = torch.inf
    ranks, me = distributed.get_world_size(), distributed.get_rank()
    if mode == "tp":
        ranks, me = 1, 0
    if mode == "fsdp2_tp":
        ranks, me = ranks // 2, me // 2
    return whole, whole.chunk(ranks)[me]


def process(rank: int, processes: int, store: str, trainings: list[str]) -> None:
    """One of the processes; without a store it is one of torchrun's."""
    if store:
        distributed.init_process_group("gloo", f"file://{store}", rank=rank, world_size=processes)
    else:
        distributed.init_process_group("gloo")
    for training in trainings:
        train(*training.split(":"))
    distributed.destroy_process_group()


def guarded(mode: str) -> None:
    """Both leave out a batch that breaks in one process alone, and go back together when weights are lost."""
    torch.manual_seed(0)
    twin = Net().double()
    model = MODES[mode](copy.deepcopy(twin))
    pair, norms = (twin, model), list[float]()
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-3) for m in pair]
    monitors = [isograd.watch(m, optimizer) for m, optimizer in zip(pair, optimizers, strict=True)]
    guards = [
        isograd.Guard(m, optimizer, every=16, max_norm=isograd.AdaptiveClip())
        for m, optimizer in zip(pair, optimizers, strict=True)
    ]
    for step in range(3 * STEPS):
        if step == 2 * STEPS:
            with torch.no_grad():
                for m in pair:
                    next(m.parameters()).mul_(torch.inf)
        for m, x, optimizer, guard in zip(pair, batch_of(step, mode), optimizers, guards, strict=True):
            optimizer.zero_grad()
            loss = m(x).square().mean()
            loss.backward()
            guard.step(loss)
    told = [[(event.step, event.what) for event in guard.events] for guard in guards]
    assert told[0] == told[1], told
    assert [what for _, what in told[1]] == ["left out"] * 3 + ["went back"], told
    alike(model, twin, lambda p: p)
    for m, x, optimizer, monitor in zip(pair, batch_of(0, mode), optimizers, monitors, strict=True):
        optimizer.zero_grad()
        m(x).square().mean().backward()
        monitor.clip_units_(1e-4)
        optimizer.step()
        norms.append(monitor.latest().scalars["clipped_norm"])
    alike(model, twin, lambda p: p.grad)
    torch.testing.assert_close(norms[1], norms[0], rtol=1e-6, atol=0)
    for monitor in monitors:
        monitor.close()
    distributed.barrier()


def replayed(mode: str) -> None:
    """What broke the gradients of all was the batch of the last process alone, and process 0 tells of it."""
    torch.manual_seed(0)
    model, last = MODES[mode](Net().double()), distributed.get_world_size() - 1
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    steps = count_reductions()
    with isograd.watch(model, optimizer, replay=True) as monitor:
        for step in range(STEPS):
            _, x = batch_of(0, mode)
            if step == BAD and distributed.get_rank() == last:
                x = x.clone().fill_(torch.nan)
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        if distributed.get_rank() == 0:
            (found,) = [f for f in monitor.diagnosis().findings if f.code in ("NF401", "NF402")]
            assert found.message.startswith(f"at step {BAD}: in process {last}: "), found
            assert "argument x" in found.message, found
    assert not steps, "the processes agree without a reduction of the monitor's"
    distributed.barrier()


def alike(model: nn.Module, twin: nn.Module, of: Callable[[Tensor], Tensor | None]) -> None:
    for ours, theirs in zip(map(of, model.parameters()), map(of, twin.parameters()), strict=True):
        whole = ours.full_tensor() if sharding.is_sharded(ours) else ours
        torch.testing.assert_close(whole, theirs, rtol=1e-6, atol=1e-12)


def train(mode: str, rule: str, clip: str) -> None:
    if clip in ("guard", "replay"):
        (guarded if clip == "guard" else replayed)(mode)
        return
    torch.manual_seed(0)
    twin = Net().double()
    model = MODES[mode](copy.deepcopy(twin))
    make = {"adamw": torch.optim.AdamW, "rmsprop": torch.optim.RMSprop}[rule]
    optimizers = [make(m.parameters(), lr=1e-3) for m in (twin, model)]
    written: list[int] = []
    norms: list[float] = []
    calls = count_reductions()
    monitors = [
        isograd.watch(twin, optimizers[0]),
        isograd.watch(model, optimizers[1], sinks=[lambda scalars, step: written.append(step)]),
    ]
    for step in range(STEPS):
        for m, x, optimizer in zip((twin, model), batch_of(step, mode), optimizers, strict=True):
            optimizer.zero_grad()
            m(x).square().mean().backward()
            if clip == "torch":
                nn.utils.clip_grad_norm_(m.parameters(), 1e-3)
            if clip == "ours":
                norms.append(float(monitors[m is model].clip_(1e-3)))
            if step != BAD:
                optimizer.step()
            else:  # read, and left out of the training
                rates = [group["lr"] for group in optimizer.param_groups]
                states = copy.deepcopy([m.state_dict(), optimizer.state_dict()])
                optimizer.step()
                m.load_state_dict(states[0])
                optimizer.load_state_dict(states[1])
                assert rates == [group["lr"] for group in optimizer.param_groups]
        if step != BAD and clip == "ours":
            torch.testing.assert_close(norms[-1], norms[-2], rtol=1e-6, atol=0)
        before = len(calls)
        expected, reading = (monitor.latest() for monitor in monitors)
        assert len(calls) == before, "reading back must not communicate: ranks may do it at different times"
        compare(expected, reading, step)
    expected_calls = 0 if mode == "ddp" else 2 * STEPS if clip == "ours" else STEPS
    assert len(calls) == expected_calls, f"{len(calls)} all-reduces in {STEPS} steps"
    for monitor in monitors:
        monitor.close()
    assert written == (list(range(STEPS)) if distributed.get_rank() == 0 else []), written
    distributed.barrier()


def count_reductions() -> list[int]:
    """Sizes of the reductions that the monitor starts."""
    calls: list[int] = []
    original = torch.distributed.all_reduce

    def all_reduce(tensor: Tensor, *args: object, **kwargs: object) -> object:
        calls.append(tensor.numel())
        return original(tensor, *args, **kwargs)  # type: ignore[arg-type]

    class Counting:
        def __getattr__(self, name: str) -> object:
            return all_reduce if name == "all_reduce" else getattr(distributed, name)

    sharding.distributed = Counting()  # type: ignore[assignment]
    return calls


def compare(expected: isograd.Reading, reading: isograd.Reading, step: int) -> None:
    assert reading.step == expected.step == step
    assert reading.sites == expected.sites, (reading.sites, expected.sites)
    assert reading.shapes == expected.shapes
    names = set(reading.columns)
    assert {"grad_norm", "nonfinite"} <= names
    if step < 10:
        assert names == set(expected.columns), names ^ set(expected.columns)
    for name in names & set(expected.columns):
        if step == BAD and name != "nonfinite":
            continue
        torch.testing.assert_close(
            reading.columns[name],
            expected.columns[name],
            rtol=1e-6,
            atol=1e-12,
            msg=lambda m, n=name: f"step {step} {n}: {m}",
        )
    if step == BAD:
        assert float(reading.columns["nonfinite"].sum()) > 0
    else:
        torch.testing.assert_close(
            reading.scalars["grad_norm"], expected.scalars["grad_norm"], rtol=1e-6, atol=0
        )


if __name__ == "__main__":
    processes, trainings = int(sys.argv[1]), sys.argv[2:]
    if "RANK" in os.environ:
        process(int(os.environ["RANK"]), processes, "", trainings)
    else:
        with tempfile.TemporaryDirectory() as folder:
            arguments = (processes, f"{folder}/store", trainings)
            multiprocessing.start_processes(process, arguments, processes, start_method="fork")
