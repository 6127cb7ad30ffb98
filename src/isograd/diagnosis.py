"""What is sick, what is healthy with the same evidence, and what could not be examined."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import TYPE_CHECKING

from isograd.flow import Flow

if TYPE_CHECKING:
    from rich.text import Text

    from isograd.record.run import Run


EXPLODING = ("EG2", "RN602", "UP506", "UP509", "TR703")
"""Codes of gradients, along depth and along time, of steps, of a sum of gradients and of a loss that explode."""


class Severity(IntEnum):
    """How bad a finding is. Only an ERROR makes `isograd check` exit with status 1."""

    INFO = 0
    WARNING = 1
    ERROR = 2


FAR = 400.0
"""Decades that stand for a gradient that is exactly zero or not finite: beyond any that is measured."""


@dataclass(frozen=True, slots=True)
class Effect:
    """What one intervention gave back, measured on a copy with one forward and one backward."""

    intervention: str
    """What was changed: 'exchange sigmoid for ReLU'."""
    cause: str
    """What that change tests: 'the sigmoid activations'."""
    decades_before: float
    decades_after: float
    given_back: float
    """Decades towards zero; negative: it made things worse; NaN: could not be tested."""
    note: str = ""


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong: code, severity, where, why, with the evidence and what helps."""

    code: str
    name: str
    severity: Severity
    message: str
    """The verdict in one sentence, with its numbers."""
    cause: str = ""
    """Why, in one sentence; says whether it was tested by intervention."""
    sites: tuple[str, ...] = ()
    evidence: dict[str, float | int | str] = field(default_factory=dict[str, float | int | str])
    """Numbers the verdict rests on, with the thresholds they were held against."""
    remedies: tuple[str, ...] = ()
    effects: tuple[Effect, ...] = ()

    def matches(self, patterns: Sequence[str]) -> bool:
        """Is this finding meant by one of these code prefixes (`VG`, `VG1`, `VG101`) or names?"""
        return any(self.name == pattern or self.code.startswith(pattern) for pattern in patterns)


@dataclass(frozen=True, repr=False)
class Diagnosis:
    """Findings, most severe first; what is healthy; what could not be examined; and the flow."""

    flow: Flow
    findings: tuple[Finding, ...] = ()
    healthy: dict[str, str] = field(default_factory=dict[str, str])
    """By code: what was examined and found well, with its evidence in words."""
    unexamined: dict[str, str] = field(default_factory=dict[str, str])
    """By code or subject: why it could not be examined."""
    target: str = ""

    @property
    def errors(self) -> tuple[Finding, ...]:
        """The findings that make the verdict."""
        return tuple(finding for finding in self.findings if finding.severity is Severity.ERROR)

    @property
    def verdict(self) -> str:
        """'broken', 'exploding', 'vanishing' or 'healthy'.

        Broken comes first: where values are not finite, the backward fails, no gradient leaves the loss or
        samples are taken for steps, what happens along depth and time cannot be told.
        """
        codes = [finding.code for finding in self.errors]
        if any(code.startswith("NF4") or code in ("VG102", "RN604") for code in codes):
            return "broken"
        if any(code.startswith(EXPLODING) for code in codes):
            return "exploding"
        return "vanishing" if codes else "healthy"

    def narrowed(self, select: Sequence[str] | None = None, ignore: Sequence[str] | None = None) -> Diagnosis:
        """Only the findings that `select` means (all by default) and `ignore` does not."""
        kept = (
            f for f in self.findings if (select is None or f.matches(select)) and not f.matches(ignore or ())
        )
        return replace(self, findings=tuple(kept))

    # A diagnosis prints itself. How it looks is an edge of the house: rendering is imported when it is asked
    # for, so that the core neither needs nor knows it.

    def __repr__(self) -> str:
        return self.__rich__().plain

    def __rich__(self) -> Text:
        from isograd.render.text import document

        return document(self)

    def _repr_html_(self) -> str:
        return self.to_html()

    def to_html(self) -> str:
        """An HTML fragment without scripts or links: what a notebook shows."""
        from isograd.render.html import fragment

        return fragment(self)

    def to_json(self) -> str:
        """JSON as docs/diagnosis.md describes it: strict, with null where nothing finite was measured."""
        from isograd.render.json import to_json

        return to_json(self)


def diagnose(measured: Flow | Run) -> Diagnosis:
    """Examine a flow, or the record of a run: findings, what is healthy, what could not be examined."""
    if not isinstance(measured, Flow):
        from isograd.record.verdict import verdict  # the detectors import Finding from here

        return verdict(measured)
    return _symptoms(measured)


def _symptoms(flow: Flow) -> Diagnosis:
    from isograd.symptoms import Healthy, Unexamined, symptoms  # the symptoms import Finding from here

    findings: list[Finding] = []
    healthy: dict[str, str] = {}
    unexamined: dict[str, str] = dict(flow.unexamined)
    for code, examine in symptoms():
        for outcome in examine(flow):
            if isinstance(outcome, Healthy):
                healthy[code] = outcome.evidence
            elif isinstance(outcome, Unexamined):
                unexamined[code] = outcome.why
            else:
                findings.append(outcome)
    for finding in findings:  # one line of a model may be well where another is not
        healthy.pop(finding.code, None)
        unexamined.pop(finding.code, None)
    findings.sort(key=lambda f: -f.severity)
    return Diagnosis(flow, tuple(findings), healthy, unexamined)
