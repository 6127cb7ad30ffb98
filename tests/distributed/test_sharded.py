"""Sharded trainings with real processes: every statistic equals that of an unsharded twin."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch import distributed

WORKER = Path(__file__).parent / "worker.py"

pytestmark = pytest.mark.skipif(not distributed.is_gloo_available(), reason="torch was built without gloo")


def launch(processes: int, *arguments: str) -> None:
    """Run the worker in so many processes; show what they said if one fails."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    done = subprocess.run(
        [*command, str(WORKER), *arguments],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]


# torch's own clipping takes neither a mixture of tensors and DTensors (tp) nor two meshes (fsdp2_tp).
@pytest.mark.parametrize("mode", ["ddp torch", "fsdp2 torch", "tp ours"])
def test_two_processes(mode: str) -> None:
    launch(2, mode.split()[0], "adamw", mode.split()[1])


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["ddp torch", "fsdp2 ours", "tp none", "fsdp2_tp ours", "hsdp torch"])
def test_four_processes(mode: str) -> None:
    launch(4, mode.split()[0], "adamw", mode.split()[1])


@pytest.mark.slow
def test_an_optimizer_without_a_closed_form() -> None:
    launch(2, "fsdp2", "rmsprop", "none")
