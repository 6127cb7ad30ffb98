"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path

import click

from isograd.cli.inputs import InputType

with_inputs = click.option(
    "--input",
    "inputs",
    type=InputType(),
    multiple=True,
    metavar="SPEC",
    help="Data for a bare module: 32,64 or ids=2,128:int64:500 (shape, dtype, upper bound). Repeatable.",
)
with_output = click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    help="Write the report to this file.",
)
