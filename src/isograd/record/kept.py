"""What a record holds: its steps, what was found in them, and how far it has come."""

from __future__ import annotations

import json
import math
import sqlite3
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from isograd.record import database
from isograd.record.database import NotARun
from isograd.record.row import Layout, Row, Told

if TYPE_CHECKING:
    from isograd.diagnosis import Finding
    from isograd.monitor.reading import Reading

CHUNK = 256
"""Rows that are read at a time."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run has come."""

    step: int
    """The last step recorded; -1: none yet."""
    time: float
    """When it ended, in seconds since the epoch; nan: none yet."""
    loss: float
    """nan: not logged, or not a number."""
    grad_norm: float
    findings: int
    writing: bool
    """A process is recording it now."""
    ended: bool
    """It was closed; neither writing nor ended: it was cut off."""


class Kept:
    """A record as it is read, also while it is written."""

    def __init__(self, path: Path, db: sqlite3.Connection) -> None:
        self.path, self._db = path, db
        self._guard = threading.RLock()
        self._read: dict[int, Layout] = {}
        self._writable = False

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def last(self) -> int:
        """The last step that is recorded; -1: none."""
        row = self._one("SELECT max(step) FROM steps")
        return -1 if row is None or row[0] is None else row[0]

    def __len__(self) -> int:
        """Number of steps that are kept."""
        row = self._one("SELECT count(*) FROM steps")
        return 0 if row is None else row[0]

    @property
    def info(self) -> dict[str, Any]:
        """started, resumed, ended (seconds since the epoch, None: not yet), pid, command."""
        return {key: json.loads(value) for key, value in self._all("SELECT key, value FROM info")}

    def rows(self, start: int = 0, stop: int | None = None) -> Iterator[Row]:
        """The steps from `start` up to but without `stop`, in order, as plain data."""
        end = 2**62 if stop is None else stop
        while True:
            found = self._all(
                "SELECT step, time, layout, scalars, notes, content FROM steps "
                "WHERE step >= ? AND step < ? ORDER BY step LIMIT ?",
                (start, end, CHUNK),
            )
            for step, when, layout, scalars, notes, values in found:
                yield Row(
                    step, when, self._layout(layout), json.loads(scalars), tuple(json.loads(notes)), values
                )
            if len(found) < CHUNK:
                return
            start = found[-1][0] + 1

    def readings(self, start: int = 0, stop: int | None = None) -> Iterator[Reading]:
        """The same with tensors."""
        for row in self.rows(start, stop):
            yield row.reading()

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """Steps and values of a scalar: loss, grad_norm, lr, whatever was logged."""
        found = [
            (step, json.loads(scalars))
            for step, scalars in self._all("SELECT step, scalars FROM steps ORDER BY step")
        ]
        kept = [(step, scalars[name]) for step, scalars in found if name in scalars]
        return [step for step, _ in kept], [value for _, value in kept]

    def told(self, after: int = 0) -> list[Told]:
        """What was found, in the order in which it was told; `after` the one with this `id`."""
        query = "SELECT id, step, content FROM findings WHERE id > ? ORDER BY id"
        return [Told(number, step, json.loads(text)) for number, step, text in self._all(query, (after,))]

    @property
    def findings(self) -> tuple[tuple[int, Finding], ...]:
        """Step and finding, in the order in which they were told."""
        return tuple((told.step, told.finding()) for told in self.told())

    def progress(self) -> Progress:
        """How far it has come; cheap enough to be asked once a second."""
        row = self._one("SELECT step, time, scalars FROM steps ORDER BY step DESC LIMIT 1")
        step, when, text = (-1, math.nan, "{}") if row is None else row
        scalars = json.loads(text)
        count = self._one("SELECT count(*) FROM findings")
        ended = self._one("SELECT value FROM info WHERE key = 'ended'")
        return Progress(
            step,
            when,
            scalars.get("loss", math.nan),
            scalars.get("grad_norm", math.nan),
            0 if count is None else count[0],
            self._writable or database.written_now(self.path),
            ended is not None and json.loads(ended[0]) is not None,
        )

    def _layout(self, number: int) -> Layout:
        if number not in self._read:
            row = self._one("SELECT content FROM layouts WHERE id = ?", (number,))
            assert row is not None
            self._read[number] = Layout.decoded(row[0])
        return self._read[number]

    def _all(self, query: str, values: tuple[Any, ...] = ()) -> list[Any]:
        with self._guard:
            try:
                return self._db.execute(query, values).fetchall()
            except sqlite3.DatabaseError as error:
                raise NotARun(f"the record in {self.path} is damaged: {error}") from error

    def _one(self, query: str, values: tuple[Any, ...] = ()) -> Any:
        return next(iter(self._all(query, values)), None)
