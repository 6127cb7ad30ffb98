"""What is going on, said on stderr once it takes longer than a user would wait without wondering."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

PATIENCE = 2.0
"""Seconds of silence; shorter work leaves no trace in the terminal."""


@contextmanager
def progress(words: str) -> Iterator[Callable[[str], None]]:
    """Show `words` beside a spinner; call what this yields to change them. Nothing if stderr is a file."""
    from rich.console import Console

    console = Console(stderr=True)
    status = console.status(words)
    timer = threading.Timer(PATIENCE, status.start)
    timer.daemon = True
    if console.is_terminal:
        timer.start()
    try:
        yield lambda words: status.update(words)
    finally:
        timer.cancel()
        if timer.ident is not None:
            timer.join()
        status.stop()
