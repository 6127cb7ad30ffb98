"""`isograd explain`: the page of one finding or remedy, or the list of all."""

from __future__ import annotations

import click

from isograd import pages


@click.command()
@click.argument("code", required=False)
def explain(code: str | None) -> None:
    """Print what a finding means, by its CODE or name, or what a remedy does, by its name; without one, list all.

    \b
    isograd explain VG101
    isograd explain exchange-activation
    """
    if code is None:
        known = pages.pages()
        width = max((len(page.name) for page in known), default=0)
        for page in known:
            click.echo(f"{page.code}  {page.name:<{width}}  {page.summary}")
        cures = pages.remedies()
        width = max((len(page.name) for page in cures), default=0)
        click.echo()
        for page in cures:
            click.echo(f"{page.name:<{width}}  {page.summary}")
        return
    try:
        click.echo(pages.explain(code))
    except ValueError as error:
        raise click.UsageError(f"{error}\n`isograd explain` lists them all") from None
