"""The record on disk: whole after any death, bounded, continued, and never in the way of the training."""

from __future__ import annotations

import contextlib
import inspect
import io
import itertools
import multiprocessing
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterable
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import isograd
from isograd.cli import main
from isograd.diagnosis import Finding, Severity
from isograd.monitor.detectors import Detectors
from isograd.monitor.reading import Reading
from isograd.record import NotARun, Run, database, runs

SITES = ("0.weight", "0.bias", "2.weight")
SHAPES = ((4, 3), (4,), (2, 4))
NAN = float("nan")


def reading(step: int, *, deep: bool = False, sites: tuple[str, ...] = SITES) -> Reading:
    """Every value tells its step and place, so that a torn row would show."""
    names = ("grad_norm", "weight_norm", *(("dead",) if deep else ()))
    columns = {name: torch.tensor([step + 0.25 * i for i in range(len(sites))]) for name in names}
    scalars = {"loss": 1 / (step + 1), "grad_norm": float(step)}
    shapes = SHAPES if sites == SITES else ()
    return Reading(step, sites, columns, scalars, ("deep",) if deep else (), float(step), shapes)


def finding(step: int) -> Finding:
    evidence: dict[str, float | int | str] = {"step": step, "lead": NAN, "limit": float("inf")}
    return Finding(
        "TR702", "loss-spike", Severity.WARNING, "it rose", "a cause", ("0.weight",), evidence, ("warm-up",)
    )


class Counting:
    """Remembers what it has seen; finds something at every 100th step."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def observe(self, reading: Reading) -> Iterable[Finding]:
        self.seen.append(reading.step)
        return [finding(reading.step)] if reading.step % 100 == 99 else []

    def state(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def restore(self, state: dict[str, Any]) -> None:
        self.seen = list(state["seen"])


def same(found: Reading, made: Reading) -> bool:
    columns = all(torch.equal(found.columns[name], made.columns[name]) for name in made.columns)
    rest = ("step", "sites", "scalars", "notes", "time", "shapes")
    return (
        columns
        and list(found.columns) == list(made.columns)
        and all(getattr(found, name) == getattr(made, name) for name in rest)
    )


# -- what goes in comes out ------------------------------------------------------------------------------


def test_what_goes_in_comes_out(tmp_path: Path) -> None:
    made = [reading(0), reading(1, deep=True), reading(2), reading(3, sites=("other",))]
    with Run.create(tmp_path / "run") as run:
        for one in made:
            run.append(one, [finding(one.step)] if one.step == 2 else [])
    read = Run.open(tmp_path / "run")
    assert all(same(a, b) for a, b in zip(read.readings(), made, strict=True))
    ((step, found),) = read.findings
    assert step == 2
    assert (found.code, found.severity, found.sites) == ("TR702", Severity.WARNING, ("0.weight",))
    assert found.evidence["limit"] == float("inf")
    assert str(found.evidence["lead"]) == "nan"
    assert read.series("loss") == ([0, 1, 2, 3], [1.0, 1 / 2, 1 / 3, 1 / 4])


def test_values_that_are_no_numbers_are_kept(tmp_path: Path) -> None:
    columns = {"grad_norm": torch.tensor([NAN, float("inf"), 0.0])}
    with Run.create(tmp_path / "run") as run:
        run.append(Reading(0, SITES, columns, {"loss": NAN, "grad_norm": float("inf")}))
        (row,) = run.rows()
    assert [str(value) for value in row.column("grad_norm")] == ["nan", "inf", "0.0"]
    assert [str(value) for value in row.scalars.values()] == ["nan", "inf"]
    with pytest.raises(KeyError, match="dead"):
        row.column("dead")


def test_sites_are_written_once_and_when_they_change(tmp_path: Path) -> None:
    with Run.create(tmp_path / "run") as run:
        for step in range(50):
            run.append(reading(step, sites=SITES if step < 30 else ("other",)))
    db = sqlite3.connect(tmp_path / "run" / database.FILE)
    assert db.execute("SELECT count(*) FROM layouts").fetchone() == (2,)
    assert db.execute("SELECT DISTINCT length(content) FROM steps").fetchall() == [(24,), (8,)]


def test_reading_needs_no_torch(tmp_path: Path) -> None:
    with Run.create(tmp_path / "run") as run:
        run.append(reading(0), [finding(0)])
    program = f"""
