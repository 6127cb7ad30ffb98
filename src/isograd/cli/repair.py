"""`isograd repair TARGET`: the least invasive change that makes the flow healthy, as a diff and as Python."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from isograd.cli.errors import TargetError
from isograd.cli.inputs import InputSpec, InputType
from isograd.cli.progress import progress

if TYPE_CHECKING:
    from isograd.repair import Repair

NOT_CURED = 1
INTERRUPTED = 130


@click.command()
@click.argument("target")
@click.option(
    "--input",
    "inputs",
    type=InputType(),
    multiple=True,
    metavar="SPEC",
    help="Data for a bare module: 32,64 or ids=2,128:int64:500 (shape, dtype, upper bound). Repeatable.",
)
@click.option(
    "--unsafe/--safe",
    default=True,
    show_default=True,
    help="--safe: only edits that keep the function that the model computes.",
)
@click.option(
    "--train",
    "steps",
    type=click.IntRange(min=1),
    metavar="STEPS",
    help="Judge by so many steps of Adam on the target's loss too; a healthy flow is then repaired if that helps.",
)
@click.option(
    "--lr", type=float, default=1e-3, show_default=True, help="Learning rate of the training by --train."
)
@click.option(
    "--budget",
    type=click.FloatRange(min=0, min_open=True),
    metavar="SECONDS",
    help="Begin no further candidate after this time; the best so far is kept.",
)
@click.option("--format", "form", type=click.Choice(["text", "json"]), default="text", show_default=True)
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    help="Write Python that makes the edits: from patch import repair; model = repair(model).",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the random data and weights.")
@click.pass_context
def repair(
    ctx: click.Context,
    target: str,
    inputs: tuple[InputSpec, ...],
    unsafe: bool,
    steps: int | None,
    lr: float,
    budget: float | None,
    form: Literal["text", "json"],
    output: Path | None,
    seed: int,
) -> None:
    """Find the least invasive change that makes the gradient flow of TARGET healthy.

    Prints the change as a diff, its expected and measured effect, and why less was not enough. Nothing of the
    user's is changed. TARGET is as for `isograd check`. Exit status: 0 healthy or cured, 1 not cured.

    \b
    isograd repair net.py:build
    isograd repair net.py:build -o patch.py
    isograd repair net.py:Net --input 32,64 --budget 60 --train 50
    """
    found = _repair(target, inputs, unsafe, steps, lr, budget, seed)
    click.echo(found.to_json() if form == "json" else f"{found}\n", nl=False)
    if output is not None:
        if found.prescription is None:
            click.echo(f"nothing to write to {output}: {found.note}", err=True)
        else:
            output.write_text(found.to_code(), encoding="utf-8")
            use = f"from {output.stem} import repair; model = repair(model)"
            click.echo(f"written to {output}; before the optimizer is made: {use}", err=True)
    if found.note.startswith("interrupted"):
        ctx.exit(INTERRUPTED)
    ctx.exit(0 if found.cured else NOT_CURED)


def _repair(
    text: str,
    inputs: tuple[InputSpec, ...],
    unsafe: bool,
    steps: int | None,
    lr: float,
    budget: float | None,
    seed: int,
) -> Repair:
    with progress("importing torch") as say:
        import torch

        import isograd
        from isograd.cli.target import load
        from isograd.repair import short_training

        say(f"importing {text}")
        torch.manual_seed(seed)
        target = load(text, inputs, seed=seed)
        say(f"measuring {text}")
        train = None if steps is None else short_training(target.loss, steps=steps, lr=lr)
        try:
            found = isograd.repair(
                target.model, target.loss, budget=budget, unsafe=unsafe, train=train, progress=say
            )
        except (TypeError, ValueError) as error:  # what cannot be measured, in the user's words
            raise TargetError(f"{text}: {error}") from error
    return dataclasses.replace(found, target=text)
