"""What a killed training could not say any more: told from its record, once its process has ended."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from isograd.record import NotARun, Run
from isograd.record.run import begun, beside

WAIT = 5.0
"""Seconds for the processes of a run to end after the first one: torchrun is killed before what it has started."""


def tell_if_killed(run: Path, since: float) -> None:
    """Leave a process beside this one, which waits for it to end and then tells what was found in the records
    that were begun since then, in seconds since the epoch, and that nobody has closed.

    A process that is ended by SIGTERM or SIGKILL, as by a cluster or for want of memory, runs no Python any
    more. A handler in the script would change what the script and its trainer see of their signals, so
    somebody else has to speak. It is no child of the script and holds nothing open but standard error.
    Without a way to wait for another process (other systems than Linux) it is not there.
    """
    try:
        process = os.pidfd_open(os.getpid())
    except (AttributeError, OSError):
        return
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        os.close(process)
        return
    with contextlib.suppress(BaseException):
        if not os.fork():
            _alone(process)
            select.select([process], [], [])
            with contextlib.suppress(OSError):  # nobody may listen any more
                _tell(run, since)
    os._exit(0)


def _alone(process: int) -> None:
    """Outlive the signals that are sent to all, and keep no file of the script open."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    os.dup2(nothing, 1)
    os.closerange(3, process)
    os.closerange(process + 1, os.sysconf("SC_OPEN_MAX"))


def _tell(run: Path, since: float) -> None:
    for path in _cut_off(run, since):
        from isograd.record.verdict import verdict  # it needs torch, and most scripts end by themselves

        with Run.open(path) as record:
            print(verdict(record), file=sys.stderr)
            print(
                f"isograd: {record.last + 1} steps recorded of a process that was killed: isograd report {path}",
                file=sys.stderr,
                flush=True,
            )


def _cut_off(run: Path, since: float) -> Iterator[Path]:
    """Records with steps that were begun since then, and whose process has ended without closing them."""
    patience = time.monotonic() + WAIT
    for path in beside(run):
        try:
            with Run.open(path) as record:
                while (so_far := record.progress()).writing and time.monotonic() < patience:
                    time.sleep(0.1)
        except NotARun:
            return
        if so_far.step >= 0 and begun(path) >= since and not (so_far.writing or so_far.ended):
            yield path
