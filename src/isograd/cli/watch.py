"""`isograd watch -- python train.py`: record an unchanged script's training, and say what went wrong."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import sys
import time
from datetime import datetime
from pathlib import Path

import click

from isograd.cli.errors import TargetError
from isograd.cli.killed import tell_if_killed
from isograd.record import NotARun, database

SITE = Path(__file__).parents[1] / "integrations" / "site"
RUNS = "isograd-runs"


@click.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.option(
    "--run",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help=f"Where the record goes. Default: {RUNS}/DATE-SCRIPT.",
)
@click.option(
    "--every", type=click.IntRange(1), default=1, metavar="N", help="Read each Nth step. Default: 1."
)
@click.option(
    "--deep-every",
    type=click.IntRange(1),
    metavar="N",
    help="Measure activations and the flow along the depth on each Nth step. Default: never.",
)
@click.option(
    "--replay",
    is_flag=True,
    help="Repeat a step whose gradient is not finite on the side, and name the operation with its line.",
)
@click.option(
    "--budget",
    type=click.FloatRange(0, 1, min_open=True),
    default=0.01,
    metavar="SHARE",
    help="Share of a step that watching may take. Default: 0.01.",
)
@click.option("--quiet", is_flag=True, help="No live line and no findings at the end, only the record.")
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
def watch(
    run: Path | None,
    every: int,
    deep_every: int | None,
    replay: bool,
    budget: float,
    quiet: bool,
    command: tuple[str, ...],
) -> None:
    """Watch a training script as it is: no line of it changes.

    The optimizers are found as the script uses them, each step is recorded, and the findings are printed on
    standard error when the script ends. The script takes the place of this command: its exit status, output,
    signals and Ctrl-C are its own.

    \b
    isograd watch -- python train.py --lr 3e-4
    isograd watch --run runs/a -- torchrun --nproc-per-node 2 train.py
    isograd watch -- -m package.train
    """
    if not command:
        raise TargetError(
            "there is nothing to watch",
            why="the command that starts the training is missing",
            type_="isograd watch -- python train.py",
        )
    if command[0].startswith("-") and command[0] != "-m":
        raise TargetError(
            f"isograd watch has no option {command[0]}",
            why="its own options are in `isograd watch --help`; those of the script follow the script",
            type_="isograd watch -- python train.py --lr 3e-4",
        )
    words = _python(command)
    program = shutil.which(words[0])
    if program is None:
        raise TargetError(
            f"there is no program {words[0]!r}",
            why="what follows `--` is started as you would type it in a shell",
            type_=f"isograd watch -- python {' '.join(command)}",
        )
    run = run or _default(words)
    where = run.absolute()
    _writable(where)
    settings = {
        "run": str(where),
        "every": every,
        "deep_every": deep_every,
        "replay": replay,
        "budget": budget,
        "quiet": quiet,
    }
    since = time.time()
    settings |= {"pid": os.getpid(), "since": since}
    path = os.pathsep.join(filter(None, (str(SITE), os.environ.get("PYTHONPATH"))))
    os.environ |= {"PYTHONPATH": path, "ISOGRAD_WATCH": json.dumps(settings)}
    if not quiet:
        click.echo(f"isograd: watching {' '.join(command)}; the record goes to {run}", err=True)
    sys.stdout.flush()
    sys.stderr.flush()
    if not quiet:
        tell_if_killed(where, since)
    try:
        # The script becomes this very process, so that nothing of it has to be passed through.
        os.execv(program, list(words))
    except OSError as error:
        raise TargetError(f"{words[0]} cannot be started: {error.strerror}") from None


def _writable(where: Path) -> None:
    """Hours later is too late to say it."""
    there = next(folder for folder in (where, *where.parents) if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        why = "may not be written" if there.is_dir() else "is a file"
        raise TargetError(
            f"no record can be written to {where}",
            why=f"{there} {why}",
            type_="isograd watch --run SOMEWHERE -- …, or from a folder that can be written",
        )
    if (where / database.FILE).is_file():
        try:
            database.connect(where).close()
        except (NotARun, sqlite3.Error) as error:
            raise TargetError(
                f"no record can be continued in {where}",
                why=str(error),
                type_="isograd watch --run ANOTHER -- …",
            ) from None


def _python(command: tuple[str, ...]) -> tuple[str, ...]:
    """A script or `-m module` alone is run by the Python that runs us."""
    if command[0] == "-m" or (command[0].endswith(".py") and not os.access(command[0], os.X_OK)):
        return (sys.executable, *command)
    return command


def _default(words: tuple[str, ...]) -> Path:
    """isograd-runs/2026-01-31-142501-train, never one that exists."""
    script = next((Path(w).stem for w in words if w.endswith(".py")), None)
    if script is None and "-m" in words[:-1]:
        script = words[words.index("-m") + 1]
    stem = f"{datetime.now():%Y-%m-%d-%H%M%S}-{script or Path(words[0]).stem}"
    names = (stem, *(f"{stem}-{n}" for n in range(2, 1000)))
    return next(p for name in names if not (p := Path(RUNS, name)).exists())
