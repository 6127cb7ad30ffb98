"""`isograd runs`: which trainings were recorded, how far they came, and what was found."""

from __future__ import annotations

import time
from pathlib import Path

import click

from isograd.record import NotARun, Progress, Run, home
from isograd.record import runs as recorded


@click.command()
@click.argument("root", required=False, type=click.Path(exists=True, file_okay=False, path_type=Path))
def runs(root: Path | None) -> None:
    """List the runs up to four folders below ROOT, oldest first. Default: isograd-runs, or $ISOGRAD_RUNS.

    Links are not followed, and hidden folders are passed over.

    \b
    isograd runs
    isograd runs experiments/
    """
    paths = recorded(root)
    if not paths:
        click.echo(
            f"no run is recorded in {root or home()}\n"
            "  try  isograd watch -- python train.py, or isograd.watch(model, optimizer, run=…) in your script",
            err=True,
        )
        return
    rows = [("run", "state", "last step", "loss", "gradient", "findings", "when")]
    rows += [_row(path) for path in paths]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        click.echo("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())


def _row(path: Path) -> tuple[str, ...]:
    try:
        with Run.open(path) as run:
            progress = run.progress()
    except NotARun as error:
        return (str(path), f"unreadable: {error}", "", "", "", "", "")
    if progress.step < 0:
        return (str(path), state(progress), "none", "", "", "", "")
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime(progress.time)) if progress.time else ""
    numbers = (f"{progress.step}", number(progress.loss), number(progress.grad_norm), f"{progress.findings}")
    return (str(path), state(progress), *numbers, when)


def state(progress: Progress) -> str:
    """What became of the run."""
    if progress.writing:
        return "running"
    return "ended" if progress.ended else "cut off"


def number(value: float) -> str:
    """Three digits; nothing where nothing was logged."""
    return "" if value != value else f"{value:.3g}"
