"""`isograd check TARGET`: measure one forward and backward, and say what is wrong, where and why."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import click

from isograd.cli import config
from isograd.cli.errors import TargetError, users_code
from isograd.cli.inputs import InputSpec
from isograd.cli.optimizer import OptimizerSpec, OptimizerType
from isograd.cli.options import spare, with_inputs, with_output, write
from isograd.cli.progress import progress
from isograd.pages import nearest, pages

if TYPE_CHECKING:
    import torch
    from torch import nn

    from isograd.diagnosis import Diagnosis

UNHEALTHY = 1


@click.command()
@click.argument("target")
@with_inputs
@click.option("--format", "form", type=click.Choice(get_args(config.Format)), help="Default: text.")
@with_output
@click.option("--select", metavar="CODES", help="Only these codes, prefixes or names: VG,EG201.")
@click.option("--ignore", metavar="CODES", help="All but these.")
@click.option(
    "--optimizer",
    type=OptimizerType(),
    metavar="NAME[:LR]",
    help="The optimizer you train with, for the size of the first updates: adamw:3e-4.",
)
@click.option("--lr", type=float, help="Learning rate of --optimizer; alone: of plain SGD.")
@click.option("--seed", type=int, help="Of the random data and weights. Default: 0.")
@click.pass_context
def check(
    ctx: click.Context,
    target: str,
    inputs: tuple[InputSpec, ...],
    form: config.Format | None,
    output: Path | None,
    select: str | None,
    ignore: str | None,
    optimizer: OptimizerSpec | None,
    lr: float | None,
    seed: int | None,
) -> None:
    """Find out what is wrong with the gradient of TARGET, where, and why.

    TARGET is file.py:name or package.module:name. The name is an nn.Module, or a function without required
    arguments that returns one, (model, batch), or (model, loss) where loss(model) is a scalar. Or TARGET is the
    directory of a recorded run.

    \b
    isograd check net.py:build
    isograd check net.py:Net --input 32,64
    isograd check net.py:build --optimizer adamw:3e-4 --format json -o report.json
    isograd check isograd-runs/20260314-091500-train
    """
    spare(output, target)
    settings = config.load(Path.cwd())
    form = form or settings.format
    seed = settings.seed if seed is None else seed
    selected = _codes(select) if select is not None else settings.select
    ignored = _codes(ignore) if ignore is not None else settings.ignore
    _known([*(selected or ()), *ignored])
    if optimizer is None and settings.optimizer is not None:
        optimizer = OptimizerType().convert(settings.optimizer, None, ctx)
    if lr is not None:
        optimizer = OptimizerSpec.at_rate(optimizer, lr)

    if Path(target).is_dir():
        diagnosis = _of_run(target, selected, ignored)
    else:
        diagnosis = _diagnosis(target, inputs, optimizer, selected, ignored, seed)
    _print(diagnosis, form, output)
    ctx.exit(UNHEALTHY if diagnosis.errors else 0)


def _codes(text: str) -> list[str]:
    return [code.strip() for code in text.split(",") if code.strip()]


def _known(patterns: Sequence[str]) -> None:
    """A mistyped code would silently select nothing, and nothing looks like health."""
    known = pages()
    for pattern in patterns:
        if not any(page.name == pattern or page.code.startswith(pattern) for page in known):
            hint = nearest(pattern, [key for page in known for key in (page.code, page.name)])
            raise click.UsageError(
                f"no finding is called {pattern!r}{hint}\n`isograd explain` lists them all"
            )


def _of_run(text: str, select: Sequence[str] | None, ignore: Sequence[str]) -> Diagnosis:
    from isograd.record import NotARun, Run

    try:
        run = Run.open(text)
    except NotARun as error:
        raise TargetError(str(error)) from None
    with progress(f"reading {text}"):
        import isograd

        return dataclasses.replace(isograd.diagnose(run).narrowed(select, ignore), target=text)


def _diagnosis(
    text: str,
    inputs: Sequence[InputSpec],
    optimizer: OptimizerSpec | None,
    select: Sequence[str] | None,
    ignore: Sequence[str],
    seed: int,
) -> Diagnosis:
    with progress("importing torch") as say:
        import torch

        import isograd
        from isograd.cli.target import load

        say(f"importing {text}")
        torch.manual_seed(seed)
        target = load(text, inputs, seed=seed)
        say(f"measuring {text}, and trying on copies what would cure it")
        rule = _optimizer(text, optimizer, target.model)
        try:
            found = isograd.check(target.model, target.loss, optimizer=rule, select=select, ignore=ignore)
        except (TypeError, ValueError) as error:  # what `check` cannot examine, in the user's words
            raise TargetError(f"{text}: {error}") from error
    return dataclasses.replace(found, target=text)


def _optimizer(text: str, spec: OptimizerSpec | None, model: nn.Module) -> torch.optim.Optimizer | None:
    if spec is None:
        return None
    with users_code(f"{spec.name} cannot be made for the parameters of {text}"):
        return spec.make(model)


def _print(diagnosis: Diagnosis, form: config.Format, output: Path | None) -> None:
    if output is not None:
        write(output, RENDERED[form](diagnosis))
        click.echo(f"{diagnosis.verdict}  {diagnosis.target}: written to {output}", err=True)
    elif form == "text":
        _print_text(diagnosis)
    else:
        click.echo(RENDERED[form](diagnosis), nl=False)


def _print_text(diagnosis: Diagnosis) -> None:
    from rich.console import Console

    from isograd.render.text import WIDTH, document

    console = Console(highlight=False)
    width = min(console.width, WIDTH) if console.is_terminal else WIDTH
    console.print(document(diagnosis, width=width), soft_wrap=True)


def _text(diagnosis: Diagnosis) -> str:
    return f"{diagnosis}\n"


def _json(diagnosis: Diagnosis) -> str:
    return diagnosis.to_json()


def _sarif(diagnosis: Diagnosis) -> str:
    from isograd.render.sarif import sarif

    return sarif(diagnosis)


def _github(diagnosis: Diagnosis) -> str:
    from isograd.render.github import github

    return github(diagnosis)


RENDERED: dict[config.Format, Callable[[Diagnosis], str]] = {
    "text": _text,
    "json": _json,
    "sarif": _sarif,
    "github": _github,
}
