"""What the trainings of replay.jsonl say: detection, repair, harm done, and each case that falls short."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

from scipy.stats import ttest_ind

from benchmarks.replay import ARMS, GRADIENT, Row, cases, networks, sick
from benchmarks.report import table
from gallery.autotrainer import autotrainer_facts, data, key
from gallery.case import Case

NAMES = {
    "none": "nothing",
    "selu": "blind: SELU, LeCun",
    "autotrainer": "AutoTrainer's rules and order",
    "lr": "learning rate alone, best of 4",
    "random": "random search, best of 4",
    "isograd": "isograd.repair",
    "judged": "isograd.repair, judged by 4 trainings",
}
CLOSE = 0.02
"""Two points: as close to the best healthy control as a repair must come."""
LOW = 0.6
"""AutoTrainer's own bar."""
EFFECT = 0.2
"""Smallest Cohen's d of a patch that counts (MLM4DNN)."""
SURE = 0.05
TELLING = 10
"""Trainings a side from which the test is made."""
AGREED = 0.9
"""Share of orders of the rows that must agree for a label to be one of the network and not of chance."""

ATLAS = {"dead_relus": "dying ReLU", "vanishing_gradients": "vanishing gradient", "exploding_init": "exploding gradient"}  # fmt: skip
LABELS = {"vanishing_gradient": "vanishing gradient", "exploding_gradient": "exploding gradient", "dying_relu": "dying ReLU"}  # fmt: skip

PAGE = Path(__file__).with_name("replay.md")
MARK = "<!-- what follows is written by `python -m benchmarks.replay save` -->"

Rows = dict[tuple[str, str], list[Row]]


def read(path: Path) -> Rows:
    """By case and arm, one row for each seed."""
    found: Rows = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        record = json.loads(line)
        if "result" in record:
            found[record["setting"]["case"], record["setting"]["arm"]] = record["result"]
    return found


def report(path: Path) -> str:
    """All tables for which something is there."""
    rows = read(path)
    parts = (_detection, _said, _repair, _problems, _harm, _labels, _short_networks, _short_cases)
    return "\n\n".join(text for part in parts if (text := part(rows)))


def saved(page: Path, text: str) -> str:
    """Put the tables into the page, below its mark; says so."""
    above = page.read_text().partition(MARK)[0]
    page.write_text(f"{above}{MARK}\n\n{text}\n")
    return f"written to {page.name}"


def _section(title: str, header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return f"## {title}\n\n{table(header, lines)}" if lines else ""


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.3f}" if whole else "-"


def _of(true: Iterable[bool]) -> str:
    values = list(true)
    return f"{sum(values)} of {len(values)}" if values else "-"


# -- detection -------------------------------------------------------------------------------------------


@cache
def _facts() -> dict[str, dict[str, Any]]:
    return {key(fact, 0).removesuffix(" #0"): fact for fact in autotrainer_facts()}


def problem(case: Case) -> str:
    """The published name of what is wrong with a case that training finds sick."""
    name = case.name.split(" #")[0]
    if case.family == "atlas":
        return ATLAS.get(name.removeprefix("atlas "), "inputs")
    if (fact := _facts().get(name)) is not None:
        label = next((LABELS[label] for label in fact["ground_truth"] if label in LABELS), "")
        return label or ("loss" if fact["ground_truth"] else "none published")
    if case.verdict == "broken":
        return "head or target"
    return "inputs" if case.codes else "other"


def disputed(case: Case, rows: Rows) -> bool:
    """Do other orders of the same rows, from the same initial weights, often come to another verdict?"""
    orders = rows.get((case.name, "orders"))
    if not orders:
        return False
    agreed = fmean((row["shows"] == "healthy") != case.sick for row in orders)
    return agreed < AGREED


def _detection(rows: Rows) -> str:
    """By published problem: is it found before training?"""
    asked = [(case, rows[case.name, "check"][0]) for case in cases().values() if (case.name, "check") in rows]
    kinds = sorted({problem(case) for case, _ in asked if case.sick} - set(LABELS.values()))
    gradient = set(LABELS.values())

    def line(name: str, among: set[str], settled: bool = False) -> list[str]:
        chosen = [(c, row) for c, row in asked if c.sick and problem(c) in among]
        chosen = [(c, row) for c, row in chosen if not (settled and disputed(c, rows))]
        hits = sum("miss" not in row["faults"] for _, row in chosen)
        right = sum(not row["faults"] for _, row in chosen)
        seconds = f"{fmean(row['seconds'] for _, row in chosen):.2f}" if chosen else "-"
        return [name, f"{hits} of {len(chosen)}", _share(hits, len(chosen)), f"{right} of {len(chosen)}", seconds]  # fmt: skip

    lines = [line(name, {name}) for name in sorted(gradient)]
    lines.append(line("all gradient problems", gradient))
    lines.append(line("… where the order of the rows does not decide", gradient, settled=True))
    lines += [line(name, {name}) for name in kinds]
    lines.append(line("all", gradient | set(kinds)))
    header = ["published problem", "found", "recall", "verdict and cause right", "s"]
    return _section("Detection, before training", header, lines) if asked else ""


