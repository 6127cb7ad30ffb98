"""Where runs lie when nobody says where, what they are called, and how they are found again."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from isograd.record import database

FOLDER = "isograd-runs"
DEPTH = 4
"""Folders from where one looks down to a run: project, experiment, date, seed."""


def home() -> Path:
    """Where runs without a path of their own go: $ISOGRAD_RUNS, else `isograd-runs` in the current folder."""
    return Path(os.environ.get("ISOGRAD_RUNS", FOLDER))


def runs(root: str | Path | None = None) -> list[Path]:
    """Directories that hold a run, oldest first: `root` itself and those up to DEPTH below it.

    Links are not followed, folders whose name begins with a dot are passed over, and so is what cannot be read.
    """
    root = home() if root is None else Path(root)
    found: list[Path] = []
    below = [root]
    for _ in range(DEPTH + 1):
        found += [
            path for path in below if os.path.isfile(path / database.FILE)
        ]  # Path.is_file raises if not allowed
        below = [inner for path in below for inner in _folders(path)]
    return sorted(found, key=lambda path: (path / database.FILE).stat().st_mtime)


def _folders(path: Path) -> list[Path]:
    try:
        with os.scandir(path) as entries:
            return [
                path / entry.name
                for entry in entries
                if entry.is_dir(follow_symlinks=False) and not entry.name.startswith(".")
            ]
    except OSError:
        return []


def name() -> str:
    """`20260314-091500-train`: the time, and the script."""
    script = Path(sys.argv[0]).stem if sys.argv else ""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    return f"{stamp}-{script}" if script.isidentifier() else stamp
