"""What is sick, what is healthy with the same evidence, and what could not be examined."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum

from isograd.flow import Flow


class Severity(IntEnum):
    """How bad a finding is. Only an ERROR makes `isograd check` exit with status 1."""

    INFO = 0
    WARNING = 1
    ERROR = 2


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


@dataclass(frozen=True)
class Diagnosis:
    """Findings, most severe first; what is healthy; what could not be examined; and the flow."""

    flow: Flow
    findings: tuple[Finding, ...] = ()
    healthy: dict[str, str] = field(default_factory=dict[str, str])
    """By code: what was examined and found well, with its evidence in words."""
    unexamined: dict[str, str] = field(default_factory=dict[str, str])
    """By code or subject: why it could not be examined."""
    target: str = ""
