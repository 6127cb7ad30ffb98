"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import click

from isograd.cli.errors import TargetError
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


def spare(output: Path | None, *code: str | None) -> None:
    """Refuse to write over the user's own code: `code` are TARGET and what else is FILE:NAME."""
    for text in code:
        place = (text or "").rpartition(":")[0]
        file = Path(place if place.endswith(".py") else f"{place.replace('.', '/')}.py")
        if output is not None and output.resolve() == file.resolve():
            raise click.UsageError(f"-o would write over {output}, which holds {text}: give it another name")


def write(output: Path, text: str) -> None:
    """Write what was asked for with `-o`.

    Raises:
        TargetError: it cannot be written; a full disk is no error of ours.
    """
    try:
        output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise TargetError(f"{output} could not be written: {error.strerror}") from error
