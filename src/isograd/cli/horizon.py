"""`isograd horizon TARGET`: the gradient along time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import click

from isograd.cli.errors import TargetError
from isograd.cli.inputs import InputSpec
from isograd.cli.options import spare, with_inputs, with_output, write
from isograd.cli.progress import progress

if TYPE_CHECKING:
    from isograd.horizon import Horizon

INTERRUPTED = 130
UNHEALTHY = 1
Format = Literal["text", "json", "svg", "html"]


@click.command()
@click.argument("target")
@with_inputs
@click.option("--at", type=int, default=-1, show_default=True, help="Output step to start from.")
@click.option("--time", type=int, help="Axis of the input along which time runs. Default: found.")
@click.option(
    "--probes",
    type=click.IntRange(min=1),
    default=4,
    show_default=True,
    help="Random directions at the output.",
)
@click.option("--format", "form", type=click.Choice(get_args(Format)), default="text", show_default=True)
@with_output
@click.option(
    "--seed", type=int, default=0, show_default=True, help="Of the random data, weights and probes."
)
@click.pass_context
def horizon(
    ctx: click.Context,
    target: str,
    inputs: tuple[InputSpec, ...],
    at: int,
    time: int | None,
    probes: int,
    form: Format,
    output: Path | None,
    seed: int,
) -> None:
    """How far back in time the gradient of TARGET reaches.

    The gradient from the output at one step to the input at every step before it, for anything that reads a
    sequence: recurrent layers run step by step, with the numbers of their fused kernels. TARGET is as for
    `isograd check`. Exit status 1: an error was found in the model.

    \b
    isograd horizon net.py:build
    isograd horizon net.py:Net --input 4,200,64 --format svg -o horizon.svg
    isograd horizon lm.py:build --at 99 --time 1
    """
    spare(output, target)
    found, whole = _horizon(target, inputs, at, time, probes, seed)
    try:
        _print(found, form, output)
    except ValueError as error:  # the extra that draws is missing
        raise TargetError(str(error)) from error
    if not whole:
        ctx.exit(INTERRUPTED)
    ctx.exit(UNHEALTHY if any(f.severity.name == "ERROR" for f in found.findings) else 0)


def _horizon(
    text: str, inputs: tuple[InputSpec, ...], at: int, time: int | None, probes: int, seed: int
) -> tuple[Horizon, bool]:
    """What was measured, and whether that is all: an interrupt keeps the probes that are done."""
    done: list[Horizon] = []
    with progress("importing torch") as say:
        import torch

        from isograd.cli.target import load
        from isograd.recurrent.along import horizon_of_loss

        def each(found: Horizon) -> None:
            done.append(found)
            say(f"gradient along time of {text}: {len(done)} of {probes} probes done")

        say(f"importing {text}")
        torch.manual_seed(seed)
        target = load(text, inputs, seed=seed)
        say(f"running {text} step by step")
        try:
            found = horizon_of_loss(
                target.model, target.loss, at=at, time=time, probes=probes, seed=seed, each=each
            )
        except (TypeError, ValueError) as error:  # what cannot be measured, in the user's words
            raise TargetError(f"{text}: {error}") from error
        except KeyboardInterrupt:
            if not done:
                raise
            notes = (*done[-1].notes, f"interrupted after {len(done)} of {probes} probes")
            return dataclasses.replace(done[-1], notes=notes, target=text), False
    return dataclasses.replace(found, target=text), True


def _print(found: Horizon, form: Format, output: Path | None) -> None:
    if output is not None:
        write(output, RENDERED[form](found))
        click.echo(f"horizon of {found.target}: written to {output}", err=True)
    else:
        click.echo(RENDERED[form](found), nl=False)


def _text(found: Horizon) -> str:
    return f"{found}\n"


def _json(found: Horizon) -> str:
    return found.to_json()


def _svg(found: Horizon) -> str:
    return found.to_svg()


def _html(found: Horizon) -> str:
    return found.to_html()


RENDERED: dict[Format, Callable[[Horizon], str]] = {
    "text": _text,
    "json": _json,
    "svg": _svg,
    "html": _html,
}