def _said(rows: Rows) -> str:
    """By what is said: is something wrong with the network, by training?"""
    asked = [(case, rows[case.name, "check"][0]) for case in cases().values() if (case.name, "check") in rows]

    def line(name: str, said: Callable[[Row], bool]) -> list[str]:
        true = sum(said(row) for case, row in asked if case.sick and "miss" not in row["faults"])
        false = sum(said(row) for case, row in asked if not case.sick and "false alarm" in row["faults"])
        return [name, str(true), str(false), _share(true, true + false)]

    lines = [
        line("vanishing", lambda row: row["said"] == "vanishing"),
        line("exploding", lambda row: row["said"] == "exploding"),
        line("broken", lambda row: row["said"] == "broken"),
        line("healthy flow, with another error", lambda row: row["said"] == "healthy"),
        line("all", lambda row: True),
    ]
    well = sum(not case.sick for case, _ in asked)
    header = ["verdict", "of sick cases", f"of {well} healthy ones", "precision"]
    return _section("What is said, and is it so?", header, lines) if asked else ""


# -- repair ----------------------------------------------------------------------------------------------


def scores(runs: Sequence[Row]) -> list[float]:
    return [row["score"] for row in runs]


def control(rows: Rows, dataset: str) -> float:
    """Mean accuracy of the best network on the same data with no published problem; else what the gallery states."""
    means = [
        fmean(scores(rows[name, "none"]))
        for name, fact in networks().items()
        if fact["dataset"] == dataset and not fact["ground_truth"] and (name, "none") in rows
    ]
    return max(means, default=data(dataset).sound)


def fails(name: str, rows: Rows) -> bool:
    """Is there anything to repair?"""
    return fmean(scores(rows[name, "none"])) < control(rows, networks()[name]["dataset"]) - CLOSE


def effect(before: Sequence[float], after: Sequence[float]) -> tuple[float, float]:
    """Cohen's d of after over before, and p of Welch's test."""
    gain = fmean(after) - fmean(before)
    spread = math.sqrt((stdev(before) ** 2 + stdev(after) ** 2) / 2)
    if spread == 0:
        return (math.copysign(math.inf, gain) if gain else 0.0), float(gain == 0)
    return gain / spread, float(ttest_ind(after, before, equal_var=False).pvalue)  # type: ignore[union-attr]


def accepted(before: Sequence[float], after: Sequence[float]) -> bool:
    """Patched against unpatched: sure, and better by an effect that counts."""
    size, p = effect(before, after)
    return p < SURE and size >= EFFECT


def _paired(rows: Rows, arm: str, among: Callable[[str], bool]) -> list[str]:
    return [n for n in networks() if (n, arm) in rows and (n, "none") in rows and among(n)]


def _repair(rows: Rows) -> str:
    """On the networks with a gradient problem, by its label and by training."""
    lines: list[list[str]] = []
    for arm in ARMS:
        names = _paired(rows, arm, lambda n: sick(networks()[n]) and fails(n, rows))
        if not names:
            continue
        after = {n: scores(rows[n, arm]) for n in names}
        before = {n: scores(rows[n, "none"]) for n in names}
        goal = {n: control(rows, networks()[n]["dataset"]) for n in names}
        told = [n for n in names if min(len(after[n]), len(before[n])) >= TELLING]
        runs = [row for n in names for row in rows[n, arm]]
        lines.append(
            [
                NAMES[arm],
                f"{len(names)} x {min(map(len, after.values()))}",
                _of(fmean(after[n]) >= LOW for n in names),
                _of(fmean(after[n]) >= goal[n] - CLOSE for n in names),
                _of(score >= goal[n] - CLOSE for n in names for score in after[n]),
                f"{fmean(goal[n] - fmean(after[n]) for n in names):.3f}",
                f"{fmean(fmean(after[n]) - fmean(before[n]) for n in names):+.3f}",
                _of(accepted(before[n], after[n]) for n in told) if told else "n < 10",
                f"{median(effect(before[n], after[n])[0] for n in told):.1f}" if told else "-",
                f"{fmean(row['edits'] for row in runs):.1f}",
                f"{fmean(row['trainings'] for row in runs):.1f}",
                f"{fmean(row['seconds'] for row in runs):.2f}",
                f"{fmean(row.get('search_seconds', 0.0) for row in runs):.2f}",
            ]
        )
    header = ["what is done", "networks x seeds", ">= 0.6", "within 2 points", "runs within 2 points"]
    header += ["short of it", "gained", "accepted", "d", "changes", "trainings", "s training", "s search"]
    return _section("Repair of networks with a gradient problem", header, lines)


