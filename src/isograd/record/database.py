"""The tables on disk, who may write them, and how they are kept small.

One SQLite file in WAL mode: readers see whole steps while the next is written, and a process that is killed at
any moment leaves every committed step as it was. Nothing is pickled; `sqlite3 run.sqlite` reads it too.
"""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path

FILE = "run.sqlite"
LOCK = "writer.lock"
FORMAT = 1
"""`PRAGMA user_version`: raised when an older isograd could no longer read what is written."""
WAIT = 5.0
"""Seconds to wait for another process's short transaction."""

TABLES = (
    "CREATE TABLE IF NOT EXISTS info (key TEXT PRIMARY KEY, value TEXT NOT NULL)",
    "CREATE TABLE IF NOT EXISTS layouts (id INTEGER PRIMARY KEY, content TEXT NOT NULL UNIQUE)",
    "CREATE TABLE IF NOT EXISTS steps (step INTEGER PRIMARY KEY, time REAL NOT NULL, layout INTEGER NOT NULL "
    "REFERENCES layouts, scalars TEXT NOT NULL, notes TEXT NOT NULL, content BLOB NOT NULL)",
    "CREATE TABLE IF NOT EXISTS findings (id INTEGER PRIMARY KEY, step INTEGER NOT NULL, content TEXT NOT NULL)",
    "CREATE TABLE IF NOT EXISTS detectors (id INTEGER PRIMARY KEY CHECK (id = 0), step INTEGER NOT NULL, "
    "state TEXT NOT NULL)",
)

THIN = """
DELETE FROM steps WHERE step IN (
    SELECT step FROM (SELECT step, row_number() OVER (ORDER BY step) AS n, count(*) OVER () AS total FROM steps)
    WHERE n <= total / 2 AND n % 2 = 0
) AND step NOT IN (SELECT step FROM findings)
"""
"""Every second step of the older half, but none on which something was found."""

OTHER = "{} is a database, but no record of a run"


class NotARun(ValueError):
    """A path that holds no record, or one of a newer format."""


def connect(directory: Path) -> sqlite3.Connection:
    """The database of a run for reading and writing, made if it is not there.

    Raises:
        sqlite3.Error, OSError: the disk does not let us.
        NotARun: the record was written in a newer format, or the database is somebody else's.
    """
    db = sqlite3.connect(directory / FILE, timeout=WAIT, isolation_level=None, check_same_thread=False)
    try:
        (tables,) = db.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if tables and db.execute("PRAGMA user_version").fetchone() == (0,):
            raise NotARun(OTHER.format(directory / FILE))
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = NORMAL")  # a power cut may cost the last steps, never the file
        db.execute("PRAGMA journal_size_limit = 16777216")
        prepare(db, directory)
    except BaseException:
        db.close()
        raise
    return db


def in_memory() -> sqlite3.Connection:
    """What a run is kept in where no disk will take it."""
    db = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
    prepare(db, Path(":memory:"))
    return db


def prepare(db: sqlite3.Connection, directory: Path) -> None:
    """Make the tables."""
    _readable(db, directory)
    with transaction(db):
        for table in TABLES:
            db.execute(table)
        db.execute(f"PRAGMA user_version = {FORMAT}")


def connect_to_read(directory: Path) -> sqlite3.Connection:
    """The database of a run that somebody else may be writing.

    Raises:
        NotARun: nothing is recorded there, something else is, or in a newer format.
    """
    file = directory / FILE
    if not file.is_file():
        raise NotARun(
            f"no run is recorded in {directory}: it holds no {FILE}; `isograd runs` lists those there are"
        )
    db = None
    try:
        db = sqlite3.connect(
            f"{file.absolute().as_uri()}?mode=ro",
            uri=True,
            timeout=WAIT,
            isolation_level=None,
            check_same_thread=False,
        )
        _readable(db, directory)
        if db.execute("PRAGMA user_version").fetchone() == (0,):
            raise NotARun(OTHER.format(file))
    except (sqlite3.Error, NotARun) as error:
        if db is not None:
            db.close()
        if isinstance(error, NotARun):
            raise
        raise NotARun(f"the record in {directory} cannot be read: {error}") from error
    return db


def _readable(db: sqlite3.Connection, directory: Path) -> None:
    (found,) = db.execute("PRAGMA user_version").fetchone()
    if found > FORMAT:
        raise NotARun(
            f"the record in {directory} has format {found}, this isograd reads up to {FORMAT}: upgrade it"
        )


@contextlib.contextmanager
def transaction(db: sqlite3.Connection):
    """All or nothing; whatever interrupts it rolls it back."""
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:  # SQLite itself has rolled back where the disk is full
            db.execute("ROLLBACK")
        raise


def lock(directory: Path) -> sqlite3.Connection | None:
    """The right to write a run, held until it is closed or the process ends in any way; None: another has it.

    It is an open transaction on an empty database beside the record: SQLite knows how to lock a file on every
    system, and between two parts of one process too.
    """
    held = sqlite3.connect(directory / LOCK, timeout=0.2, isolation_level=None, check_same_thread=False)
    try:
        held.execute("BEGIN EXCLUSIVE")
    except sqlite3.OperationalError as error:
        held.close()
        if error.sqlite_errorcode == sqlite3.SQLITE_BUSY:
            return None
        raise
    return held


def written_now(directory: Path) -> bool:
    """Does a process hold the right to write this run?"""
    if not (directory / LOCK).is_file():
        return False
    try:
        held = lock(directory)
    except sqlite3.Error:  # a disk that lets nobody write
        return False
    if held is not None:
        held.close()
    return held is None


def size(db: sqlite3.Connection) -> int:
    """Bytes in use; pages that were freed are used again and do not count."""
    pages, free, page = (
        db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "freelist_count", "page_size")
    )
    return (pages - free) * page


def thin(db: sqlite3.Connection) -> int:
    """Drop every second step of the older half, as `THIN` says; returns how many went."""
    with transaction(db):
        return db.execute(THIN).rowcount
