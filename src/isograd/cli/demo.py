"""`isograd demo`: a sick network, its diagnosis, the repair and the proof, in plain words."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from isograd.cli.progress import progress

if TYPE_CHECKING:
    from torch import nn

NETWORK = "isograd.demo:network"


@click.command()
def demo() -> None:
    """Diagnose a network that does not learn, repair it, and prove the repair.

    Twenty sigmoid layers on data made on the spot. The proof trains the network thirty times, for which it
    takes a minute on two cores.
    """

    def build(seed: int) -> nn.Module:
        return network(seed)[0]

    def count(done: int, trainings: int) -> None:
        say(f"training: {done} of {trainings} done")

    with progress("importing torch") as say:
        import dataclasses
        import inspect

        from rich.console import Console
        from rich.syntax import Syntax

        import isograd
        from isograd.demo import network, train
        from isograd.repair import repair

        console = Console(highlight=False)
        model, loss = network()
        say("one forward and one backward")
        diagnosis = dataclasses.replace(isograd.check(model, loss), target=NETWORK)

    console.print("This network does not learn: its loss stays on a plateau.\n")
    console.print(Syntax(inspect.getsource(network), "python", background_color="default"), soft_wrap=True)
    console.print("One forward and one backward show why:\n")
    console.print(diagnosis, soft_wrap=True)

    with progress("looking for the least change that lets the gradient through") as say:
        found = repair(model, loss, progress=say)
    console.print("\nThe least change that lets the gradient through, found by measuring candidates:\n")
    console.print(found, soft_wrap=True)

    if found.prescription is not None:
        console.print(
            "\nDoes it learn now? Trained with and without, from five seeds, beside two controls:\n"
        )
        with progress("training") as say:
            proof = isograd.prove(
                build,
                found.prescription,
                train,
                loss=loss,
                progress=count,
            )
        console.print(proof, soft_wrap=True)

    console.print("\nNext, type", style="bold")
    for command, words in (
        (f"isograd check {NETWORK}", "the diagnosis from the command line"),
        (f"isograd repair {NETWORK} -o patch.py", "the repair, as Python for your own script"),
        ("isograd explain vanishing-gradient", "what this finding means"),
        ("isograd check net.py:build", "your own: a function that returns (model, loss)"),
        ("isograd check net.py:Net --input 32,64", "or a bare module and the shape of its input"),
    ):
        console.print(f"  {command:<48}{words}", soft_wrap=True)