import sys
sys.modules["torch"] = None
from isograd.record import Run
run = Run.open({str(tmp_path / "run")!r})
print(run.progress().step, run.told()[0].content["code"], list(next(run.rows()).column("grad_norm")))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "0 TR702 [0.0, 0.25, 0.5]\n"


# -- while it is written ----------------------------------------------------------------------------------


def test_it_is_read_while_it_is_written(tmp_path: Path) -> None:
    with Run.create(tmp_path / "run") as run:
        run.append(reading(0))
        read = Run.open(tmp_path / "run")
        assert read.progress().writing
        for step in range(1, 20):
            run.append(reading(step))
            assert read.progress().step == step
            assert [row.step for row in read.rows()] == list(range(step + 1))
    after = Run.open(tmp_path / "run").progress()
    assert (after.writing, after.ended) == (False, True)


def test_any_thread_may_append(tmp_path: Path) -> None:
    with Run.create(tmp_path / "run") as run:
        run.append(reading(0))
        threads = [
            threading.Thread(target=lambda k=k: [run.append(reading(1 + k * 50 + i)) for i in range(50)])
            for k in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [row.step for row in run.rows()] == list(range(201))


def test_a_second_process_gets_a_run_of_its_own(tmp_path: Path) -> None:
    with Run.create(tmp_path / "run") as first:
        with pytest.warns(
            UserWarning, match="another training is being recorded into .*run: this run goes to .*run-2"
        ):
            second = Run.create(tmp_path / "run")
        first.append(reading(0))
        second.append(reading(0))
        second.append(reading(1))
        assert (first.last, second.last) == (0, 1)
        second.close()
    assert [path.name for path in runs(tmp_path)] == ["run", "run-2"] or len(runs(tmp_path)) == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the first is free again
        Run.create(tmp_path / "run").close()


def test_runs_are_found_below_a_folder_and_not_through_links(tmp_path: Path) -> None:
    found = [tmp_path / "runs" / "vision" / "resnet", tmp_path / "runs" / "a" / "b" / "c" / "d"]
    passed_over = [tmp_path / "runs" / ".hidden" / "run", tmp_path / "elsewhere", found[1] / "e"]
    for path in (*found, *passed_over):
        with Run.create(path) as run:
            run.append(reading(0))
    (tmp_path / "runs" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "runs" / "round").symlink_to(tmp_path / "runs")
    assert set(runs(tmp_path / "runs")) == set(found)


def test_two_processes_never_share_a_record(tmp_path: Path) -> None:
    def record(said: Connection, go: Connection) -> None:
        warnings.simplefilter("ignore")
        with Run.create(tmp_path / "run") as run:
            said.send(run.name)
            go.recv()
            for step in range(100):
                run.append(reading(step))

    fork = multiprocessing.get_context("fork")
    started = []
    for _ in range(2):
        (hear, said), (heard, go) = fork.Pipe(duplex=False), fork.Pipe(duplex=False)
        process = fork.Process(target=record, args=(said, heard))
        process.start()
        started.append((process, hear.recv(), go))
    for _, _, go in started:
        go.send(None)
    for process, _, _ in started:
        process.join()
        assert process.exitcode == 0
    assert [name for _, name, _ in started] == ["run", "run-2"]
    for name in ("run", "run-2"):
        with Run.open(tmp_path / name) as run:
            assert all(same(one, reading(step)) for step, one in enumerate(run.readings()))
            assert len(run) == 100


def write(path: Path, said: Connection) -> None:
    """A training that records until it is killed, and says each step when it is committed."""
    run = Run.create(path, detectors=(memory := Counting()))
    said.send((run.last, len(memory.seen)))
    for step in itertools.count(run.last + 1):
        made = reading(step, deep=step % 7 == 0)
        run.append(made, memory.observe(made))
        said.send(step)


def killed(path: Path, times: int) -> None:
    """Kill the writer at random moments; each time everything it had committed is there, and whole."""
    chance = random.Random(0)
    fork = multiprocessing.get_context("fork")
    committed = -1
    for _ in range(times):
        hear, say = fork.Pipe(duplex=False)
        writer = fork.Process(target=write, args=(path, say))
        writer.start()
        say.close()
        last, seen = hear.recv()
        assert last >= committed
        assert seen == last + 1, "the detectors go on from where the record ends"
        time.sleep(chance.uniform(0.0, 0.05))
        os.kill(writer.pid or 0, signal.SIGKILL)
        writer.join()
        committed = last
        with contextlib.suppress(EOFError, OSError):
            while True:
                committed = hear.recv()
        check_whole(path, since=max(0, last - 20), committed=committed)


def check_whole(path: Path, *, since: int, committed: int) -> None:
    db = sqlite3.connect(path / database.FILE)
    assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    db.close()
    read = Run.open(path)
    assert not read.progress().writing
    assert not read.progress().ended
    assert read.last >= committed
    found = list(read.readings(since))
    assert all(same(one, reading(one.step, deep=one.step % 7 == 0)) for one in found)
    assert [one.step for one in found] == list(range(since, read.last + 1))
    assert [told.step for told in read.told()] == list(range(99, read.last + 1, 100))
    read.close()


def test_every_committed_step_is_whole_after_a_kill(tmp_path: Path) -> None:
    killed(tmp_path / "run", 20)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_committed_step_is_whole_after_200_kills(tmp_path: Path) -> None:
    killed(tmp_path / "run", 200)


# -- continued ---------------------------------------------------------------------------------------------


def test_a_run_is_continued_with_its_detectors(tmp_path: Path) -> None:
    memory = Counting()
    with Run.create(tmp_path / "run", detectors=memory) as run:
        for step in range(300):
            run.append(reading(step), memory.observe(reading(step)))
    again = Counting()
    with Run.create(tmp_path / "run", detectors=again) as run:
        assert again.seen == memory.seen
        run.append(reading(0))  # counts from 0 again
        run.append(reading(1))
        assert run.last == 301
        assert len(run.told()) == 3, "nothing is told twice"


def test_a_step_trained_again_replaces_the_old(tmp_path: Path) -> None:
    with Run.create(tmp_path / "run") as run:
        for step in range(10):
            run.append(reading(step))
    with Run.create(tmp_path / "run") as run:  # from a checkpoint at step 7
        run.append(reading(7, deep=True))
        assert [row.step for row in run.rows()] == list(range(10))
        assert [row.notes for row in run.rows(7, 9)] == [("deep",), ()]


def test_a_record_that_was_begun_since_is_of_another_training(tmp_path: Path) -> None:
    with Run.create(tmp_path / "run") as run:
        run.append(reading(0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        paths: list[str] = []
        since = time.time()
        for _ in range(2):  # one after the other, and each has ended before the next
            with Run.create(tmp_path / "run", since=since) as run:
                paths.append(run.path.name)
                run.append(reading(0))
                with Run.create(tmp_path / "run", since=since) as second:  # while that one is written
                    paths.append(second.path.name)
    assert paths == ["run", "run-2", "run-3", "run-4"]
    with Run.open(tmp_path / "run") as run:
        assert run.last == 1, "what was there before is continued"


# -- bounded -----------------------------------------------------------------------------------------------


def test_old_steps_are_thinned_and_findings_stay(tmp_path: Path) -> None:
    limit = 400_000
    with Run.create(tmp_path / "run", limit=limit) as run:
        for step in range(12_000):
            run.append(reading(step), [finding(step)] if step in (10, 11) else [])
        kept = [row.step for row in run.rows()]
        assert database.size(run._db) < 1.1 * limit
    gaps = [b - a for a, b in pairwise(kept)]
    assert kept[0] == 0
    assert {10, 11} <= set(kept)
    newest = kept[len(kept) * 2 // 3 :]
    assert newest == list(range(newest[0], 12_000)), "the newest steps are whole"
    assert max(gaps[: len(gaps) // 4]) > max(gaps[len(gaps) // 2 :]), "older is thinner"


# -- a disk that does not take it -------------------------------------------------------------------------


def test_a_full_disk_is_one_warning_and_a_gap(tmp_path: Path) -> None:
    with Run.create(tmp_path / "run") as run:
        run.append(reading(0))
        (pages,) = run._db.execute("PRAGMA page_count").fetchone()
        run._db.execute(
            f"PRAGMA max_page_count = {pages}"
        )  # what SQLite says then is what it says of a full disk
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for step in range(1, 600):
                run.append(reading(step))
        assert [str(w.message) for w in caught if "database or disk is full" in str(w.message)]
        assert len(caught) == 1
        held = run.last
        assert held < 599
        run._db.execute("PRAGMA max_page_count = 100000")
        run.append(reading(600))
        (row,) = run.rows(600)
        assert row.notes == (f"{599 - held} steps before this one could not be recorded",)


def test_closing_on_a_full_disk_counts_steps_alone(tmp_path: Path) -> None:
    detectors = Detectors()
    run = Run.create(tmp_path / "run", detectors=detectors)
    run.append(reading(0), detectors.observe(reading(0)))
    run._db.execute("PRAGMA max_page_count = 1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for step in range(1, 200):
            run.append(reading(step), detectors.observe(reading(step)))
        missed = 199 - run.last
        run.close()
    assert 0 < missed == run.missed


LIMITED = """
import resource, sys, warnings
from test_record import Run, reading
with warnings.catch_warnings(record=True) as told, Run.create(sys.argv[1]) as run:
    warnings.simplefilter("always")
    run.append(reading(0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (120_000, resource.RLIM_INFINITY))
    for step in range(1, 300):
        run.append(reading(step))
    held = run.last
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    run.append(reading(300))
    print(len(told), held, run.last)
"""


def test_a_cell_that_is_run_again_goes_on_with_its_record(tmp_path: Path) -> None:
    """The monitor before it is closed first: its record was still held, by "another process"."""
    model = nn.Linear(4, 4)
    optimizer = torch.optim.Adam(model.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for last in (4, 9):
            monitor = isograd.watch(model, optimizer, run=tmp_path / "run")
            for _ in range(5):
                model(torch.ones(2, 4)).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
            assert monitor.latest().step == last
    monitor.close()
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_full_disk_is_told_at_the_line_that_watches(tmp_path: Path) -> None:
    """It is found out on a thread of its own, on whose stack nothing of the user's is."""
    model = nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run = Run.create(tmp_path / "run")
    (pages,) = run._db.execute("PRAGMA page_count").fetchone()
    run._db.execute(f"PRAGMA max_page_count = {pages}")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        monitor, line = isograd.watch(model, optimizer, run=run, budget=1), inspect.stack()[0].lineno
        for _ in range(300):
            model(torch.ones(2, 4)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        monitor.close()
    (told,) = [w for w in caught if "cannot record into" in str(w.message)]
    assert (told.filename, told.lineno) == (__file__, line)


@pytest.mark.skipif(sys.platform == "win32", reason="no limits on a process's files")
def test_a_record_that_is_deleted_is_told_once_at_the_line_that_watches(tmp_path: Path) -> None:
    model = nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        monitor, line = isograd.watch(model, optimizer, run=tmp_path / "run"), inspect.stack()[0].lineno
        for step in range(20):
            model(torch.ones(2, 4)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            if step == 5:
                monitor.latest()
                shutil.rmtree(tmp_path / "run")
        assert monitor.latest().step == 19
        monitor.close()
    (told,) = caught
    assert "was deleted while it was written" in str(told.message)
    assert (told.filename, told.lineno) == (__file__, line)


def test_a_script_that_changes_its_folder_keeps_its_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with Run.create("run") as run:
            run.append(reading(0))
            monkeypatch.chdir(tmp_path.parent)
            run.append(reading(1))
            assert run.recording


def test_the_system_lets_no_file_grow_further(tmp_path: Path) -> None:
    """The write itself fails, as on a full disk: one warning, a gap, and a whole record."""
    command = [sys.executable, "-c", LIMITED, str(tmp_path / "run")]
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": path}
    )
    warned, held, last = map(int, done.stdout.split())
    assert warned == 1
    assert 0 < held < 299
    assert last == 300
    with Run.open(tmp_path / "run") as run:
        assert [row.step for row in run.rows()] == [*range(held + 1), 300]
        assert next(run.rows(300)).notes == (f"{299 - held} steps before this one could not be recorded",)
    db = sqlite3.connect(tmp_path / "run" / database.FILE)
    assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_a_directory_that_cannot_be_written_is_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: Path) -> None:
        raise sqlite3.OperationalError("attempt to write a readonly database")

    monkeypatch.setattr(database, "lock", refuse)  # root may write anywhere
    with pytest.warns(UserWarning, match="readonly database.*kept in memory only") as caught:
        run = Run.create(tmp_path / "run")
    assert len(caught) == 1
    assert not run.recording
    for step in range(5):
        run.append(reading(step))
    assert [row.step for row in run.rows()] == list(range(5))
    run.close()


def test_a_folder_below_a_file_is_one_warning(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="cannot record"):
        run = Run.create(tmp_path / "file" / "run")
    run.append(reading(0))
    assert run.last == 0


# -- what is no run ----------------------------------------------------------------------------------------


def test_what_is_no_run_is_said(tmp_path: Path) -> None:
    with pytest.raises(NotARun, match=r"no run is recorded in .*isograd runs"):
        Run.open(tmp_path)
    (tmp_path / database.FILE).write_bytes(b"not a database, but long enough to look at" * 30)
    with pytest.raises(NotARun, match="cannot be read"):
        Run.open(tmp_path)
    with pytest.raises(ValueError, match="is a file: a run is a directory"):
        Run.create(tmp_path / database.FILE)


def test_tables_that_cannot_be_written_are_no_error_of_ours(tmp_path: Path) -> None:
    with Run.create(tmp_path / "run") as run:
        run.append(reading(0))
    (tmp_path / "file").touch()
    status, text = in_shell(["export", str(tmp_path / "run"), "-o", str(tmp_path / "file" / "tables")])
    assert status == 2
    assert "could not be written: Not a directory" in text
    assert "bug in isograd" not in text


def test_a_record_that_was_damaged_is_said(tmp_path: Path) -> None:
    """By Python and by every command; a list of runs goes on with the others."""
    for name in ("broken", "whole"):
        with Run.create(tmp_path / name) as run:
            for step in range(300):
                run.append(reading(step), [finding(step)])
    file = tmp_path / "broken" / database.FILE
    pages = file.read_bytes()
    file.write_bytes(pages[: 6 * 4096] + b"\xa5" * (len(pages) - 6 * 4096))
    with pytest.raises(NotARun, match="broken"), Run.open(tmp_path / "broken") as run:
        list(run.rows())
    for command in (["report"], ["export", "-o", str(tmp_path / "tables")], ["check"]):
        got = in_shell([*command, str(tmp_path / "broken")])
        assert got[0] == 2, got
        assert "broken" in got[1]
        assert "bug in isograd" not in got[1]
    status, text = in_shell(["runs", str(tmp_path)])
    assert status == 0
    assert text.count("ended") + text.count("unreadable") == 2


def test_another_database_is_no_run(tmp_path: Path) -> None:
    sqlite3.connect(tmp_path / database.FILE).execute("CREATE TABLE info (key)").connection.close()
    for ask in (Run.open, Run.create):
        with pytest.raises(NotARun, match="is a database, but no record of a run"):
            ask(tmp_path)
    db = sqlite3.connect(tmp_path / database.FILE)
    assert db.execute("SELECT name FROM sqlite_master").fetchall() == [("info",)]
    db.close()


def test_a_run_is_opened_by_its_file_too(tmp_path: Path) -> None:
    """As a shell completes it."""
    with Run.create(tmp_path / "run") as run:
        run.append(reading(0))
    with Run.open(tmp_path / "run" / database.FILE) as run:
        assert (run.path, run.last) == (tmp_path / "run", 0)


def test_a_long_name_is_told_by_its_end(tmp_path: Path) -> None:
    inside = "transformer.layers.11.attention.projection"
    with Run.create(tmp_path / "run") as run:
        run.append(reading(0, sites=(f"{inside}.weight", f"{inside}.bias", "head.weight")))
    shown = in_shell(["report", str(tmp_path / "run")])[1]
    names = [line.split()[0] for line in shown.splitlines() if line.startswith("  ")]
    assert names[0].startswith("…")
    assert names[0].endswith("projection.weight")
    assert names[1].endswith("projection.bias")
    assert names[2] == "head.weight"


def in_shell(words: list[str]) -> tuple[int, str]:
    """Exit status of a command, and all that it said."""
    said = io.StringIO()
    with (
        contextlib.redirect_stdout(io.TextIOWrapper(io.BytesIO())) as out,
        contextlib.redirect_stderr(io.TextIOWrapper(io.BytesIO())) as err,
        pytest.raises(SystemExit) as end,
    ):
        main(words)
    for stream in (out, err):
        stream.flush()
        said.write(stream.buffer.getvalue().decode())
    assert isinstance(end.value.code, int)
    return end.value.code, said.getvalue()


def test_nothing_in_a_record_is_run_and_nothing_in_it_is_markup(tmp_path: Path) -> None:
    """Names come from a model that somebody else wrote; nothing of theirs is unpickled, or shown as markup."""
    name = "<script>alert(1)</script>[bold red]x[/]\x1b[31m"
    one = Finding("TR702", "loss-spike", Severity.ERROR, f"{name} rose", name, (name,), {"step": 1}, (name,))
    with Run.create(tmp_path / "run") as run:
        for step in range(3):
            run.append(reading(step, sites=(name, "b", "c")), [one])
    for file in (tmp_path / "run").iterdir():
        assert b"\x80\x04\x95" not in file.read_bytes()  # how a pickle begins
    shown = in_shell(["report", str(tmp_path / "run")])[1]
    assert name.replace("\x1b", "\\x1b") in shown  # what would steer the terminal is spelled out
    assert "\x1b" not in shown
    with Run.open(tmp_path / "run") as run:
        page = isograd.diagnose(run)._repr_html_()
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert "[bold red]" in in_shell(["check", str(tmp_path / "run")])[1]


def test_a_newer_format_is_not_touched(tmp_path: Path) -> None:
    Run.create(tmp_path / "run").close()
    db = sqlite3.connect(tmp_path / "run" / database.FILE)
    db.execute("PRAGMA user_version = 99")
    db.close()
    for way in (Run.open, Run.create):
        with pytest.raises(NotARun, match=r"format 99, this isograd reads up to 1: upgrade it"):
            way(tmp_path / "run")


def test_what_was_opened_to_read_is_not_written(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run")
    run.close()
    run.close()
    with pytest.raises(ValueError, match="this run is closed"):
        run.append(reading(0))
    with pytest.raises(ValueError, match="opened to read"):
        Run.open(tmp_path / "run").append(reading(0))
