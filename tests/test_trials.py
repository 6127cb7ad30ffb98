"""Trials are spread, kept, resumed and interrupted without loss."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from isograd.trials import Failed, Interrupted, run


@dataclass(frozen=True)
class Square:
    side: int
    name: str = "a"


def joblib_map(function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
    joblib = pytest.importorskip("joblib")
    parallel = joblib.Parallel(n_jobs=2, return_as="generator_unordered")
    return parallel(joblib.delayed(function)(item) for item in items)


def test_a_closure_runs_in_processes_of_one_torch_thread_each() -> None:
    offset = 10

    def trial(setting: int) -> tuple[int, int, int]:
        return setting + offset, os.getpid(), torch.get_num_threads()

    results = run(trial, range(6))
    assert [value for value, _, _ in results] == [10, 11, 12, 13, 14, 15]
    assert os.getpid() not in {process for _, process, _ in results}
    assert {threads for _, _, threads in results} == {1}


@pytest.mark.parametrize(
    "spread",
    [map, lambda f, xs: [f(x) for x in reversed(list(xs))], ThreadPoolExecutor(2), joblib_map],
    ids=["map", "backwards", "executor", "joblib"],
)
def test_results_come_in_the_order_of_the_settings(spread: Any) -> None:
    assert run(lambda x: x * x, range(5), map=spread) == [0, 1, 4, 9, 16]


def test_a_trial_that_raises_is_a_result_that_says_so() -> None:
    first, second = run(lambda x: 1 / x, [0, 1], map=map)
    assert isinstance(first, Failed)
    assert first.error == "ZeroDivisionError: division by zero"
    assert "lambda" in first.trace
    assert second == 1


def test_a_trial_that_takes_its_process_down_is_a_result_that_says_so() -> None:
    (only,) = run(lambda _: os._exit(3), [0])
    assert isinstance(only, Failed)
    assert "died" in only.error


def test_what_is_in_the_store_is_not_run_again(tmp_path: Path) -> None:
    store, calls = tmp_path / "sub" / "runs.jsonl", []

    def trial(setting: Square) -> dict[str, float]:
        calls.append(setting.side)
        return {"area": setting.side**2, "nan": float("nan")}

    fresh = run(trial, [Square(1), Square(2)], map=map, store=store)
    seen: list[tuple[int, int]] = []
    again = run(
        trial,
        [Square(2), Square(3), Square(1)],
        map=map,
        store=store,
        progress=lambda *n: seen.append(n),
    )
    assert calls == [1, 2, 3]
    assert [result["area"] for result in again] == [4, 9, 1]
    assert seen == [(2, 3), (3, 3)]
    assert fresh[0]["area"] == 1
    assert [json.loads(line)["setting"]["side"] for line in store.read_text().splitlines()] == [1, 2, 3]


def test_a_torn_last_line_costs_its_own_trial_only(tmp_path: Path) -> None:
    store = tmp_path / "runs.jsonl"
    run(lambda x: x, [1, 2, 3], map=map, store=store)
    store.write_bytes(store.read_bytes()[:-9])
    calls: list[int] = []
    assert run(lambda x: calls.append(x) or x, [1, 2, 3], map=map, store=store) == [1, 2, 3]
    assert calls == [3]
    assert run(lambda x: calls.append(x), [1, 2, 3], map=map, store=store) == [1, 2, 3]
    assert calls == [3]


def test_a_trial_that_failed_is_tried_again(tmp_path: Path) -> None:
    store = tmp_path / "runs.jsonl"
    assert isinstance(run(lambda x: 1 / 0, [1], map=map, store=store)[0], Failed)
    assert run(lambda x: x, [1], map=map, store=store) == [1]


def test_another_file_is_not_taken_for_a_store(tmp_path: Path) -> None:
    other = tmp_path / "notes.txt"
    other.write_text("buy\nmilk\n")
    with pytest.raises(ValueError, match=r"notes\.txt is no store of trials"):
        run(lambda x: x, [1], map=map, store=other)
    assert other.read_text() == "buy\nmilk\n"


def test_what_json_cannot_hold_is_refused_in_words(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a result cannot be kept in the store: Tensor is not JSON"):
        run(lambda x: torch.ones(1), [1], map=map, store=tmp_path / "runs.jsonl")
    with pytest.raises(ValueError, match="a setting cannot be kept"):
        run(lambda x: x, [torch.ones(1)], map=map, store=tmp_path / "other.jsonl")


def test_an_interrupt_keeps_what_was_done(tmp_path: Path) -> None:
    def trial(setting: int) -> int:
        if setting == 2:
            raise KeyboardInterrupt
        return setting

    store = tmp_path / "runs.jsonl"
    with pytest.raises(Interrupted) as stopped:
        run(trial, range(4), map=map, store=store)
    assert stopped.value.results == {0: 0, 1: 1}
    assert len(store.read_text().splitlines()) == 2


SCRIPT = """
import os, pathlib, sys, time
import isograd.trials

print("imported", flush=True)

class Own:
    def __init__(self, x):
        self.x = x

def trial(x):
    if x:
        pathlib.Path(folder, "pid").write_text(str(os.getpid()))
        time.sleep(120)
    return Own(x).x

folder = sys.argv[1]
isograd.trials.run(trial, [0] + [1] * int(sys.argv[2]), store=folder + "/runs.jsonl")
print("done", flush=True)
"""


def script(tmp_path: Path, slow: int) -> subprocess.Popen[str]:
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    command = [sys.executable, str(path), str(tmp_path), str(slow)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_script_needs_no_guard_and_is_not_imported_again(tmp_path: Path) -> None:
    out, err = script(tmp_path, 0).communicate(timeout=100)
    assert out.split() == ["imported", "done"], err


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_ctrl_c_stops_the_workers_and_keeps_what_was_done(tmp_path: Path) -> None:
    process = script(tmp_path, 1)
    until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text() != "")
    until(lambda: (tmp_path / "runs.jsonl").exists() and (tmp_path / "runs.jsonl").read_text() != "")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode != 0
    assert "interrupted after 1 trials" in err
    worker = int((tmp_path / "pid").read_text())
    until(lambda: not alive(worker))
    assert len((tmp_path / "runs.jsonl").read_text().splitlines()) == 1


def test_what_cannot_travel_is_told_to_stay() -> None:
    lock = threading.Lock()
    (only,) = run(lambda _: lock.locked(), [1])
    assert isinstance(only, Failed)
    assert "cannot pickle" in only.error
    assert "map=map runs trials in this process" in only.error
    assert run(lambda _: lock.locked(), [1], map=map) == [False]


def test_a_number_of_workers_is_no_map() -> None:
    with pytest.raises(TypeError, match=r"map=4 is neither an Executor nor called like map"):
        run(str, [1], map=4)  # pyright: ignore[reportArgumentType]


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_workers_end_with_a_parent_that_was_killed(tmp_path: Path) -> None:
    """They hold their queue open themselves, and would wait for a task for ever."""
    process = script(tmp_path, 1)
    until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text() != "")
    process.kill()
    process.communicate(timeout=60)  # its output ends when the last worker has let go of it


def until(true: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


def alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True
