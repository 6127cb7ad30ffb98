"""A run as tables for other tools: one of its steps, one of its parameters at each step."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from isograd.record.run import Run

Table = Iterator[dict[str, Any]]
BATCH = 20_000
"""Rows that are held at a time."""


def steps(run: Run) -> Table:
    """One row a step: step, time, notes, and every scalar that was ever logged."""
    names = {name: None for row in run.rows() for name in row.scalars}
    for row in run.rows():
        fixed = {"step": row.step, "time": row.time, "notes": "; ".join(row.notes)}
        yield fixed | {name: row.scalars.get(name) for name in names}


def sites(run: Run) -> Table:
    """One row a parameter and step: step, site, and every column that was ever measured."""
    names = {name: None for row in run.rows() for name in row.layout.columns}
    for row in run.rows():
        columns = {name: row.column(name) for name in row.layout.columns}
        for i, site in enumerate(row.layout.sites):
            fixed = {"step": row.step, "site": site}
            yield fixed | {name: columns[name][i] if name in columns else None for name in names}


def findings(run: Run) -> Table:
    """One row a finding."""
    for told in run.told():
        kept = ("code", "name", "severity", "message", "cause")
        yield (
            {"step": told.step}
            | {name: told.content[name] for name in kept}
            | {"sites": "; ".join(told.content["sites"])}
        )


TABLES: dict[str, Callable[[Run], Table]] = {"steps": steps, "sites": sites, "findings": findings}


def to_csv(rows: Table, path: Path) -> int:
    """Write a table; an absent value is an empty cell. Returns the number of rows."""
    count = 0
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = None
        for row in rows:
            if writer is None:
                writer = csv.DictWriter(file, row)
                writer.writeheader()
            writer.writerow(row)
            count += 1
    return count


def to_parquet(rows: Table, path: Path) -> int:
    """Write a table, some rows at a time. Returns the number of rows.

    Raises:
        ImportError: pyarrow is not installed.
    """
    import pyarrow  # pyright: ignore[reportMissingTypeStubs]
    import pyarrow.parquet  # pyright: ignore[reportMissingTypeStubs]

    count, writer = 0, None
    for batch in _batches(rows):
        schema = pyarrow.schema([(name, _kind(name)) for name in batch[0]])
        writer = writer or pyarrow.parquet.ParquetWriter(path, schema)
        writer.write_table(pyarrow.Table.from_pylist(batch, schema=schema))
        count += len(batch)
    if writer is None:
        pyarrow.parquet.write_table(pyarrow.table({"step": pyarrow.array([], pyarrow.int64())}), path)
    else:
        writer.close()
    return count


TEXT = ("site", "notes", "code", "name", "severity", "message", "cause", "sites")


def _kind(name: str) -> str:
    if name == "step":
        return "int64"
    return "string" if name in TEXT else "float64"


def _batches(rows: Table) -> Iterator[list[dict[str, Any]]]:
    batch: list[dict[str, Any]] = []
    for row in rows:
        batch.append(row)
        if len(batch) == BATCH:
            yield batch
            batch = []
    if batch:
        yield batch
