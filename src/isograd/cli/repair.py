"""`isograd repair TARGET`: the least invasive change that makes the flow healthy, as a diff and as Python."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from isograd.cli.errors import TargetError
from isograd.cli.inputs import InputSpec
from isograd.cli.options import OutputFile, spare, with_inputs, write
from isograd.cli.progress import progress

if TYPE_CHECKING:
    from isograd.cli.target import Target
    from isograd.graph.traced import Loss
    from isograd.prescription import Prescription
    from isograd.proof import Proof
    from isograd.repair import Repair

NOT_CURED = 1
INTERRUPTED = 130


@click.command()
@click.argument("target")
@with_inputs
@click.option(
    "--unsafe/--safe",
    default=True,
    show_default=True,
    help="--safe: only edits that keep the function that the model computes.",
)
@click.option(
    "--train",
    metavar="FILE:NAME",
    help="train(model, seed) -> score, higher is better: judges the repair, and a healthy flow is repaired if it helps.",
)
@click.option(
    "--steps",
    type=click.IntRange(min=1),
    help="Judge by so many steps of Adam on the target's own batch instead.",
)
@click.option(
    "--trainings",
    type=click.IntRange(min=1),
    help="Changed models that --train or --steps may train in the search. Default: 8.",
)
@click.option(
    "--prove", is_flag=True, help="Train with and without the repair, beside controls, from several seeds."
)
@click.option("--seeds", type=click.IntRange(min=3), default=5, show_default=True, help="Of the proof.")
@click.option(
    "--store",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Keep each training of the proof as it ends; the same command then goes on where it stopped.",
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
    type=OutputFile(),
    help="Write Python that makes the edits: from patch import repair; model = repair(model).",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the random data and weights.")
@click.pass_context
def repair(
    ctx: click.Context,
    target: str,
    inputs: tuple[InputSpec, ...],
    unsafe: bool,
    train: str | None,
    steps: int | None,
    trainings: int | None,
    prove: bool,
    seeds: int,
    store: Path | None,
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
    isograd repair net.py:Net --input 32,64 --budget 60
    isograd repair net.py:build --prove --train net.py:train --seeds 5
    """
    if train is not None and steps is not None:
        raise click.UsageError("--train and --steps are two ways to train: give one of them")
    if trainings is not None and train is None and steps is None:
        raise click.UsageError(
            "--trainings counts what --train or --steps may train: give one of them as well"
        )
    if store is not None and not prove:
        raise click.UsageError("--store keeps the trainings of a proof: give --prove as well")
    spare(output, target, train)
    found, aim = _search(target, inputs, unsafe, train, steps, trainings, budget, seed)
    if form == "text":  # what was found is kept, whatever becomes of its proof
        click.echo(found)
    if output is not None:
        _write(found, output)
    stopped = found.note.startswith("interrupted")
    proof, error = None, found.failure
    if prove and found.prescription is not None and not stopped and error is None:
        try:
            proof = _proof(target, inputs, found.prescription, aim.loss, train, seeds, store)
        except KeyboardInterrupt:
            stopped = True
            kept = (
                "--store FILE keeps trainings" if store is None else f"the same command goes on from {store}"
            )
            click.echo(f"the proof was interrupted before three pairs were complete; {kept}", err=True)
        except TargetError as raised:
            error = raised
    _print(found, proof, form)
    if error is not None:
        raise error
    if stopped:
        ctx.exit(INTERRUPTED)
    ctx.exit(0 if found.cured and (proof is None or proof.helps) else NOT_CURED)


def _print(found: Repair, proof: Proof | None, form: Literal["text", "json"]) -> None:
    if form == "json":
        told = json.loads(found.to_json())
        told["proof"] = None if proof is None else json.loads(proof.to_json())
        click.echo(json.dumps(told, indent=2))
    elif proof is not None:
        click.echo(f"\n{proof}")


def _write(found: Repair, output: Path) -> None:
    if found.prescription is None:
        click.echo(f"nothing to write to {output}: {found.note}", err=True)
    else:
        write(output, found.to_code())
        taken = f"from {output.stem} import repair"
        if not (output.suffix == ".py" and output.stem.isidentifier()):  # import knows no such file
            taken = f'import runpy; repair = runpy.run_path("{output}")["repair"]'
        click.echo(
            f"written to {output}; before the optimizer is made: {taken}; model = repair(model)", err=True
        )


def _search(
    text: str,
    inputs: tuple[InputSpec, ...],
    unsafe: bool,
    train: str | None,
    steps: int | None,
    trainings: int | None,
    budget: float | None,
    seed: int,
) -> tuple[Repair, Target]:
    """What the search finds, and what it was found for."""
    with progress("importing torch") as say:
        import torch

        import isograd
        from isograd.cli.prove import judging, named
        from isograd.cli.target import load
        from isograd.judge import TRAININGS, short_training

        say(f"importing {text}")
        torch.manual_seed(seed)
        target = load(text, inputs, seed=seed)
        judge = judging(train, named(train)) if train is not None else None
        if steps is not None:
            judge = short_training(target.loss, steps=steps)
        say(f"measuring {text}")
        try:
            found = isograd.repair(
                target.model,
                target.loss,
                budget=budget,
                unsafe=unsafe,
                train=judge,
                trainings=trainings or TRAININGS,
                progress=say,
            )
        except (TypeError, ValueError) as error:  # what cannot be measured, in the user's words
            raise TargetError(f"{text}: {error}") from error
        return dataclasses.replace(found, target=text), target


def _proof(
    text: str,
    inputs: tuple[InputSpec, ...],
    rx: Prescription,
    loss: Loss,
    train: str | None,
    seeds: int,
    store: Path | None,
) -> Proof:
    """Paired trainings with and without the repair."""
    with progress(f"proving: {rx.title}") as say:
        from isograd.cli.prove import proof

        def told(done: int, of: int) -> None:
            say(f"proving: {done} of {of} trainings done")

        return proof(text, inputs, rx, loss, train=train, seeds=seeds, store=store, progress=told)
