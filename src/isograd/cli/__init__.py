"""The `isograd` command. No file here imports torch at its top: help must not wait for it."""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import NoReturn

import click

import isograd
from isograd.cli.check import check
from isograd.cli.demo import demo
from isograd.cli.explain import explain
from isograd.cli.export import export
from isograd.cli.horizon import horizon
from isograd.cli.repair import repair
from isograd.cli.report import report
from isograd.cli.runs import runs
from isograd.cli.spectrum import spectrum
from isograd.cli.watch import watch
from isograd.record import NotARun

USAGE_ERROR = 2
INTERRUPTED = 130


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(isograd.__version__, prog_name="isograd")
def cli() -> None:
    """Find out why gradients vanish or explode in a PyTorch model, repair it, and prove the repair.

    \b
    isograd demo                              a sick network, its diagnosis, its repair, the proof
    isograd check net.py:build                your own model, with its own loss
    isograd check net.py:Net --input 32,64    a bare module, with random data
    isograd repair net.py:build -o patch.py   the least change that cures it
    isograd watch -- python train.py          a training, as it is

    Exit status: 0 healthy, 1 an error was found in the model, 2 the command could not be carried out.
    """


for command in (check, repair, explain, demo, spectrum, horizon, watch, runs, report, export):
    cli.add_command(command)


def main(args: Sequence[str] | None = None) -> NoReturn:
    """Run the command and exit with its status; the entry point."""
    # torch warns of an absent NumPy, which neither it nor we need here
    warnings.filterwarnings("ignore", message="Failed to initialize NumPy")
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a terminal that cannot show `→` shows `?`  # pyright: ignore
    try:
        status = cli.main(args, prog_name="isograd", standalone_mode=False) or 0
    except click.ClickException as error:
        error.show()
        status = error.exit_code
    except NotARun as error:  # found out while it was read
        click.echo(f"isograd: {error}", err=True)
        status = USAGE_ERROR
    except (click.Abort, KeyboardInterrupt):
        click.echo("isograd: interrupted", err=True)
        status = INTERRUPTED
    except BrokenPipeError:  # `isograd explain | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 0
    except Exception:
        traceback.print_exc()
        click.echo("isograd: this is a bug in isograd, not in your model: please report it", err=True)
        status = USAGE_ERROR
    sys.exit(status)
