"""Many independent trials, spread over whatever there is to run them: processes, a cluster, a plain loop.

`run` calls `trial(setting)` for every setting. Where the calls happen is `map`:

    run(trial, settings)                                # processes of this machine, one torch thread each
    run(trial, settings, map=map)                       # here, one after the other: a debugger works
    run(trial, settings, map=ThreadPoolExecutor(4))     # any concurrent.futures.Executor
    run(trial, settings, map=Client().get_executor())   # Dask

or any function that is called like `map`, lazy or not, in order or not:

    # joblib
    map=lambda f, xs: Parallel(n_jobs=4, return_as="generator_unordered")(delayed(f)(x) for x in xs)
    # Ray
    map=ray.util.multiprocessing.Pool().imap_unordered
    # submitit: one job of a Slurm array for each trial
    map=lambda f, xs: (job.result() for job in submitit.AutoExecutor("logs").map_array(f, list(xs)))

The trial may be a closure, a lambda or a function of a notebook: it travels by cloudpickle, and a worker
process does not import the script that started it, which therefore needs no `if __name__ == "__main__":`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Protocol, cast

import cloudpickle  # pyright: ignore[reportMissingTypeStubs]

Progress = Callable[[int, int], None]
"""Called with the number of trials done and the number of all."""


@dataclass(frozen=True, slots=True)
class Failed:
    """The result of a trial that raised."""

    error: str
    """Type and message: 'ValueError: …'."""
    trace: str = ""
    """The traceback, as Python prints it."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C while trials ran. What was done is in `results`, in the order of the settings.

    `results[i]` is missing where trial i was not finished, so that `results` maps numbers to results.
    """

    def __init__(self, results: dict[int, Any]) -> None:
        super().__init__(f"interrupted after {len(results)} trials")
        self.results = results


class Map(Protocol):
    """Anything that is called like the built-in `map`: results may come late and in any order."""

    def __call__(self, function: Callable[[Any], Any], items: Iterable[Any], /) -> Iterable[Any]: ...


def run(
    trial: Callable[[Any], Any],
    settings: Iterable[Any],
    *,
    map: Map | Executor | None = None,
    store: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> list[Any]:
    """The results of `trial(setting)`, in the order of the settings; `Failed` for one that raised.

    Args:
        trial: called with one setting. With a `store` it returns what JSON can hold.
        settings: with a `store`, what JSON can hold, or dataclasses and tuples of it.
        map: where the calls happen, see the module: None for a pool of processes of this machine, an
            `Executor`, or a function like `map`. An executor is the caller's, and is left open.
        store: a file of JSON lines to which each result is added as soon as it is there. A second run with
            the same file calls the trial only for settings that are not in it, or that failed. It knows the
            settings and not the trial: another trial needs another file.
        progress: called with (done, all), first with what the store already held.

    Raises:
        Interrupted: a `KeyboardInterrupt` that holds what was done. Workers that were started here are
            stopped; trials that an executor of the caller's has not begun are cancelled.
        TypeError: `map` can be called by nobody: it is no number of workers.
        ValueError: the store is some other file, or a setting or a result is not JSON.
    """
    if map is not None and not isinstance(map, Executor) and not callable(map):
        raise TypeError(f"map={map!r} is neither an Executor nor called like map: map=ProcessPoolExecutor(4)")
    asked = list(settings)
    keys = [_key(setting) for setting in asked] if store is not None else []
    known = _read(Path(store)) if store is not None else {}
    results = {i: known[key] for i, key in enumerate(keys) if key in known}
    tasks = [_Task(i, trial, setting) for i, setting in enumerate(asked) if i not in results]
    if progress is not None:
        progress(len(results), len(asked))
    if not tasks:
        return [results[i] for i in range(len(asked))]
    with ExitStack() as stack:
        keep = stack.enter_context(_appending(Path(store))) if store is not None else None
        try:
            for i, result in _outcomes(tasks, map):
                results[i] = result if keep is None else keep(keys[i], asked[i], result)
                if progress is not None:
                    progress(len(results), len(asked))
        except KeyboardInterrupt:
            raise Interrupted(results) from None
    return [results[i] for i in range(len(asked))]


# -- where trials run ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Task:
    """One trial. It is pickled only where it leaves the process, and then whole, closures too."""

    number: int
    trial: Callable[[Any], Any]
    setting: Any

    def __reduce__(self) -> tuple[Callable[[bytes], _Task], tuple[bytes]]:
        return _unpacked, (cloudpickle.dumps((self.number, self.trial, self.setting)),)


def _unpacked(pickled: bytes) -> _Task:
    return _Task(*cloudpickle.loads(pickled))


def _attempt(task: _Task) -> tuple[int, Any]:
    try:
        return task.number, task.trial(task.setting)
    except Exception as error:
        return task.number, Failed(_said(error), traceback.format_exc())


def _said(error: BaseException) -> str:
    return "".join(traceback.format_exception_only(error)).strip()


def _outcomes(tasks: Sequence[_Task], map: Map | Executor | None) -> Iterator[tuple[int, Any]]:
    if map is None:
        with _pool(len(tasks)) as pool:
            yield from _submitted(tasks, pool)
    elif isinstance(map, Executor):
        yield from _submitted(tasks, map)
    else:
        yield from map(_attempt, tasks)


def _submitted(tasks: Sequence[_Task], executor: Executor) -> Iterator[tuple[int, Any]]:
    """As they come. A trial that takes its whole process down is told like one that raised."""
    with _main_unseen():
        futures = {executor.submit(_attempt, task): task.number for task in tasks}
    try:
        for future in as_completed(futures):
            try:
                yield future.result()
            except BrokenProcessPool:
                why = "a worker process died before this trial was done: out of memory, or killed"
                yield futures[future], Failed(f"BrokenProcessPool: {why}")
            except Exception as error:  # what the trial itself raises is a result
                why = f"{_said(error)} (on the way to a worker or back; map=map runs trials in this process)"
                yield futures[future], Failed(why, traceback.format_exc())
    finally:
        for future in futures:
            future.cancel()


@contextmanager
def _pool(trials: int) -> Iterator[ProcessPoolExecutor]:
    """Spawned, because a forked process inherits torch's thread pools in whatever state they are in."""
    context = multiprocessing.get_context("spawn")
    workers = min(trials, _cores())
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_worker)
    try:
        yield pool
    except BaseException:  # also when the consumer of the results is gone
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _cores() -> int:
    """Cores that this process may use, which in a container are fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _worker() -> None:
    """Set up a process of the pool: one torch thread, and it ends with its parent, however that ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then stops its workers
    threading.Thread(target=_end_with, args=(multiprocessing.parent_process(),), daemon=True).start()
    import torch

    torch.set_num_threads(1)


