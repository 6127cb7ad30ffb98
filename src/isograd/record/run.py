"""A run: the steps of a watched training, what was found in them, and what the detectors remember."""

from __future__ import annotations

import itertools
import json
import math
import os
import sqlite3
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from isograd.closing import Closing
from isograd.record import database
from isograd.record.database import NotARun
from isograd.record.home import home, name
from isograd.record.kept import Kept
from isograd.record.row import Layout, content, encoded
from isograd.warning import warn

if TYPE_CHECKING:
    from isograd.diagnosis import Finding
    from isograd.monitor.reading import Reading

LIMIT = 256 * 2**20
"""Bytes. A model of 148 parameters takes 4 kB a step: its last 30,000 steps are whole, older ones thinned."""
IN_MEMORY = 32 * 2**20
"""Bytes where no disk takes the record."""
EVERY = 256
"""Steps between two looks at the size, and between two copies of the detectors' state: what came after the
copy is read again when the run is continued."""


class Memory(Protocol):
    """Whatever learns from the steps and must not forget when the training is continued."""

    def observe(self, reading: Reading, /) -> Iterable[Finding]: ...
    def state(self) -> dict[str, Any]: ...
    def restore(self, state: dict[str, Any], /) -> None: ...


def beside(path: Path) -> Iterator[Path]:
    """Where runs go that ask for the same directory: a, a-2, a-3 and so on."""
    yield path
    yield from (path.with_name(f"{path.name}-{number}") for number in itertools.count(2))


def begun(path: Path) -> float:
    """When the newest process began to record there, in seconds since the epoch; -inf: none did."""
    try:
        with Run.open(path) as run:
            return max(
                (run.info[key] for key in ("started", "resumed") if key in run.info), default=-math.inf
            )
    except NotARun:
        return -math.inf


