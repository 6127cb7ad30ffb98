"""A warning that stays one, at a line of the user's."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import warnings
from contextvars import ContextVar

Line = tuple[str, int]
"""File and number."""

OURS = (os.path.dirname(__file__) + os.sep, threading.__file__, contextlib.__file__, "<frozen ")

here: ContextVar[Line | None] = ContextVar("here", default=None)
"""The line that a thread of ours works for: nothing of the user's is on its stack."""


def warn(words: str) -> None:
    """Warn at the user's line, and never raise: under `python -W error` a warning would end the training that it is
    about, or the thread that waits for nobody. It is said on standard error then.

    Args:
        words: what is wrong, and what follows from it.
    """
    file, number = users_line() or here.get() or ("isograd", 0)
    try:
        warnings.warn_explicit(words, UserWarning, file, number)
    except UserWarning:
        print(words, file=sys.stderr, flush=True)


def users_line() -> Line | None:
    """The line outside of isograd and torch that led here; None where there is none on the stack."""
    torch = sys.modules.get("torch")
    theirs = () if torch is None else tuple(folder + os.sep for folder in torch.__path__)
    frame = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith(OURS + theirs):
        frame = frame.f_back
    return None if frame is None else (frame.f_code.co_filename, frame.f_lineno)
