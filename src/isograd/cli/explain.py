"""`isograd explain`: the page of one finding, or the list of all."""

from __future__ import annotations

import click

from isograd import pages


@click.command()
@click.argument("code", required=False)
def explain(code: str | None) -> None:
    """Print what a finding means, by its CODE or name; without one, list all."""
    if code is None:
        known = pages.pages()
        width = max((len(page.name) for page in known), default=0)
        for page in known:
            click.echo(f"{page.code}  {page.name:<{width}}  {page.summary}")
        return
    try:
        click.echo(pages.explain(code))
    except ValueError as error:
        raise click.UsageError(f"{error}\n`isograd explain` lists them all") from None
