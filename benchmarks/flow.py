"""The cost of measuring a flow beside that of a plain forward and backward, in one run.

Target: measure within 1.3 x of the time and 1.1 x of the peak memory of a plain step of GPT-2 124M.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from benchmarks.memory import MB, STEPS, Peak, peak_memory
from benchmarks.methods import METHODS, plain
from benchmarks.report import progress, table
from benchmarks.timing import paired
from benchmarks.workloads import FLOW, Setting, Workload
from isograd.measure import Loss

PLAIN = "plain step"


def run(setting: Setting) -> Iterator[str]:
    """The report, one model after the other."""
    for workload in FLOW:
        yield section(workload, setting)


def section(workload: Workload, setting: Setting) -> str:
    """Time and memory of every method on one model."""
    progress(f"flow: {workload.name}")
    examined = (PLAIN, "isograd.measure") if setting.quick else METHODS
    peaks = {name: peak(workload, name, setting) for name in examined}
    model, loss = workload.built(setting)
    size = sum(p.numel() for p in model.parameters()) / 1e6
    rounds = 3 if setting.quick else workload.rounds
    times = [timing(name, model, loss, rounds, setting) for name in METHODS if name != PLAIN]
    title = "quick stand-in for " * setting.quick + workload.describe
    return "\n\n".join(
        (
            f"## {title}: {size:.1f}M parameters",
            f"Time: {rounds} pairs of a plain step and the method; median (min .. max).",
            table(("", "plain ms", "method ms", "ratio", "ratio of processor time"), times),
            f"Peak memory of a fresh process that does {STEPS} of one and nothing else, in MB.",
            memory_table(peaks),
        )
    )


def peak(workload: Workload, name: str, setting: Setting) -> Peak | None:
    """None where the method cannot run on this model; the timing says why."""
    progress(f"  memory: {name}")
    try:
        return peak_memory(workload.name, name, setting)
    except RuntimeError as error:
        progress(f"    {error}")
        return None


def timing(name: str, model: nn.Module, loss: Loss, rounds: int, setting: Setting) -> tuple[str, ...]:
    """One row of the table of times."""
    progress(f"  time: {name}")
    method = METHODS[name]
    plain(model, loss)
    try:
        said = method(model, loss)
    except Exception as error:  # that another tool fails on a model is a result
        return name, "", "", f"fails: {type(error).__name__}", ""
    found = paired(lambda: plain(model, loss), lambda: method(model, loss), rounds, setting.device)
    label = f"{name}: {said}" if isinstance(said, str) else name
    return (
        label,
        found.plain.show(1e3, 0),
        found.wall.show(1e3, 0),
        found.wall_ratio.show(),
        found.processor_ratio.show(),
    )


def memory_table(peaks: dict[str, Peak | None]) -> str:
    """Peaks, and their ratio to the plain step's: of the whole process, and of what the steps add."""
    base = peaks[PLAIN]
    assert base is not None
    rows = [
        (
            name,
            f"{p.built * MB:.0f}",
            f"{p.peak * MB:.0f}",
            f"{p.peak / base.peak:.3f}",
            f"{p.steps / base.steps:.3f}" if base.steps else "",
        )
        for name, p in peaks.items()
        if p is not None
    ]
    return table(("", "before", "peak", "ratio", "ratio of what the steps add"), rows)
