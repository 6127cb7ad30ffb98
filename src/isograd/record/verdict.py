"""The diagnosis of a watched training: what its detectors told, and what they have to say of the rest."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

from isograd.diagnosis import Diagnosis, Finding
from isograd.flow import Flow
from isograd.record.run import Run

if TYPE_CHECKING:
    from isograd.monitor.detectors import Detectors


def verdict(run: Run, since: int | None = None) -> Diagnosis:
    """What was found while it was recorded, from the step `since` on or, of several trainings, in the newest; steps that no
    detector had seen are shown to them now."""
    from isograd.monitor.detectors import Detectors  # the monitor, beside them, imports `examined` from here

    detectors = Detectors()
    again = run.remember(detectors)
    told = list(run.findings)
    known = {(step, finding.code) for step, finding in told}
    told += [(step, finding) for step, finding in again if (step, finding.code) not in known]
    last, first = run.last, detectors.since if since is None else since
    told = [(step, finding) for step, finding in told if step >= first]
    kept = "no step was recorded" if last < 0 else f"{last + 1} steps were recorded, {len(run)} are kept"
    if first:
        kept += f"; this is of the training that begins at step {first}"
    losses = run.series("loss")[1]
    flow = Flow((), {}, loss=losses[-1] if losses else math.nan, notes=(kept, NOTE))
    return examined(told, detectors, flow=flow)


NOTE = "a run is read from its gradients and weights; `isograd check` on the model tells which operation costs what"


def examined(
    told: Iterable[tuple[int, Finding]], detectors: Detectors, *, flow: Flow | None = None, target: str = ""
) -> Diagnosis:
    """A diagnosis of findings by step: each code once, with its first step, and how often it was told."""
    found: dict[str, list[tuple[int, Finding]]] = {}
    for step, finding in sorted(told, key=lambda pair: pair[0]):
        found.setdefault(finding.code, []).append((step, finding))
    findings = [_once(steps) for steps in found.values()]
    findings.sort(key=lambda finding: -finding.severity)
    healthy, unexamined = detectors.outcomes()
    return Diagnosis(
        flow or Flow((), {}),
        tuple(findings),
        {code: words for code, words in healthy.items() if code not in found},
        {code: words for code, words in unexamined.items() if code not in found},
        target,
    )


def _once(told: list[tuple[int, Finding]]) -> Finding:
    """The first of its kind; the worst severity that it reached."""
    step, first = told[0]
    times = f", and {len(told) - 1} more times, last at step {told[-1][0]}" if len(told) > 1 else ""
    return replace(
        first,
        severity=max(finding.severity for _, finding in told),
        message=f"at step {step}{times}: {first.message}",
        evidence={"step": step, "times": len(told)} | first.evidence,
    )
