"""The text of a diagnosis: verdict, where, why, what to do next, then the model with its signal.

One styled text serves all: plain when it is piped, coloured in a terminal, as HTML in a notebook. It is
built from `Text` pieces and never from markup, so `[brackets]` in a module's name stay what they are.
"""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Callable
from dataclasses import dataclass

from rich.text import Text

from isograd.diagnosis import FAR, Diagnosis, Effect, Finding, Severity
from isograd.flow import Flow
from isograd.pages import pages
from isograd.render import numbers
from isograd.render.remedies import in_words
from isograd.render.tree import Row, rows

WIDTH = 100
LABEL = 8
"""Width of the labels `cause`, `try` … that stand before a paragraph."""
COLUMN = 21
"""Width of a column of signals: two numbers and the dots between them."""
BESIDE = 17
"""Width of a column that stands beside them: what theory expects, the weight of branches."""
MOST_EFFECTS = 4

VERDICTS = {
    "healthy": "bold green",
    "vanishing": "bold red",
    "exploding": "bold red",
    "broken": "bold red",
}
SEVERITIES = {Severity.ERROR: "bold red", Severity.WARNING: "yellow", Severity.INFO: "cyan"}


def document(diagnosis: Diagnosis, *, width: int = WIDTH) -> Text:
    """The whole diagnosis, no line wider than `width` but for words that are."""
    parts = [_verdict(diagnosis, width)]
    parts += [_finding(finding, width) for finding in diagnosis.findings]
    if tree := _tree(diagnosis.flow, width):
        parts.append(tree)
    if footer := _footer(diagnosis, width):
        parts.append(footer)
    return Text("\n\n").join(parts)


def _verdict(diagnosis: Diagnosis, width: int) -> Text:
    text = Text().append(diagnosis.verdict, VERDICTS[diagnosis.verdict])
    if diagnosis.target:
        text.append(f"  {diagnosis.target}", "bold")
    _paragraph(text, "", _summary(diagnosis.flow), width)
    _paragraph(text, "", _expected(diagnosis.flow), width)
    return text


def _summary(flow: Flow) -> str:
    if math.isnan(flow.decades):
        return ""
    lost = "no gradient" if flow.decades == -math.inf else f"{numbers.decades(flow.decades)} decades"
    said = f"{lost} from the output to the input"
    if flow.layers and math.isfinite(flow.sigma):
        layers = "1 layer" if flow.layers == 1 else f"{flow.layers} layers"
        said += f", {layers}, sigma {numbers.signal(flow.sigma)} per layer"
    return said


def _expected(flow: Flow) -> str:
    """What theory says of the same layers; a few of them tell nothing of the whole."""
    part = flow.expected.over(slice(1, len(flow.sites)))
    if part is None or not math.isfinite(part.measured) or not (part.whole or 2 * part.layers >= flow.layers):
        return ""
    said = f"{numbers.decades(part.decades)} ± {numbers.decades(part.spread)} expected of random weights of these sizes"
    if part.whole:
        return said
    return f"{said} in {part.layers} of the layers, where {numbers.decades(part.measured)} was measured"


def _finding(finding: Finding, width: int) -> Text:
    text = Text()
    text.append(f"{finding.code} {finding.name}", "bold")
    text.append(f"  {finding.severity.name.lower()}", SEVERITIES[finding.severity])
    where = _where(finding.sites)
    beside = text.cell_len + 2 + len(where) <= width
    if where and beside:
        text.append(f"  {where}")
    _paragraph(text, "", _true_minus(finding.message), width)
    _paragraph(text, "where", "" if beside else where, width)
    _paragraph(text, "cause", _true_minus(finding.cause), width)
    for effect in finding.effects[:MOST_EFFECTS]:
        _paragraph(text, "tested", _effect(effect), width)
    if finding.evidence:
        said = " · ".join(f"{name} {numbers.value(value)}" for name, value in finding.evidence.items())
        _paragraph(text, "evidence", said, width, "dim")
    for remedy in finding.remedies:
        _paragraph(text, "try", in_words(remedy), width)
    _paragraph(text, "more", f"isograd explain {finding.code}", width, "dim")
    return text


def _where(sites: tuple[str, ...]) -> str:
    if len(sites) <= 2:
        return ", ".join(sites)
    first, last = (re.sub(r" · \S+:\d+$", "", site) for site in (sites[0], sites[-1]))  # too long with files
    return f"{first} … {last} ({len(sites)} sites)"


def _effect(effect: Effect) -> str:
    if math.isnan(effect.given_back):
        said = f"{effect.intervention}: not tested"
    elif effect.decades_after >= FAR:
        said = f"{effect.intervention}: gives back nothing"
    elif effect.decades_before >= FAR:
        said = (
            f"{effect.intervention}: lets it through, {numbers.decades(effect.decades_after)} decades remain"
        )
    else:
        before, after = numbers.decades(effect.decades_before), numbers.decades(effect.decades_after)
        back = numbers.decades(effect.given_back)
        said = f"{effect.intervention}: {before} to {after} decades, gives back {back}"
    return f"{said} ({effect.note})" if effect.note else said


