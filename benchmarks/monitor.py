"""What watching a training step costs, beside the step alone and beside what people use today.

Goal: within 1.25 x of one `_foreach_norm` over the gradients, the floor; with the clip owned, below a step with
torch's clipping and no monitor.
"""

from __future__ import annotations

import copy
import importlib.util
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import torch
from torch import nn

import isograd
from benchmarks.report import progress, table
from benchmarks.timing import paired
from benchmarks.workloads import FLOW, Setting, Workload, transformer
from isograd.measure import Loss

WARM, QUICK_WARM = 25, 12
"""Steps before any is timed: past the first ten, which are read in full."""
BLOCK = 5
"""Steps timed at once: what is spaced out over steps is then seen."""

Step = Callable[[], None]
Method = Callable[[nn.Module, Loss, torch.optim.Optimizer, ExitStack], Step]
"""One training step with what a tool does in it; what must be undone goes on the stack."""


def plain(model: nn.Module, loss: Loss, optimizer: torch.optim.Optimizer, stack: ExitStack) -> Step:
    def step() -> None:
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()

    return step


def between(read: Callable[[nn.Module], object]) -> Method:
    """A step that reads the gradients before the optimizer does."""

    def method(model: nn.Module, loss: Loss, optimizer: torch.optim.Optimizer, stack: ExitStack) -> Step:
        def step() -> None:
            optimizer.zero_grad()
            loss(model).backward()
            read(model)
            optimizer.step()

        return step

    return method


def floor(model: nn.Module) -> object:
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return torch.stack(torch._foreach_norm(gradients)).tolist()


def by_item(model: nn.Module) -> object:
    return [p.grad.norm().item() for p in model.parameters() if p.grad is not None]


def clip(model: nn.Module) -> object:
    return nn.utils.clip_grad_norm_(model.parameters(), 1e9)


def watched(budget: float) -> Method:
    def method(model: nn.Module, loss: Loss, optimizer: torch.optim.Optimizer, stack: ExitStack) -> Step:
        stack.enter_context(isograd.watch(model, optimizer, budget=budget))
        return plain(model, loss, optimizer, stack)

    return method


def watched_clip(model: nn.Module, loss: Loss, optimizer: torch.optim.Optimizer, stack: ExitStack) -> Step:
    monitor = stack.enter_context(isograd.watch(model, optimizer))
    return between(lambda _: monitor.clip_(1e9))(model, loss, optimizer, stack)


def wandb(model: nn.Module, loss: Loss, optimizer: torch.optim.Optimizer, stack: ExitStack) -> Step:
    import wandb as tool

    folder = stack.enter_context(tempfile.TemporaryDirectory())
    run = stack.enter_context(tool.init(mode="offline", dir=folder, settings=tool.Settings(silent=True)))
    run.watch(model, log="gradients", log_freq=1)
    inner = plain(model, loss, optimizer, stack)

    def step() -> None:
        inner()
        run.log({})

    return step


def lightning(model: nn.Module) -> object:
    from lightning.pytorch.utilities import grad_norm

    return grad_norm(model, norm_type=2)


METHODS: dict[str, tuple[str, Method]] = {
    "_foreach_norm, the floor": ("torch", between(floor)),
    "isograd.watch": ("isograd", watched(0.01)),
    "isograd.watch, all columns at every step": ("isograd", watched(1e6)),
    "clip_grad_norm_": ("torch", between(clip)),
    "isograd.watch, monitor.clip_": ("isograd", watched_clip),
    ".norm().item()": ("torch", between(by_item)),
    "wandb.watch gradients": ("wandb", wandb),
    "Lightning grad_norm": ("lightning", between(lightning)),
}


def run(setting: Setting) -> Iterator[str]:
    """The report, one model after the other."""
    for workload in (transformer(6), *FLOW):
        yield section(workload, setting)


def section(workload: Workload, setting: Setting) -> str:
    progress(f"monitor: {workload.name}")
    model, loss = workload.built(setting)
    size = sum(p.numel() for p in model.parameters()) / 1e6
    tensors = sum(1 for _ in model.parameters())
    rounds, warm = (3, QUICK_WARM) if setting.quick else (workload.rounds, WARM)
    rows = [row(name, model, loss, rounds, setting, METHODS[name]) for name in METHODS]
    return "\n\n".join(
        (
            f"## {'quick stand-in for ' * setting.quick}{workload.describe}: {size:.1f}M parameters in {tensors} tensors, AdamW",
            f"{rounds} pairs of {BLOCK} steps alone and {BLOCK} steps with the method, after {warm} steps; "
            "median (min .. max).",
            table(("", "plain ms", "method ms", "ratio", "ratio of processor time"), rows),
        )
    )


def row(
    name: str, model: nn.Module, loss: Loss, rounds: int, setting: Setting, tried: tuple[str, Method]
) -> tuple[str, ...]:
    progress(f"  {name}")
    package, method = tried
    if importlib.util.find_spec(package) is None:
        return name, "", "", "not installed", ""
    twin = copy.deepcopy(model)  # hooks of the method are then not in the step alone
    alone = plain(model, loss, torch.optim.AdamW(model.parameters(), lr=1e-6), ExitStack())
    with ExitStack() as stack:
        try:
            step = method(twin, loss, torch.optim.AdamW(twin.parameters(), lr=1e-6), stack)
            for _ in range(QUICK_WARM if setting.quick else WARM):
                step()
        except Exception as error:  # that another tool fails on a model is a result
            return name, "", "", f"fails: {type(error).__name__}", ""
        alone()
        found = paired(lambda: repeat(alone), lambda: repeat(step), rounds, setting.device)
    return (
        name,
        found.plain.show(1e3 / BLOCK, 1),
        found.wall.show(1e3 / BLOCK, 1),
        found.wall_ratio.show(digits=3),
        found.processor_ratio.show(digits=3),
    )


def repeat(step: Step) -> None:
    for _ in range(BLOCK):
        step()
