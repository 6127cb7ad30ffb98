"""SARIF 2.1.0: what code scanning reads."""

from __future__ import annotations

from pathlib import PurePath
from typing import Any
from urllib.parse import quote

import msgspec

import isograd
from isograd.diagnosis import Diagnosis, Finding, Severity
from isograd.render.places import Place, places
from isograd.render.remedies import in_words

SCHEMA = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
LEVELS = {Severity.ERROR: "error", Severity.WARNING: "warning", Severity.INFO: "note"}


def sarif(diagnosis: Diagnosis) -> str:
    """One run with a rule for each code found and a result for each finding."""
    rules = {finding.code: finding.name for finding in diagnosis.findings}
    log = {
        "$schema": SCHEMA,
        "version": "2.1.0",
        "runs": [
            {
                "tool": {
                    "driver": {
                        "name": "isograd",
                        "version": isograd.__version__,
                        "rules": [_rule(code, name) for code, name in rules.items()],
                    }
                },
                "results": [_result(diagnosis, finding, list(rules)) for finding in diagnosis.findings],
            }
        ],
    }
    return msgspec.json.format(msgspec.json.encode(log), indent=2).decode() + "\n"


def _rule(code: str, name: str) -> dict[str, Any]:
    return {"id": code, "name": name, "help": {"text": f"isograd explain {code}"}}


def _result(diagnosis: Diagnosis, finding: Finding, rules: list[str]) -> dict[str, Any]:
    said = [finding.message, finding.cause, *(f"try: {in_words(remedy)}" for remedy in finding.remedies)]
    found = places(diagnosis, finding)
    return {
        "ruleId": finding.code,
        "ruleIndex": rules.index(finding.code),
        "level": LEVELS[finding.severity],
        "message": {"text": "\n".join(part for part in said if part)},
        "locations": [_location(place) for place in found[:1]],
        "relatedLocations": [_location(place, i) for i, place in enumerate(found[1:])],
    }


def _location(place: Place, number: int | None = None) -> dict[str, Any]:
    location: dict[str, Any] = {
        "physicalLocation": {
            "artifactLocation": {"uri": _uri(place.path)},
            "region": {"startLine": place.line},
        }
    }
    if place.site:
        location["logicalLocations"] = [{"fullyQualifiedName": place.site}]
    if number is not None:
        location["id"] = number
    return location


def _uri(path: str) -> str:
    return PurePath(path).as_uri() if PurePath(path).is_absolute() else quote(path)
