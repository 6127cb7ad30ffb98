"""The cost of measuring a flow beside that of a plain forward and backward, in one run.

Target: measure within 1.3 x of the time and 1.1 x of the peak memory of a plain step of GPT-2 124M.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from torch import nn

from benchmarks.memory import MB, STEPS, Peak, peak_memory
from benchmarks.methods import METHODS, plain
from benchmarks.report import progress, table
from benchmarks.timing import Sample, paired
from benchmarks.workloads import FLOW, Setting, Workload
from isograd.graph.traced import Loss

PLAIN = "plain step"
PROCESSES = 3
"""Whose resident memory is taken."""


def run(setting: Setting) -> Iterator[str]:
    """The report, one model after the other."""
    for workload in setting.chosen(FLOW):
        yield section(workload, setting)


def section(workload: Workload, setting: Setting) -> str:
    """Time and memory of every method on one model."""
    progress(f"flow: {workload.name}")
    examined = (PLAIN, "isograd.measure") if setting.quick else METHODS
    peaks = {name: found for name in examined if (found := memory(workload, name, setting)) is not None}
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
            f"Peak memory in MB, of fresh processes that do {STEPS} of one and nothing else: resident; and in use, "
            "with an allocator that keeps nothing back.",
            memory_table(peaks),
        )
    )


@dataclass(frozen=True)
class Memory:
    """Peaks of one method, in bytes."""

    resident: Sample
    """As the C library's allocator leaves it: it fragments differently in every process."""
    in_use: Peak


def memory(workload: Workload, name: str, setting: Setting) -> Memory | None:
    """None where the method cannot run on this model; the timing says why."""
    progress(f"  memory: {name}")
    peaks = [partial(peak_memory, workload.name, name, setting, compact=compact) for compact in (False, True)]
    try:
        resident = Sample(tuple(float(peaks[0]().peak) for _ in range(1 if setting.quick else PROCESSES)))
        return Memory(resident, peaks[1]())
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


def memory_table(peaks: dict[str, Memory]) -> str:
    """Peaks, and their ratio to the plain step's: of the whole process, and of what the steps add."""
    base = peaks[PLAIN]
    return table(
        ("", "resident", "ratio", "in use", "ratio", "ratio less the built model"),
        [
            (
                name,
                found.resident.show(MB, 0),
                f"{found.resident.median / base.resident.median:.3f}",
                f"{found.in_use.peak * MB:.0f}",
                f"{found.in_use.peak / base.in_use.peak:.3f}",
                f"{found.in_use.steps / base.in_use.steps:.3f}",
            )
            for name, found in peaks.items()
        ],
    )
