"""`isograd export RUN`: the record as CSV or Parquet."""

from __future__ import annotations

from pathlib import Path

import click

from isograd.cli.errors import TargetError
from isograd.cli.progress import progress
from isograd.cli.report import RunType
from isograd.record import Run


@click.command()
@click.argument("run", type=RunType())
@click.option("--to", "form", type=click.Choice(["parquet", "csv"]), default="csv", help="Default: csv.")
@click.option(
    "-o",
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder of the tables. Default: the folder of the run.",
)
def export(run: Run, form: str, output: Path | None) -> None:
    """Write RUN as three tables: steps, sites (a row for each parameter and step), findings.

    \b
    isograd export isograd-runs/20260314-091500-train --to parquet -o tables/
    """
    from isograd.record.export import TABLES, to_csv, to_parquet

    folder = output or run.path
    write = to_csv if form == "csv" else to_parquet
    with progress(f"exporting {run.path}") as say:
        for name, table in TABLES.items():
            path = folder / f"{name}.{form}"
            say(f"writing {path}")
            try:
                folder.mkdir(parents=True, exist_ok=True)
                count = write(table(run), path)
            except OSError as error:
                raise TargetError(f"{path} could not be written: {error.strerror}") from None
            except ImportError as error:
                raise TargetError(
                    "Parquet is written by pyarrow, which is not installed",
                    why=str(error),
                    type_="pip install 'isograd[data]', or --to csv, which needs nothing",
                ) from None
            click.echo(f"{path}  {count} rows", err=True)