def _end_with(parent: BaseProcess | None) -> None:
    """A worker waits for tasks on a pipe that it holds open itself: it would not notice that nobody is left."""
    if parent is not None:
        parent.join()
        os._exit(1)


@contextmanager
def _main_unseen() -> Iterator[None]:
    """Hide where `__main__` came from, while processes start: they would import it and train all over."""
    main = sys.modules["__main__"]
    kept = {name: getattr(main, name) for name in ("__file__", "__spec__") if hasattr(main, name)}
    for name in kept:
        setattr(main, name, None)
    try:
        yield
    finally:
        for name, value in kept.items():
            setattr(main, name, value)


# -- what is kept --------------------------------------------------------------------------------------


def _plain(value: object) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return {"type": type(value).__qualname__, **fields}
    raise TypeError(f"{type(value).__name__} is not JSON")


def _json(value: object, what: str) -> str:
    try:
        return json.dumps(value, default=_plain, sort_keys=True)
    except TypeError as error:
        raise ValueError(f"{what} cannot be kept in the store: {error}") from None


def _key(setting: object) -> str:
    """The same in every process and on every machine, unlike `hash`."""
    return hashlib.sha256(_json(setting, "a setting").encode()).hexdigest()[:16]


def _read(path: Path) -> dict[str, Any]:
    """Results by key, without those that failed; a line that was torn by a crash is passed over."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    records = [record for line in lines if (record := _record(line)) is not None]
    if len(lines) > 1 and not records:
        raise ValueError(f"{path} is no store of trials: none of its lines is a result")
    return {record["key"]: record["result"] for record in records if "result" in record}


def _record(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        return None
    return cast(dict[str, Any], record) if isinstance(record, dict) and "key" in record else None


@contextmanager
def _appending(path: Path) -> Iterator[Callable[[str, object, Any], Any]]:
    """Yields what keeps a result, and returns it as a later run will read it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torn = path.exists() and not path.read_bytes().endswith(b"\n") and path.stat().st_size > 0
    with path.open("a", encoding="utf-8") as file:
        if torn:
            file.write("\n")

        def keep(key: str, setting: object, result: Any) -> Any:
            field = "error" if isinstance(result, Failed) else "result"
            value = result.error if isinstance(result, Failed) else result
            line = _json({"key": key, "setting": setting, field: value}, "a result")
            file.write(line + "\n")
            file.flush()
            return result if isinstance(result, Failed) else json.loads(line)["result"]

        yield keep
