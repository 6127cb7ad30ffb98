"""Peak memory of a method, in a process of its own: python -m benchmarks.memory WORKLOAD METHOD …

Reads /proc on the CPU, so it needs Linux there.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.methods import METHODS
from benchmarks.workloads import Setting, workload

ROOT = Path(__file__).parents[1]
STEPS = 2
MB = 1e-6


class Peak(NamedTuple):
    """Bytes."""

    built: int
    """In use once the model and its batch are there, before any step; the libraries are part of it."""
    peak: int
    """Highest ever."""

    @property
    def steps(self) -> int:
        """What the steps need on top of the model."""
        return self.peak - self.built


def peak_memory(
    name: str, method: str, setting: Setting, *, compact: bool, module: str = "benchmarks.memory"
) -> Peak:
    """Peak of a fresh process that does nothing but a few times this: `python -m module` with these arguments.

    `compact`: the C library returns what is freed to the system at once, so that the peak is what was in use,
    without the holes in the heap that depend on the order of small allocations.
    """
    environment = {**os.environ, "MALLOC_TRIM_THRESHOLD_": "0"} if compact else None
    command = [sys.executable, "-m", module, name, method, setting.device, str(setting.threads)]
    done = subprocess.run(
        command + ["--quick"] * setting.quick,
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{name}, {method}: {done.stderr.strip().splitlines()[-1]}")
    return Peak(*json.loads(done.stdout.splitlines()[-1]))


def in_use(device: str) -> tuple[int, int]:
    """Resident memory of this process, or what is allocated on the GPU: now, and highest ever, in bytes."""
    if device == "cuda":
        return torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
    # Linux hands the parent's ru_maxrss down to its children; what /proc tells is the process's own.
    lines = Path("/proc/self/status").read_text().splitlines()
    kilobytes = {
        key: int(rest.split()[0])
        for key, _, rest in (line.partition(":") for line in lines)
        if key in ("VmRSS", "VmHWM")
    }
    return kilobytes["VmRSS"] * 1024, kilobytes["VmHWM"] * 1024


def asked(methods: Iterable[str]) -> tuple[str, str, Setting]:
    """Workload, method and setting that this process was started with."""
    parser = argparse.ArgumentParser()
    parser.add_argument("workload")
    parser.add_argument("method", choices=methods)
    parser.add_argument("device")
    parser.add_argument("threads", type=int)
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    return given.workload, given.method, Setting(given.quick, given.device, given.threads)


def main() -> None:
    name, method, setting = asked(METHODS)
    model, loss = workload(name).built(setting)
    built, _ = in_use(setting.device)
    for _ in range(STEPS):
        METHODS[method](model, loss)
    print(json.dumps((built, in_use(setting.device)[1])))


if __name__ == "__main__":
    main()
