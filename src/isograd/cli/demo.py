"""`isograd demo`: a sick network and its diagnosis, in plain words."""

from __future__ import annotations

import click

from isograd.cli.progress import progress

NETWORK = "isograd.demo:network"


@click.command()
def demo() -> None:
    """Diagnose a sick network: twenty sigmoid layers that do not learn."""
    with progress("importing torch"):
        import dataclasses
        import inspect

        from rich.console import Console
        from rich.syntax import Syntax

        import isograd
        from isograd.demo import network

        source = inspect.getsource(network)
        diagnosis = dataclasses.replace(isograd.check(*network()), target=NETWORK)

    console = Console(highlight=False)
    console.print("This network does not learn: its loss stays on a plateau.\n")
    console.print(Syntax(source, "python", background_color="default"), soft_wrap=True)
    console.print("One forward and one backward show why:\n")
    console.print(diagnosis, soft_wrap=True)
    console.print("\nNext, type", style="bold")
    for command, words in (
        (f"isograd check {NETWORK}", "the same from the command line"),
        ("isograd explain vanishing-gradient", "what this finding means"),
        ("isograd check net.py:build", "your own: a function that returns (model, loss)"),
        ("isograd check net.py:Net --input 32,64", "or a bare module and the shape of its input"),
    ):
        console.print(f"  {command:<42}{words}", soft_wrap=True)
