"""Run isograd.check over the zoo and print who was right: python -m gallery.zoo

    --healthy --sick --cases   only that part; all three by default
    --quick                    about a dozen of each
    --only TEXT                cases whose name contains the text

One line a case: what it is known to be, what check says, the cause, the decades, the seconds, and what
other tools said of the same model (gallery/peers.json, made by gallery.peers). At the end the confusion
table. Exit status 1 if anything is missed, called sick without being so, or given a wrong cause.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch
import transformers

import isograd
from gallery.case import Case
from gallery.cases import published
from gallery.healthy import healthy
from gallery.sick import harmless, sick
from isograd.diagnosis import Diagnosis, Severity

PEERS = Path(__file__).with_name("peers.json")
PARTS: dict[str, Callable[[], tuple[Case, ...]]] = {
    "healthy": lambda: (*healthy(), *harmless()),
    "sick": sick,
    "cases": published,
}


@dataclass(frozen=True)
class Grade:
    """How a diagnosis compares with what is known of a case."""

    case: Case
    said: str
    """The verdict, or 'crash'."""
    cause: str
    decades: float
    seconds: float
    faults: tuple[str, ...] = ()
    """'miss', 'false alarm', 'wrong verdict', 'wrong cause', 'residuals', 'crash'."""
    note: str = ""
    codes: tuple[str, ...] = field(default=())


def graded(case: Case) -> Grade:
    """Build a case, diagnose it and compare."""
    model, loss = case.build()
    started = time.perf_counter()
    try:
        diagnosis = isograd.check(model, loss)
    except Exception:  # a crash of the tool is a result to print, and the zoo goes on
        note = traceback.format_exc().strip().splitlines()[-1]
        return Grade(case, "crash", "", 0.0, time.perf_counter() - started, ("crash",), note)
    seconds = time.perf_counter() - started
    causes = named_causes(diagnosis)
    return Grade(
        case,
        diagnosis.verdict,
        ",".join(sorted(causes)),
        diagnosis.flow.decades,
        seconds,
        tuple(faults(case, diagnosis)),
        codes=tuple(dict.fromkeys(f.code for f in diagnosis.findings if f.severity > Severity.INFO)),
    )


def named_causes(diagnosis: Diagnosis) -> set[str]:
    """Cause slugs of all findings that are more than information."""
    slugs = (f.evidence.get("cause", "") for f in diagnosis.findings if f.severity > Severity.INFO)
    return {str(slug) for slug in slugs if slug}


def faults(case: Case, diagnosis: Diagnosis) -> list[str]:
    """What is wrong with a diagnosis."""
    found: list[str] = []
    loud = {f.code for f in diagnosis.findings if f.severity > Severity.INFO}
    errors = {f.code for f in diagnosis.errors}
    if not case.sick:
        if errors - case.tolerated:
            found.append("false alarm")
    elif not (errors or case.codes & loud):
        found.append("miss")
    else:
        if case.codes and not case.codes & loud:
            found.append("wrong code")
        if case.verdict not in ("sick", diagnosis.verdict):
            found.append("wrong verdict")
        if case.causes and not case.causes & named_causes(diagnosis):
            found.append("wrong cause")
    if case.residuals is not None:
        counted = sum(site.kind == "residual add" for site in diagnosis.flow.sites)
        if counted != case.residuals:
            found.append(f"residuals {counted} for {case.residuals}")
    return found


@cache
def peers() -> dict[str, dict[str, str]]:
    """What other tools said: tool -> case -> verdict."""
    return json.loads(PEERS.read_text()) if PEERS.exists() else {}


def line(grade: Grade) -> str:
    """One row of the table."""
    others = "  ".join(f"{said.get(grade.case.name, '-')[:12]:12}" for said in peers().values())
    mark = "ok" if not grade.faults else ", ".join(grade.faults).upper()
    return (
        f"{grade.case.name[:46]:46} {grade.case.verdict:10} {grade.said:10} {grade.cause[:34]:34}"
        f" {grade.decades:8.2f} {grade.seconds:6.2f}  {others}  {mark} {grade.note}"
    )


def head() -> str:
    """The first row of the table."""
    others = "  ".join(f"{tool[:12]:12}" for tool in peers())
    return f"{'case':46} {'known':10} {'said':10} {'cause':34} {'decades':>8} {'s':>6}  {others}"


def confusion(grades: Sequence[Grade]) -> str:
    """Known against said, and the same for the other tools where they were asked."""
    kinds = ("healthy", "vanishing", "exploding", "broken", "crash")
    known = ("healthy", "vanishing", "exploding", "broken", "sick")
    table = Counter((grade.case.verdict, grade.said) for grade in grades)
    lines = ["known \\ said".ljust(14) + "".join(kind.rjust(11) for kind in kinds)]
    for row in known:
        if any(table[row, kind] for kind in kinds):
            lines.append(row.ljust(14) + "".join(str(table[row, kind]).rjust(11) for kind in kinds))
    lines.append("")
    well = [g for g in grades if not g.case.sick]
    ill = [g for g in grades if g.case.sick]
    wrong = Counter(fault.split()[0] for grade in grades for fault in grade.faults)
    lines.append(
        f"isograd      {len(ill) - wrong['miss']}/{len(ill)} found, {wrong['false']}/{len(well)} false alarms, "
        f"{wrong['wrong']} wrong verdicts or causes, {wrong['residuals']} residual counts off, {wrong['crash']} crashes"
    )
    for tool, said in peers().items():
        asked = [g for g in grades if g.case.name in said]
        caught = sum(said[g.case.name] != "healthy" for g in asked if g.case.sick)
        alarms = sum(said[g.case.name] != "healthy" for g in asked if not g.case.sick)
        lines.append(
            f"{tool:12} {caught}/{sum(g.case.sick for g in asked)} found, "
            f"{alarms}/{sum(not g.case.sick for g in asked)} false alarms"
        )
    return "\n".join(lines)


def chosen(parts: Sequence[str], quick: bool, only: str = "") -> list[Case]:
    """The cases of some parts, thinned to about a dozen of each for `quick`."""
    found: list[Case] = []
    for part in parts:
        cases = [case for case in PARTS[part]() if only in case.name]
        found += cases[:: max(1, len(cases) // 12)] if quick else cases
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for part in PARTS:
        parser.add_argument(f"--{part}", action="store_true")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", default="")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    parts = [part for part in PARTS if getattr(options, part)] or list(PARTS)
    print(head())
    grades: list[Grade] = []
    for case in chosen(parts, options.quick, options.only):
        grades.append(graded(case))
        print(line(grades[-1]), flush=True)
    print()
    print(confusion(grades))
    return int(any(grade.faults for grade in grades))


if __name__ == "__main__":
    sys.exit(main())
