"""Where in the user's files a finding points: for the formats that draw on source lines."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from isograd.diagnosis import Diagnosis, Finding
from isograd.flow import Flow
from isograd.statistics import Site


@dataclass(frozen=True)
class Place:
    """A line of a file. `site` is empty where only the target is known."""

    file: str
    line: int
    site: str = ""

    @property
    def path(self) -> str:
        """With forward slashes; relative wherever the file lies below the current folder."""
        return self.file.replace("\\", "/").removeprefix("./")


def places(diagnosis: Diagnosis, finding: Finding) -> list[Place]:
    """The distinct source lines of a finding's sites; the target's file where none is known."""
    known = list(_sites(diagnosis.flow))
    sources = {name: site.source for site in known for name in (site.name, site.place)}
    named = [(name, sources.get(name, "")) for name in finding.sites]
    named.append(("", str(finding.evidence.get("source", ""))))
    found: dict[tuple[str, int], Place] = {}
    for name, source in named:
        if match := re.fullmatch(r"(.+):(\d+)", source):
            file, line = match[1], int(match[2])
            found.setdefault((file, line), Place(file, line, name))
    file = diagnosis.target.rpartition(":")[0]
    if not found and file.endswith(".py"):
        return [Place(file, 1)]
    return list(found.values())


def _sites(flow: Flow) -> Iterator[Site]:
    yield from flow.sites
    for steps in flow.ledgers.values():
        yield from (step.site for step in steps)
    yield from (activation.site for activation in flow.activations)
    yield from (call.site for call in flow.losses)
    yield from flow.outputs
    if flow.nonfinite is not None:
        yield flow.nonfinite.site
    for tower in flow.towers:
        yield from _sites(tower)
