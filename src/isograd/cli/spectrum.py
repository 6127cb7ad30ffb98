"""`isograd spectrum TARGET`: singular values of the Jacobian, segment by segment and end to end."""

from __future__ import annotations

import dataclasses
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from isograd.cli.errors import TargetError
from isograd.cli.inputs import InputSpec
from isograd.cli.options import spare, with_inputs, with_output, write
from isograd.cli.progress import progress

if TYPE_CHECKING:
    from isograd.spectrum import SingularValues, Spectrum

INTERRUPTED = 130
Format = Literal["text", "json", "svg", "html"]


@click.command()
@click.argument("target")
@with_inputs
@click.option("--sites", metavar="NAMES", help="Only segments of these sites or modules: fc1,h.*")
@click.option("--from", "start", metavar="NAME", help="Begin with this site or module, not at the input.")
@click.option("--to", "end", metavar="NAME", help="Stop after this site or module, not at the output.")
@click.option(
    "--tolerance",
    type=click.FloatRange(min=0, min_open=True),
    default=1e-2,
    show_default=True,
    help="Relative accuracy at which an iteration stops.",
)
@click.option(
    "--format", "form", type=click.Choice(["text", "json", "svg", "html"]), default="text", show_default=True
)
@with_output
@click.option(
    "--seed", type=int, default=0, show_default=True, help="Of the random data, weights and probes."
)
@click.pass_context
def spectrum(
    ctx: click.Context,
    target: str,
    inputs: tuple[InputSpec, ...],
    sites: str | None,
    start: str | None,
    end: str | None,
    tolerance: float,
    form: Format,
    output: Path | None,
    seed: int,
) -> None:
    """Singular values of the Jacobian of TARGET, for every segment of its backbone and end to end.

    The largest value bounds what a segment can do to a gradient, the RMS is what it does to a random one,
    the gain what it does to the gradient of this loss. TARGET is as for `isograd check`. Ctrl-C prints the
    segments that are done.

    \b
    isograd spectrum net.py:build
    isograd spectrum net.py:Net --input 32,64 --sites 'h.*' --tolerance 0.001
    isograd spectrum gpt.py:build --from h.2 --to h.5
    isograd spectrum net.py:build --format svg -o spectrum.svg
    """
    spare(output, target)
    names = None if sites is None else [name.strip() for name in sites.split(",") if name.strip()]
    found, whole = _spectrum(target, inputs, names, (start, end), tolerance, seed)
    _print(found, form, output)
    ctx.exit(0 if whole else INTERRUPTED)


def _spectrum(
    text: str,
    inputs: tuple[InputSpec, ...],
    sites: list[str] | None,
    span: tuple[str | None, str | None],
    tolerance: float,
    seed: int,
) -> tuple[Spectrum, bool]:
    """What was measured, and whether that is all: an interrupt keeps the segments that are done."""
    done: list[SingularValues] = []
    with progress("importing torch") as say:
        import torch

        import isograd
        from isograd.cli.target import load

        def each(values: SingularValues, of: int) -> None:
            done.append(values)
            left = "end to end is left" if len(done) == of else f"{len(done)} of {of} segments done"
            say(f"singular values of {text}: {left}")

        say(f"importing {text}")
        torch.manual_seed(seed)
        target = load(text, inputs, seed=seed)
        say(f"singular values of {text}")
        try:
            found = isograd.spectrum(
                target.model,
                target.loss,
                sites=sites,
                start=span[0],
                end=span[1],
                tolerance=tolerance,
                seed=seed,
                each=each,
            )
        except (TypeError, ValueError) as error:  # what cannot be measured, in the user's words
            raise TargetError(f"{text}: {error}") from error
        except KeyboardInterrupt:
            if not done:
                raise
            partial = isograd.Spectrum(tuple(done), None, tolerance, ("interrupted before the end",), text)
            return partial, False
    return dataclasses.replace(found, target=text), True


def _print(found: Spectrum, form: Format, output: Path | None) -> None:
    match form:
        case "text":
            report = f"{found}\n"
        case "json":
            report = found.to_json()
        case "svg" | "html":
            try:
                report = found.to_svg() if form == "svg" else _page(found)
            except ValueError as error:  # no matplotlib
                raise click.UsageError(str(error)) from error
    if output is not None:
        write(output, report)
        click.echo(f"singular values of {found.target}: written to {output}", err=True)
    else:
        click.echo(report, nl=False)


def _page(found: Spectrum) -> str:
    """A fragment as a file that opens in a browser."""
    title = escape(f"singular values of {found.target}")
    return f'<!DOCTYPE html>\n<meta charset="utf-8">\n<title>{title}</title>\n{found.to_html()}'
