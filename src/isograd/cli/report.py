"""`isograd report RUN`: the course of a training in text: its loss, its layers, and what was found when."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median

import click

from isograd.cli.options import with_output, write
from isograd.cli.progress import progress
from isograd.cli.runs import number, state
from isograd.record import NotARun, Row, Run
from isograd.record.row import GUARDED

PARTS = 8
"""Columns in which the course of a training is told."""
WIDTH = 32
"""Characters for a name; of a longer one the end is told, which tells a weight from its bias."""
MOST = 40
"""Parameters listed; `isograd export` has them all."""


class RunType(click.ParamType):  # pyright: ignore[reportMissingTypeArgument]  # generic from click 8.4
    """A directory that holds a run."""

    name = "run"

    def convert(self, value: str | Run, param: click.Parameter | None, ctx: click.Context | None) -> Run:
        if isinstance(value, Run):
            return value
        try:
            return Run.open(Path(value))
        except NotARun as error:
            self.fail(str(error), param, ctx)


@click.command()
@click.argument("run", type=RunType())
@with_output
def report(run: Run, output: Path | None) -> None:
    """Tell the course of RUN: loss and gradient from beginning to end, layer by layer, and what was found.

    \b
    isograd report isograd-runs/20260314-091500-train
    isograd check isograd-runs/20260314-091500-train     # the verdict, with its exit status
    """
    with progress(f"reading {run.path}"):
        text = "".join(f"{_plain(line)}\n" for line in lines(run))
    if output is None:
        click.echo(text, nl=False)
    else:
        write(output, text)
        click.echo(f"written to {output}", err=True)


def lines(run: Run) -> Iterator[str]:
    """The report, line by line."""
    so_far = run.progress()
    if so_far.step < 0:
        yield f"{run.path}  {state(so_far)}, no step was recorded"
        return
    rows = list(run.rows())
    parts = _parts(rows)
    first, last = parts[0][0], parts[-1][-1]
    took = f", {_duration(last.time - first.time)}" if last.time > first.time else ""
    yield f"{run.path}  {state(so_far)}, steps {first.step} to {last.step}, {len(run)} kept{took}"
    yield ""
    yield _line("steps", [f"{part[0].step}" for part in parts])
    for name in _scalars(parts):
        yield _line(
            name, [_cell([row.scalars[name] for row in part if name in row.scalars]) for part in parts]
        )
    yield ""
    yield from _sites(parts)
    yield ""
    told = run.told()
    if not told:
        yield "nothing was found while it was recorded; `isograd check` on this run says what was examined"
    for one in told:
        found = one.content
        yield f"step {one.step:<6} {found['code']} {found['name']}  {found['severity'].lower()}"
        yield f"            {found['message']}"
        if found["cause"]:
            yield f"            cause  {found['cause']}"
        if found["sites"]:
            yield f"            where  {', '.join(found['sites'])}"
        yield f"            more   isograd explain {found['code']}"
    yield from (
        f"step {row.step:<6} {note}" for row in rows for note in row.notes if note.startswith(GUARDED)
    )


def _plain(line: str) -> str:
    """Names come from the model: what would steer the terminal is spelled out."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in line)


def _parts(rows: Sequence[Row]) -> list[Sequence[Row]]:
    """The run in up to eight parts of about as many steps each."""
    size = max(1, math.ceil(len(rows) / PARTS))
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def _scalars(parts: Sequence[Sequence[Row]]) -> list[str]:
    named = {name: None for part in parts for row in part for name in row.scalars}
    first = [name for name in ("loss", "grad_norm", "clipped_norm", "lr") if name in named]
    return first + [name for name in named if name not in first]


def _sites(parts: Sequence[Sequence[Row]]) -> Iterator[str]:
    """Gradient norm of each parameter."""
    sites = parts[-1][-1].layout.sites
    yield _line("gradient norm", ["" for _ in parts])
    for site in sites[:MOST]:
        yield _line(f"  {_end(site)}", [_cell(_values(part, "grad_norm", site)) for part in parts])
    if len(sites) > MOST:
        yield f"  … {len(sites) - MOST} more: isograd export"


def _values(part: Sequence[Row], column: str, site: str) -> list[float]:
    return [
        row.column(column)[row.layout.sites.index(site)]
        for row in part
        if column in row.layout.columns and site in row.layout.sites
    ]


def _cell(values: Sequence[float]) -> str:
    """The median of what is finite; where nothing is, what there is instead; nothing where nothing was measured."""
    known = [value for value in values if math.isfinite(value)]
    return number(median(known)) if known else f"{values[-1]}" if values else ""


def _end(site: str) -> str:
    room = WIDTH - 4
    return site if len(site) <= room else f"…{site[1 - room :]}"


def _line(name: str, cells: Sequence[str]) -> str:
    return f"{name[:WIDTH]:<{WIDTH}}" + "".join(f"{cell:>10}" for cell in cells)


def _duration(seconds: float) -> str:
    return (
        time.strftime("%H:%M:%S", time.gmtime(seconds))
        if seconds < 86_400
        else f"{seconds / 86_400:.1f} days"
    )
