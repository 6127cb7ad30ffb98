"""Errors that the user can do something about: what, why, and what to type."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import IO, Any

import click

OWN_FOLDER = str(Path(__file__).parents[1])


class TargetError(click.ClickException):
    """The target cannot be examined. Prints the three parts, each on its own lines; exits with 2."""

    exit_code = 2

    def __init__(
        self, what: str, *, why: str = "", type_: str = "", cause: BaseException | None = None
    ) -> None:
        super().__init__(what)
        self.why, self.type, self.cause = why, type_, cause

    def show(self, file: IO[Any] | None = None) -> None:
        click.echo(self.format_message(), file=file, err=True)

    def format_message(self) -> str:
        parts = [f"isograd: {self.message}"]
        if self.cause is not None:
            parts.append(_indented(users_traceback(self.cause), "  "))
        if self.why:
            parts.append(f"  why  {_indented(self.why, '       ').lstrip()}")
        if self.type:
            parts.append(f"  try  {_indented(self.type, '       ').lstrip()}")
        return "\n".join(parts)


FROM_DATA = (RuntimeError, TypeError, ValueError, IndexError)
"""What torch raises when data does not fit: for these it makes sense to offer other data."""


@contextmanager
def users_code(what: str, *, why: str = "", type_: str = "") -> Iterator[None]:
    """Run code of the user's: what it raises becomes a `TargetError`, what it prints goes to stderr.

    `type_` is offered where the data may be to blame. Standard output belongs to the report: a `print` in
    a forward must not end up inside the JSON.
    """
    try:
        with redirect_stdout(sys.stderr):
            yield
    except click.ClickException:
        raise
    except SystemExit as error:
        why = "it called sys.exit: put what should only run as a script below `if __name__ == '__main__':`"
        raise TargetError(what, why=why, cause=error) from None
    except Exception as error:
        type_ = type_ if isinstance(error, FROM_DATA) else ""
        raise TargetError(what, why=why, type_=type_, cause=error) from None


def users_traceback(error: BaseException) -> str:
    """The traceback as Python prints it, with the frames of the user's own code only."""
    torch = sys.modules.get("torch")
    folders = [OWN_FOLDER, *(torch.__path__ if torch is not None else ())]
    not_theirs = ("<frozen ", *(folder + os.sep for folder in folders))
    shown = traceback.TracebackException.from_exception(error)
    for part in _chain(shown):
        theirs = [frame for frame in part.stack if not frame.filename.startswith(not_theirs)]
        part.stack = traceback.StackSummary.from_list(theirs)
    lines = shown.format() if any(part.stack for part in _chain(shown)) else shown.format_exception_only()
    return "".join(lines).rstrip()


def _chain(error: traceback.TracebackException | None) -> Iterator[traceback.TracebackException]:
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _indented(text: str, by: str) -> str:
    return "\n".join(by + line if line else line for line in text.splitlines())