def _true_minus(words: str) -> str:
    """`−3.1 decades` for `-3.1 decades`; the hyphens of names, ranges and `1e-3` stay."""
    return re.sub(r"(?<![\w.-])-(?=\d)", "−", words)


def _paragraph(text: Text, label: str, words: str, width: int, style: str = "") -> None:
    """Indented, with its label in front and its lines wrapped below each other. No words, no paragraph."""
    if not words:
        return
    indent = 2 + (LABEL + 1 if label else 0)
    for i, line in enumerate(_wrapped(words, width - indent)):
        text.append("\n  ")
        if label:
            text.append(f"{label if i == 0 else '':<{LABEL + 1}}", "bold" if label == "try" else "dim")
        text.append(line, style)


def _wrapped(words: str, width: int) -> list[str]:
    lines: list[str] = []
    for line in words.splitlines():
        lines += textwrap.wrap(line, width, break_long_words=False, break_on_hyphens=False) or [""]
    return lines


def _tree(flow: Flow, width: int) -> Text | None:
    """None where no module gave a signal: there would be nothing to see."""
    shown = rows(flow)
    if all(math.isnan(value) for row in shown for value in row.activation + row.gradient):
        return None
    labels = [_label(row) for row in shown]
    columns = [column for column in COLUMNS if column.always or any(map(column.told, shown))]
    room = min(max(len(label.plain) for label in labels), width - sum(column.width for column in columns))
    text = Text()
    text.append(f"{'model':<{room}}{''.join(f'{c.title:>{c.width}}' for c in columns)}\n", "bold")
    text.append(f"{'':<{room}}{''.join(f'{c.unit:>{c.width}}' for c in columns)}", "dim")
    for row, label in zip(shown, labels, strict=True):
        label.truncate(room, overflow="ellipsis", pad=True)
        text.append("\n").append(label)
        for column in columns:
            text.append(f"{column.show(row):>{column.width}}")
    return text


@dataclass(frozen=True)
class _Column:
    """One column of the tree."""

    title: str
    unit: str
    width: int
    values: Callable[[Row], tuple[float, ...]]
    said: Callable[[float], str]
    always: bool = True
    """Shown even where it holds nothing."""

    def told(self, row: Row) -> bool:
        return any(not math.isnan(value) for value in self.values(row))

    def show(self, row: Row) -> str:
        known = list(dict.fromkeys(self.said(value) or "·" for value in self.values(row)))
        return " … ".join(known)


COLUMNS = (
    _Column("→ activation", "rms", COLUMN, lambda row: row.activation, numbers.signal),
    _Column("← gradient", "decades vs output", COLUMN, lambda row: row.gradient, numbers.decades),
    _Column("expected", "by theory", BESIDE, lambda row: row.expected, numbers.decades, always=False),
    _Column("branch", "rms vs stream", BESIDE, lambda row: row.branch, numbers.ratio, always=False),
)


def _label(row: Row) -> Text:
    text = Text("  " * row.indent)
    if row.label:
        text.append(f"{row.label} ")
    text.append(row.kind, "dim" if row.label else "")
    if row.folded:
        text.append(f" ({row.folded} like this)", "cyan")
    if row.hidden:
        text.append(f" +{row.hidden}", "dim")
    return text


def _footer(diagnosis: Diagnosis, width: int) -> Text | None:
    """What was examined and found well, what could not be examined, and what the measurement has to say."""
    well = _entries(diagnosis.healthy)
    if diagnosis.findings:  # what is wrong comes first; the evidence of the rest is in the JSON
        well = [", ".join(_named(code) for code in diagnosis.healthy)] if diagnosis.healthy else []
    text = Text()
    for label, entries, style in (
        ("healthy", well, "green"),
        ("not examined", _entries(diagnosis.unexamined | diagnosis.flow.unexamined), "yellow"),
        ("note", list(diagnosis.flow.notes), "dim"),
    ):
        for i, entry in enumerate(entries):
            for j, line in enumerate(_wrapped(_true_minus(entry), width - 14)):
                text.append(f"{label if i == j == 0 else '':<14}", style)
                text.append(f"{line}\n")
    text.rstrip()
    return text if text.plain else None


def _entries(reasons: dict[str, str]) -> list[str]:
    return [f"{_named(subject)}: {words}" for subject, words in reasons.items()]


def _named(subject: str) -> str:
    """`VG101 vanishing-gradient`; a subject that is not a code stands for itself."""
    return next((f"{page.code} {page.name}" for page in pages() if page.code == subject), subject)
