"""The text of a prescription: what is done, why, what to expect, and the model's lines as a diff."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from rich.text import Text

from isograd.diagnosis import Diagnosis, Finding, Severity
from isograd.edit import Edit, printed
from isograd.flow import Flow
from isograd.prescription import Prescription, Safety
from isograd.render import numbers
from isograd.render.remedies import in_words

if TYPE_CHECKING:
    from isograd.repair import Repair
    from isograd.search import Tried

SAFETY = {
    Safety.SAFE: ("safe: the model computes the same function", "green"),
    Safety.UNSAFE: ("unsafe: the model computes another function", "yellow"),
    Safety.ADVICE: ("advice: words only", "dim"),
}


def document(rx: Prescription) -> Text:
    """Title, safety, expectation and diff; `not applicable, because …` where there is nothing to do."""
    text = Text().append(rx.remedy, "bold")
    if rx.why_not:
        return text.append(f"  not applicable, because {rx.why_not}", "dim").append(_advice(rx))
    text.append(f"  {rx.title}")
    said, style = SAFETY[rx.safety]
    text.append(f"\n  {said}", style)
    if rx.expected:
        text.append("\n  expected  ", "dim").append(rx.expected)
    for line in diff(rx.edits):
        text.append(f"\n  {line}", {"-": "red", "+": "green"}.get(line[0], "cyan"))
    return text.append(_advice(rx))


def _advice(rx: Prescription) -> Text:
    text = Text()
    for line in rx.advice:
        text.append("\n  by hand   ", "dim").append(in_words(line))
    return text


def diff(edits: Sequence[Edit]) -> Iterator[str]:
    """`- (3): Sigmoid()` and `+ (3): ReLU()`; places with the same two lines share them."""
    alike: dict[tuple[str, ...], list[Edit]] = {}
    for edit in edits:  # the edits of one block need not stand together
        alike.setdefault(_alike(edit), []).append(edit)
    for run in alike.values():
        where, first = places([edit.place for edit in run]), run[0]
        if first.rows is not None:
            where += f"[{first.rows[0]}:{first.rows[1]}]"
        if first.source:
            yield f"@ {first.source}"
        if old := _range([edit.before for edit in run]):
            yield f"- {where}: {old}"
        new = printed(first)
        if first.verb == "wrap":
            new = f"{new}, around what was there"
        elif first.verb == "configure":
            new = f"{new} in the training"
        yield f"+ {where}: {new}"


def _alike(edit: Edit) -> tuple[str, ...]:
    """Edits that share a pair of lines: what stood there may differ in a number."""
    return edit.verb, _words(edit.before), printed(edit), str(edit.rows), edit.source


def _words(before: str) -> str:
    words, _, number = before.rpartition(" ")
    return words if _is_number(number) else before


def _range(befores: Sequence[str]) -> str:
    """`sigma_w 0.567 … 0.589`."""
    known = {before.rpartition(" ")[2] for before in befores}
    if len(known) < 2:
        return befores[0]
    ordered = sorted(known, key=float)
    return f"{_words(befores[0])} {ordered[0]} … {ordered[-1]}"


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def places(names: Sequence[str]) -> str:
    """`(0), (2) … (38) (20)`: the first two and the last of many."""
    shown = [f"({name})" if name else "(model)" for name in names]
    if len(shown) <= 3:
        return ", ".join(shown)
    return f"{shown[0]}, {shown[1]} … {shown[-1]} ({len(shown)})"


def to_json(rx: Prescription) -> str:
    """Strict JSON, for a program: the edits as data and the code as text."""
    return json.dumps(as_dict(rx), indent=2) + "\n"


def as_dict(rx: Prescription) -> dict[str, object]:
    return {
        "remedy": rx.remedy,
        "title": rx.title,
        "applicable": rx.applicable,
        "why_not": rx.why_not,
        "safety": rx.safety.value,
        "reach": rx.reach.name.lower(),
        "treats": list(rx.treats),
        "expected": rx.expected,
        "decades": rx.decades if math.isfinite(rx.decades) else None,
        "references": list(rx.references),
        "advice": list(rx.advice),
        "edits": [
            {
                "place": e.place,
                "verb": e.verb,
                "of": e.of,
                "arguments": e.arguments,
                "rows": e.rows,
                "before": e.before,
                "source": e.source,
            }
            for e in rx.edits
        ],
        "code": rx.to_code() if rx.edits else "",
    }


def repair_document(found: Repair) -> Text:
    """What a search found: verdict before and after, the prescription with its diff, what was not enough and why."""
    text = Text()
    style = "bold green" if found.cured else "bold red"
    text.append(
        "cured" if found.cured and found.prescription else "healthy" if found.cured else "not cured", style
    )
    if found.target:
        text.append(f"  {found.target}", "bold")
    text.append(f"\n  {_effect(found)}")
    if found.note:
        text.append(f"\n  {found.note}", "yellow")
    label = "not enough" if found.before.errors else "not chosen"
    rest = [tried for tried in found.tried if tried.prescription is not found.prescription]
    for title, said, count in _failures(rest):
        times = f" ({count} variants)" if count > 1 else ""
        text.append(f"\n  {label}  ", "dim").append(f"{title}{times}: {said}")
    for left in _left(found):
        text.append(f"\n  {left.severity.name.lower()} left  ", "dim").append(f"{left.code} {left.name}")
        for remedy in left.remedies if found.prescription is None else ():
            text.append("\n    try  ", "bold").append(in_words(remedy))
    for rx in (found.prescription, *found.by_hand):
        if rx is not None:
            text.append("\n\n").append(document(rx))
    return text


def _left(found: Repair) -> list[Finding]:
    """What the change leaves, of which the search has nothing further to say."""
    worst = Severity.ERROR if found.after.errors else Severity.WARNING
    return [finding for finding in found.after.findings if finding.severity is worst]


def _measured(flow: Flow, unit: str = "") -> str:
    """Decades lost on the way, along the depth or, where that is no chain, along time."""
    lost = flow.lost
    if math.isnan(lost) and flow.horizon is not None:
        lost = flow.horizon.decades
    if flow.failure is not None or math.isnan(lost):
        return "unmeasured" if flow.nonfinite is None else "not finite"
    return f"{numbers.decades(lost)}{unit}" if lost > -math.inf else "no gradient"


def _effect(found: Repair) -> str:
    parts = [f"{_measured(found.before.flow, ' decades')} before"]
    if found.prescription is not None:
        expected = numbers.decades(found.prescription.decades)
        parts += [f"{expected} expected"] if expected else []
        parts.append(f"{_measured(found.after.flow)} measured after")
    if not math.isnan(found.score_before):
        parts.append(f"score {found.score_before:.4g} before")
        parts += [f"{found.score_after:.4g} after"] if not math.isnan(found.score_after) else []
    measured = sum(bool(tried.verdict) for tried in found.tried)
    parts.append(f"{measured} candidate{'' if measured == 1 else 's'} measured in {found.seconds:.1f} s")
    return " · ".join(parts)


def _failures(tried: Sequence[Tried]) -> Iterator[tuple[str, str, int]]:
    """One line a remedy: its best variant, and how many there were."""
    for _, group in groupby(tried, key=_remedy):
        run = list(group)
        best = min(run, key=_remaining)
        yield best.prescription.title, best.why, len(run)


def _remedy(tried: Tried) -> str:
    return tried.prescription.remedy


def _remaining(tried: Tried) -> float:
    return math.inf if math.isnan(tried.remaining) else tried.remaining


def repair_to_json(found: Repair) -> str:
    """Strict JSON: verdicts, the prescription with its code, and every candidate."""
    told: dict[str, object] = {
        "cured": found.cured,
        "target": found.target,
        "note": found.note,
        "seconds": found.seconds,
        "before": _flow(found.before),
        "after": _flow(found.after),
        "score_before": _finite(found.score_before),
        "score_after": _finite(found.score_after),
        "prescription": None if found.prescription is None else as_dict(found.prescription),
        "by_hand": [as_dict(rx) for rx in found.by_hand],
        "tried": [
            {
                "remedy": t.prescription.remedy,
                "title": t.prescription.title,
                "why": t.why,
                "verdict": t.verdict,
                "expected": _finite(t.prescription.decades),
                "remaining": _finite(t.remaining),
                "seconds": t.seconds,
            }
            for t in found.tried
        ],
    }
    return json.dumps(told, indent=2) + "\n"


def _flow(diagnosis: Diagnosis) -> dict[str, object]:
    codes = [finding.code for finding in diagnosis.errors]
    return {"verdict": diagnosis.verdict, "decades": _finite(diagnosis.flow.lost), "errors": codes}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
