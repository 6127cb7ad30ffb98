"""Times of a method and of a plain step, taken in turn so that both see the same machine."""

from __future__ import annotations

import gc
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

BEHIND = 0.5
"""Seconds that a thread of the method's may still be busy with the last of it."""


@dataclass(frozen=True)
class Sample:
    """Readings of one quantity."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    def show(self, scale: float = 1.0, digits: int = 2) -> str:
        """`median (min .. max)`."""
        low, high = min(self.values), max(self.values)
        return " ".join(
            (f"{self.median * scale:.{digits}f}", f"({low * scale:.{digits}f} .. {high * scale:.{digits}f})")
        )


@dataclass(frozen=True)
class Paired:
    """A method timed beside a plain step: seconds of wall time and of processor time, one pair a round."""

    wall: Sample
    processor: Sample
    plain: Sample
    wall_ratio: Sample
    processor_ratio: Sample


def timed(call: Callable[[], object], device: str) -> tuple[float, float]:
    """Seconds of wall time and of processor time that one call takes, without what runs `beside` it."""
    gc.collect()  # what another call left behind is not this one's to clear
    synchronise(device)
    wall, processor, others = time.perf_counter(), time.process_time(), beside()
    call()
    synchronise(device)
    return time.perf_counter() - wall, time.process_time() - processor - (beside() - others)


def beside() -> float:
    """Processor seconds that Python's other threads have taken so far."""
    others = (thread.ident for thread in threading.enumerate() if thread is not threading.current_thread())
    return sum(time.clock_gettime(time.pthread_getcpuclockid(ident)) for ident in others if ident is not None)


def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def paired(plain: Callable[[], object], method: Callable[[], object], rounds: int, device: str) -> Paired:
    """Time `rounds` pairs of a plain step and a method, each first in every other pair.

    A thread of the method's own works when it likes, during a plain step too: its processor time is the
    method's, in equal parts.
    """
    steps: list[tuple[float, float]] = []
    taken: list[tuple[float, float]] = []
    before = beside()
    for i in range(rounds):
        if i % 2:
            taken.append(timed(method, device))
            steps.append(timed(plain, device))
        else:
            steps.append(timed(plain, device))
            taken.append(timed(method, device))
    if threading.active_count() > 1:
        time.sleep(BEHIND)
    late = (beside() - before) / rounds
    taken = [(wall, processor + late) for wall, processor in taken]

    def column(pairs: Sequence[tuple[float, float]], index: int) -> Sample:
        return Sample(tuple(pair[index] for pair in pairs))

    def ratio(index: int) -> Sample:
        return Sample(tuple(t[index] / s[index] for t, s in zip(taken, steps, strict=True)))

    return Paired(column(taken, 0), column(taken, 1), column(steps, 0), ratio(0), ratio(1))
