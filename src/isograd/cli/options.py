"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

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


class OutputFile(click.Path):
    """A file to write to. A folder that is missing is said before anything is measured, not after."""

    def __init__(self) -> None:
        super().__init__(dir_okay=False, writable=True, path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        path = Path(cast(str, super().convert(value, param, ctx)))
        if not path.parent.is_dir():
            self.fail(f"there is no folder {path.parent} to write {path.name} to", param, ctx)
        return path


with_output = click.option(
    "-o",
    "--output",
    type=OutputFile(),
    help="Write the report to this file.",
)
