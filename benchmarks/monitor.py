"""What watching a training step costs, beside the step alone and beside what people use today.

Goal: within 1.25 x of one `_foreach_norm` over the gradients, the floor; with the clip owned, below a step with
torch's clipping and no monitor.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import torch
from torch import Tensor, nn

import isograd
from benchmarks.memory import MB, asked, in_use, peak_memory
from benchmarks.report import progress, table
from benchmarks.timing import paired, timed
from benchmarks.workloads import FLOW, SMALL_GPT, Setting, Workload, transformer, workload
from isograd.measure import Loss
from isograd.monitor.cost import YOUNG

WARM, QUICK_WARM = 25, 12
"""Steps before any is timed: past the first ten, which are read in full."""
BLOCK = 5
"""Steps timed at once: what is spaced out over steps is then seen."""
LEAST = 0.05
"""Seconds of processor time that a block takes at least: of short steps it has more."""
SLOW = 2.0
"""Seconds of processor time of a step from which a block is one step, after as few as warm up the first readings."""
SLOW_ROUNDS = 3
PATIENCE = 20.0
"""Seconds for the steps until the host thread chooses which it takes: only where steps are short does it."""
PEAK_STEPS = 5

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


def settled(model: nn.Module, loss: Loss, optimizer: torch.optim.Optimizer, stack: ExitStack) -> Step:
    """Past the steps of which detectors and record get every one."""
    step = watched(0.01)(model, loss, optimizer, stack)
    started = time.perf_counter()
    for _ in range(YOUNG):
        step()
        if time.perf_counter() - started > PATIENCE:
            break
    return step


def watched_clip(model: nn.Module, loss: Loss, optimizer: torch.optim.Optimizer, stack: ExitStack) -> Step:
    monitor = stack.enter_context(isograd.watch(model, optimizer))
    return between(lambda _: monitor.clip_(1e9))(model, loss, optimizer, stack)


def guarded(model: nn.Module, loss: Loss, optimizer: torch.optim.Optimizer, stack: ExitStack) -> Step:
    guard = stack.enter_context(isograd.Guard(model, optimizer))

    def step() -> None:
        optimizer.zero_grad()
        value = loss(model)
        value.backward()
        guard.step(value)

    return step


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


def torchlens(model: nn.Module, loss: Loss, optimizer: torch.optim.Optimizer, stack: ExitStack) -> Step:
    """Its checks of magnitude and of values that are not finite."""
    from torchlens.checks import ChecksSession  # pyright: ignore[reportMissingImports]

    session = ChecksSession(model, optimizer)
    session.register_magnitude_check()
    session.register_nonfinite_gradient_check(action="collect")
    stack.enter_context(session)
    return plain(model, loss, optimizer, stack)


def torchmortem(model: nn.Module, loss: Loss, optimizer: torch.optim.Optimizer, stack: ExitStack) -> Step:
    from torchmortem import Autopsy  # pyright: ignore[reportMissingImports]

    autopsy = stack.enter_context(Autopsy(model, optimizer=optimizer))

    def step() -> None:
        optimizer.zero_grad()
        value = loss(model)
        value.backward()
        optimizer.step()
        autopsy.step(loss=value.item())

    return step


METHODS: dict[str, tuple[str, Method]] = {
    "_foreach_norm, the floor": ("torch", between(floor)),
    "isograd.watch": ("isograd", settled),
    "isograd.watch, first thousand steps": ("isograd", watched(0.01)),
    "isograd.watch, all columns at every step": ("isograd", watched(1e6)),
    "clip_grad_norm_": ("torch", between(clip)),
    "isograd.watch, monitor.clip_": ("isograd", watched_clip),
    "isograd.Guard": ("isograd", guarded),
    ".norm().item()": ("torch", between(by_item)),
    "wandb.watch gradients": ("wandb", wandb),
    "Lightning grad_norm": ("lightning", between(lightning)),
    "TorchLens checks": ("torchlens", torchlens),
    "torchmortem": ("torchmortem", torchmortem),
}
IN_MEMORY: dict[str, Method] = {
    "step alone": plain,
    "isograd.watch": watched(0.01),
}
"""Its first steps, which are read in full."""


def run(setting: Setting) -> Iterator[str]:
    """The report, one model after the other."""
    for shape in setting.chosen((transformer(6), SMALL_GPT, *FLOW)):
        yield section(shape, setting)


def section(shape: Workload, setting: Setting) -> str:
    progress(f"monitor: {shape.name}")
    model, loss = shape.built(setting)
    size = sum(p.numel() for p in model.parameters()) / 1e6
    tensors = sum(1 for _ in model.parameters())
    rounds, warm = (3, QUICK_WARM) if setting.quick else (shape.rounds, WARM)
    rows = [row(name, model, loss, rounds, setting, METHODS[name]) for name in METHODS]
    return "\n\n".join(
        (
            f"## {'quick stand-in for ' * setting.quick}{shape.describe}: {size:.1f}M parameters in {tensors} tensors, "
            f"AdamW, {fed(model, loss)} a step",
            f"{rounds} pairs of {BLOCK} steps or more alone and as many with the method, after {warm} steps; "
            f"median (min .. max). Steps of more than {SLOW:g} s are timed one by one, {SLOW_ROUNDS} pairs after "
            f"{QUICK_WARM} steps. Processor time is that of all threads.",
            table(("", "plain ms", "method ms", "ratio", "ratio of processor time"), rows),
            "Memory is measured at full size." if setting.quick else memory(shape, setting),
        )
    )


def fed(model: nn.Module, loss: Loss) -> str:
    """What the first layer gets at a step: '1,024 tokens', '256 samples'."""
    first = next(m for m in model.modules() if any(True for _ in m.parameters(recurse=False)))
    inputs: list[Tensor] = []
    with first.register_forward_pre_hook(lambda _, given: inputs.append(given[0])), torch.no_grad():
        loss(model)
    tokens = not inputs[0].is_floating_point()
    return f"{inputs[0].numel():,} tokens" if tokens else f"{len(inputs[0]):,} samples"


def memory(shape: Workload, setting: Setting) -> str:
    """Peak memory with and without."""
    alone, watching = (
        peak_memory(shape.name, name, setting, compact=True, module="benchmarks.monitor").peak
        for name in IN_MEMORY
    )
    return (
        f"Peak memory of a process that takes {PEAK_STEPS} steps: {alone * MB:,.1f} MB; with isograd.watch, all columns "
        f"at every step, {watching * MB:,.1f} MB ({watching / alone - 1:+.2%})."
    )


def main() -> None:
    """Peak memory of a method, in this process."""
    name, method, setting = asked(IN_MEMORY)
    model, loss = workload(name).built(setting)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    built, _ = in_use(setting.device)
    with ExitStack() as stack:
        step = IN_MEMORY[method](model, loss, optimizer, stack)
        for _ in range(PEAK_STEPS):
            step()
        print(json.dumps((built, in_use(setting.device)[1])))


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
            alone()
            slow = timed(alone, "cpu")[1] > SLOW
            for _ in range(QUICK_WARM if setting.quick or slow else WARM):
                step()
        except Exception as error:  # that another tool fails on a model is a result
            return name, "", "", f"fails: {type(error).__name__}", ""
        block = 1 if slow else max(BLOCK, math.ceil(LEAST / took(alone)))
        rounds = SLOW_ROUNDS if slow else rounds
        found = paired(lambda: repeat(alone, block), lambda: repeat(step, block), rounds, setting.device)
    return (
        name,
        found.plain.show(1e3 / block, 1),
        found.wall.show(1e3 / block, 1),
        found.wall_ratio.show(digits=3),
        found.processor_ratio.show(digits=3),
    )


def took(step: Step) -> float:
    """Processor seconds of a step, about."""
    return min(timed(step, "cpu")[1] for _ in range(3)) + 1e-6


def repeat(step: Step, times: int) -> None:
    for _ in range(times):
        step()


if __name__ == "__main__":
    main()
