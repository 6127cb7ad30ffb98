"""`[tool.isograd]` in pyproject.toml: what the options of the command line default to."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Literal

import click
import msgspec

Format = Literal["text", "json", "sarif", "github"]


class Config(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """The table's keys; each is the option of the same name."""

    select: list[str] | None = None
    ignore: list[str] = []
    format: Format = "text"
    optimizer: str | None = None
    seed: int = 0


def load(folder: Path) -> Config:
    """From the nearest pyproject.toml in this folder or above it; all defaults where there is none.

    Raises:
        click.UsageError: the table has an unknown key or a value of the wrong type.
    """
    path = next((p for f in (folder, *folder.parents) if (p := f / "pyproject.toml").is_file()), None)
    if path is None:
        return Config()
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8")).get("tool", {}).get("isograd", {})
        return msgspec.convert(table, Config)
    except tomllib.TOMLDecodeError as error:
        raise click.UsageError(f"{path} is not valid TOML: {error}") from None
    except msgspec.ValidationError as error:
        keys = ", ".join(Config.__struct_fields__)
        raise click.UsageError(f"{path}, [tool.isograd]: {error}\nits keys are {keys}") from None
