"""The text of a prescription: what is done, why, what to expect, and the model's lines as a diff."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from itertools import groupby

from rich.text import Text

from isograd.prescription import Edit, Prescription, Safety, printed

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
        text.append("\n  by hand   ", "dim").append(line)
    return text


def diff(edits: Sequence[Edit]) -> Iterator[str]:
    """`- (3): Sigmoid()` and `+ (3): ReLU()`; places with the same two lines share them."""
    for _, group in groupby(edits, key=_alike):
        run = list(group)
        where, first = places([edit.place for edit in run]), run[0]
        if first.rows is not None:
            where += f"[{first.rows[0]}:{first.rows[1]}]"
        if first.source:
            yield f"@ {first.source}"
        if first.before:
            yield f"- {where}: {first.before}"
        new = printed(first)
        if first.verb == "wrap":
            new = f"{new}, around what was there"
        elif first.verb == "configure":
            new = f"{new} in the training"
        yield f"+ {where}: {new}"


def _alike(edit: Edit) -> tuple[str, ...]:
    return edit.verb, edit.before, printed(edit), str(edit.rows), edit.source


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
