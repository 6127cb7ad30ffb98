"""GitHub annotations: one workflow command a finding, drawn beside the line it points to."""

from __future__ import annotations

from isograd.diagnosis import Diagnosis, Finding, Severity
from isograd.render.places import places
from isograd.render.remedies import in_words

LEVELS = {Severity.ERROR: "error", Severity.WARNING: "warning", Severity.INFO: "notice"}
SHOWN = 3
"""Places that are named: an annotation is read in the margin."""


def github(diagnosis: Diagnosis) -> str:
    """One line a finding, at the first place it points to; empty where there is none."""
    return "".join(_annotation(diagnosis, finding) + "\n" for finding in diagnosis.findings)


def _annotation(diagnosis: Diagnosis, finding: Finding) -> str:
    properties = {"title": f"{finding.code} {finding.name}"}
    for place in places(diagnosis, finding)[:1]:
        properties = {"file": place.path, "line": str(place.line)} | properties
    where = ", ".join(finding.sites[:SHOWN]) + " …" * (len(finding.sites) > SHOWN)
    said = [
        finding.message,
        where and f"at: {where}",
        finding.cause,
        *(f"try: {in_words(remedy)}" for remedy in finding.remedies),
    ]
    message = _escaped("\n".join(part for part in said if part))
    named = ",".join(f"{name}={_property(value)}" for name, value in properties.items())
    return f"::{LEVELS[finding.severity]} {named}::{message}"


def _escaped(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _escaped(text).replace(":", "%3A").replace(",", "%2C")