class Run(Kept, Closing):
    """The record of a watched training. Made by `Run.create` to write, by `Run.open` to read; a context manager."""

    def __init__(
        self,
        path: Path,
        db: sqlite3.Connection,
        held: sqlite3.Connection | None = None,
        *,
        memory: Memory | None = None,
        limit: int = LIMIT,
    ) -> None:
        super().__init__(path, db)
        self.recording = held is not None
        """Whether what is appended reaches a disk."""
        self._held, self._memory, self._limit = held, memory, limit
        self._file = (path / database.FILE).absolute()  # wherever the script goes meanwhile
        self._layouts: dict[Layout, int] = {}
        self._offset: int | None = None
        self._appended = 0
        self.missed = 0
        """Steps that could not be recorded, since the last that could."""
        self._warned = self._closed = False

    # -- making -------------------------------------------------------------------------------------------

    @classmethod
    def open(cls, path: str | Path) -> Run:
        """A run to read, also while another process writes it: its directory, or the file in it.

        Raises:
            NotARun: nothing is recorded at `path`.
        """
        path = Path(path)
        if path.name == database.FILE and path.is_file():
            path = path.parent
        return cls(path, database.connect_to_read(path))

    @classmethod
    def create(
        cls,
        path: str | Path | None = None,
        *,
        detectors: Memory | None = None,
        limit: int = LIMIT,
        since: float = math.inf,
    ) -> Run:
        """A run to write: new, or the one at `path` continued with the detectors' state as it was.

        A directory that another process is writing is left alone: the run goes beside it, with a number, and
        a warning says so. Where the disk takes nothing (read-only, full), one warning says so and the newest
        steps are kept in memory: training never stops for its record.

        Args:
            path: directory of the run; None: a new one below `isograd-runs`, or below $ISOGRAD_RUNS.
            detectors: what is restored now and saved every 256 steps and at the end.
            limit: bytes. Beyond it every second step of the older half goes, again and again; steps on
                which something was found stay.
            since: a record that was begun at this time or later is of another training, and left alone as if it
                were being written: the processes of one sweep ask for the same directory one after the other.

        Raises:
            ValueError: `path` is a file, or holds a record of a newer format or another database.
        """
        wanted = home() / name() if path is None else Path(path)
        if wanted.is_file():
            raise ValueError(f"{wanted} is a file: a run is a directory")
        try:
            run = cls._on_disk(wanted, detectors, limit, since)
        except (OSError, sqlite3.Error) as error:
            warn(
                f"isograd cannot record this run in {wanted} ({error}): its newest steps are kept in memory only"
            )
            run = cls(wanted, database.in_memory(), memory=detectors, limit=min(limit, IN_MEMORY))
        run._writable = True
        run._begin()
        return run

    @classmethod
    def _on_disk(cls, wanted: Path, detectors: Memory | None, limit: int, since: float) -> Run:
        strangers = False
        for path in beside(wanted):
            path.mkdir(parents=True, exist_ok=True)
            held = database.lock(path)
            if since < math.inf and begun(path) >= since:
                if held is not None:
                    held.close()
                continue
            if held is None:
                strangers = True
                continue
            if strangers:
                warn(f"another training is being recorded into {wanted}: this run goes to {path}")
            try:
                return cls(path, database.connect(path), held, memory=detectors, limit=limit)
            except BaseException:
                held.close()
                raise
        raise AssertionError

    def _begin(self) -> None:
        """Note who writes, and bring the detectors to where they were."""
        now = {"pid": os.getpid(), "command": [Path(sys.argv[0]).name, *sys.argv[1:]], "resumed": time.time()}
        if self.last < 0:
            now["started"] = now.pop("resumed")
        self._write_info({**now, "ended": None})
        if self._memory is not None and self.last >= 0:
            self.remember(self._memory)

    def remember(self, memory: Memory) -> list[tuple[int, Finding]]:
        """Bring detectors to where this run ends: their saved state, then the steps since.

        Returns what they find in those steps; the record may hold it already.
        """
        saved = self._one("SELECT step, state FROM detectors")
        since = -1
        if saved is not None:
            since = saved[0]
            memory.restore(json.loads(saved[1]))
        return [
            (row.step, finding) for row in self.rows(since + 1) for finding in memory.observe(row.reading())
        ]

    # -- writing ------------------------------------------------------------------------------------------

    def append(self, reading: Reading, findings: Iterable[Finding] = ()) -> None:
        """Record a step and what was found in it, as `extend` does with several."""
        self.extend([(reading, findings)])

    def extend(self, steps: Sequence[tuple[Reading, Iterable[Finding]]]) -> None:
        """Record steps and what was found in them, all of it or nothing. From any thread; never raises for the disk.

        A training that is continued and counts its steps from 0 again goes on after the last step of the
        record. A step that is trained again, from an older checkpoint, replaces what stood there. The
        detectors may have seen these steps, and none after them.
        """
        with self._guard:
            if self._closed or not self._writable:
                raise ValueError("this run is closed" if self._closed else "this run was opened to read it")
            if self._offset is None:
                self._offset = self.last + 1 if steps[0][0].step == 0 else 0
            try:
                self._extend(steps, self._offset)
            except sqlite3.Error as error:
                self._failed(error, len(steps))
            self._look()

    def _extend(self, steps: Sequence[tuple[Reading, Iterable[Finding]]], offset: int) -> None:
        before, self._appended = self._appended, self._appended + len(steps)
        due = self._appended // EVERY > before // EVERY
        layouts: dict[Layout, int] = {}  # those that are written here: they count once they are committed
        with database.transaction(self._db):
            missed = self.missed
            for reading, findings in steps:
                self._write(reading, tuple(findings), offset + reading.step, missed, layouts)
                missed = 0
            if due:
                self._save(offset + steps[-1][0].step)
        self._layouts |= layouts
        self.missed = 0
        if due and database.size(self._db) > self._limit:
            database.thin(self._db)

    def _write(
        self,
        reading: Reading,
        findings: tuple[Finding, ...],
        step: int,
        missed: int,
        layouts: dict[Layout, int],
    ) -> None:
        layout = Layout.of(reading)
        notes = list(reading.notes)
        if missed:
            notes.append(f"{missed} steps before this one could not be recorded")
        known = self._layouts.get(layout) or layouts.get(layout)
        if known is None:
            text = layout.encoded()
            self._db.execute("INSERT OR IGNORE INTO layouts (content) VALUES (?)", (text,))
            (known,) = self._db.execute("SELECT id FROM layouts WHERE content = ?", (text,)).fetchone()
            layouts[layout] = known
        self._db.execute(
            "INSERT OR REPLACE INTO steps VALUES (?, ?, ?, ?, ?, ?)",
            (step, reading.time, known, json.dumps(reading.scalars), json.dumps(notes), content(reading)),
        )
        self._db.executemany(
            "INSERT INTO findings (step, content) VALUES (?, ?)", [(step, encoded(f)) for f in findings]
        )

    def _save(self, step: int) -> None:
        if self._memory is not None:
            state = json.dumps(self._memory.state())
            self._db.execute("INSERT OR REPLACE INTO detectors VALUES (0, ?, ?)", (step, state))

    def _failed(self, error: sqlite3.Error, steps: int = 0) -> None:
        """Later steps are tried again: somebody may have made room."""
        self.missed += steps
        if not self._warned:
            self._warned = True
            warn(
                f"isograd cannot record into {self.path} ({error}): training goes on, steps are missing "
                "from the record until the disk takes them again"
            )

    def _look(self) -> None:
        """A file that is deleted still takes what is written, until it is closed: the system says nothing."""
        if not self.recording:
            return
        try:
            self._file.stat()
        except FileNotFoundError:
            self.recording, self._warned = False, True
            warn(
                f"the record in {self.path} was deleted while it was written: training goes on, and no step of it is kept"
            )
        except OSError:  # a disk that does not answer now
            pass

    def _write_info(self, entries: dict[str, Any]) -> None:
        try:
            with database.transaction(self._db):
                self._db.executemany(
                    "INSERT OR REPLACE INTO info VALUES (?, ?)",
                    [(key, json.dumps(value)) for key, value in entries.items()],
                )
        except sqlite3.Error as error:
            self._failed(error)

    def close(self) -> None:
        """Save the detectors' state and give the directory free. A second call does nothing."""
        with self._guard:
            if self._closed:
                return
            if self._writable:
                self._look()
                self._write_info({"ended": time.time()})
                try:
                    with database.transaction(self._db):
                        self._save(self.last)
                except sqlite3.Error as error:
                    self._failed(error)
            self._closed = True
            self._db.close()
            if self._held is not None:
                self._held.close()
