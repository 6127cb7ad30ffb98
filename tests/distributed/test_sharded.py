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


def launch(processes: int, *trainings: str, torchrun: bool = False) -> None:
    """Run these trainings in so many processes; show what they said if one fails."""
    starter = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    done = subprocess.run(
        [sys.executable, *(starter if torchrun else ()), str(WORKER), str(processes), *trainings],
        capture_output=True,
        text=True,
        timeout=280,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]


# torch's own clipping takes neither a mixture of tensors and DTensors (tp) nor two meshes (fsdp2_tp).


def test_05_07_and_23_two_processes_read_what_the_unsharded_twin_reads() -> None:
    """Each shard is a part, each copy counts once; ranks that read at different times do not wait for each other."""
    launch(2, "ddp:adamw:torch", "fsdp2:adamw:torch", "tp:adamw:ours", "fsdp2:rmsprop:none")


def test_guards_of_all_processes_decide_alike() -> None:
    launch(2, "ddp:adamw:guard", "fsdp2:adamw:guard", "tp:adamw:guard")


def test_what_broke_in_another_process_reaches_the_first() -> None:
    launch(2, "ddp:sgd:replay")


def test_05_and_23_four_processes_on_two_dimensions() -> None:
    launch(4, "fsdp2_tp:adamw:ours", "hsdp:adamw:torch")


@pytest.mark.slow
def test_four_processes_of_torchrun() -> None:
    launch(4, "ddp:adamw:torch", "fsdp2:adamw:ours", "tp:adamw:none", torchrun=True)