def _problems(rows: Rows) -> str:
    """Within two points of the best control, by published problem."""
    lines: list[list[str]] = []
    for arm in ARMS:
        names = _paired(rows, arm, lambda n: sick(networks()[n]) and fails(n, rows))
        close = {
            n: fmean(scores(rows[n, arm])) >= control(rows, networks()[n]["dataset"]) - CLOSE for n in names
        }
        cells = [
            _of(close[n] for n in names if label in networks()[n]["ground_truth"])
            for label in sorted(GRADIENT)
        ]
        lines += [[NAMES[arm], *cells]] if names else []
    return _section(
        "Within 2 points, by problem", ["what is done", *(LABELS[n] for n in sorted(GRADIENT))], lines
    )


def _harm(rows: Rows) -> str:
    """The gate: networks without a published gradient problem must not be the worse for it."""
    lines: list[list[str]] = []
    for arm in ARMS:
        names = _paired(rows, arm, lambda n: not sick(networks()[n]))
        if arm == "none" or not names:
            continue
        before = {n: scores(rows[n, "none"]) for n in names}
        after = {n: scores(rows[n, arm]) for n in names}
        told = [n for n in names if min(len(after[n]), len(before[n])) >= TELLING]
        lines.append(
            [
                NAMES[arm],
                str(len(names)),
                _of(row["edits"] > 0 for n in names for row in rows[n, arm]),
                _of(accepted(after[n], before[n]) for n in told) if told else "n < 10",
                _of(accepted(before[n], after[n]) for n in told) if told else "n < 10",
                f"{min(fmean(after[n]) - fmean(before[n]) for n in names):+.3f}",
                f"{fmean(fmean(after[n]) - fmean(before[n]) for n in names):+.3f}",
            ]
        )
    header = ["what is done", "networks", "runs changed", "surely worse", "surely better"]
    header += ["largest loss", "mean"]
    return _section("Networks with no published gradient problem", header, lines)


# -- what falls short ------------------------------------------------------------------------------------


def _labels(rows: Rows) -> str:
    """Networks whose published label is not what ten seeds show."""
    lines: list[list[str]] = []
    for name, fact in networks().items():
        if (name, "none") not in rows or bool(fact["ground_truth"]) == fails(name, rows):
            continue
        own, goal = scores(rows[name, "none"]), control(rows, fact["dataset"])
        short = _of(score < goal - CLOSE for score in own)
        label = ", ".join(fact["ground_truth"]) or "no problem"
        lines.append([name, label, f"{fmean(own):.3f} for {goal:.3f}", short, f"{min(own):.2f} … {max(own):.2f}"])  # fmt: skip
    header = ["network", "published", "untreated, and the best control", "seeds short", "range"]
    return _section("Labels that ten seeds do not bear out", header, lines)


def _short_networks(rows: Rows) -> str:
    """Networks that isograd does not bring to the best control, and others that it changes."""
    lines: list[list[str]] = []
    for name in _paired(rows, "isograd", lambda _: True):
        fact, runs = networks()[name], rows[name, "isograd"]
        goal, mean = control(rows, fact["dataset"]), fmean(scores(runs))
        before = fmean(scores(rows[name, "none"]))
        changed = [row for row in runs if row["edits"]]
        if sick(fact) and fails(name, rows) and mean < goal - CLOSE:
            what = f"{before:.3f} to {mean:.3f} for {goal:.3f}"
        elif not sick(fact) and changed:
            what = f"no gradient problem published, {before:.3f} to {mean:.3f}"
        else:
            continue
        said = sorted({row["said"] for row in changed} or {"nothing done"})
        lines.append([name, what, _of(row["edits"] > 0 for row in runs), _counted(r["verdict"] for r in runs), "; ".join(said)[:100]])  # fmt: skip
    header = ["network", "accuracy", "seeds changed", "verdicts", "what was done"]
    return _section("What falls short: repair", header, lines)


def _counted(values: Iterable[str]) -> str:
    found = list(values)
    return ", ".join(f"{value} {found.count(value)}" for value in sorted(set(found)))


def _short_cases(rows: Rows) -> str:
    """Cases misjudged, with what other orders of the same rows show of the label."""
    lines: list[list[str]] = []
    for name, case in cases().items():
        row = rows.get((name, "check"), [None])[0]
        if row is None or not row["faults"]:
            continue
        orders = rows.get((name, "orders"), [])
        shown = _of(order["shows"] == "sick" for order in orders)
        lines.append(
            [name, ", ".join(row["faults"]), row["said"], ", ".join(row["codes"]), shown, case.truth]
        )
    header = ["case", "what", "verdict", "codes", "orders of rows that fail", "truth"]
    return _section("What falls short: detection", header, lines)
