"""The tables: what the cases are, who restores them, and every case that isograd does not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from statistics import fmean

from scipy.stats import wilcoxon

from benchmarks.report import table
from benchmarks.twins.arms import DRAWS, RATES
from benchmarks.twins.case import Case
from benchmarks.twins.cases import cases
from benchmarks.twins.results import RESTORED, Store

FEW = 6
"""Paired cases below which no test can tell anything (6 alike give p = .03)."""

ARMS = {
    "fault": "nothing",
    "isograd": "isograd.repair",
    "judged": f"isograd.repair, judged by {DRAWS} trainings",
    "selu": "blind: SELU, LeCun",
    "he": "blind: ReLU, He",
    "layernorm": "blind: LayerNorm",
    "random": f"random search, best of {DRAWS}",
    "lr": f"learning rate alone, best of {len(RATES)}",
}


def report(store: Store | None = None) -> str:
    """All parts of which anything was run."""
    store = store or Store()
    truth = {case.name: store.truth(case) for case in cases()}
    parts = [
        _ground_truth(store, truth),
        _detection(store, truth),
        _repair(store, truth),
        _harm(store),
        _short(store, truth),
    ]
    return "\n\n".join(part for part in parts if part)


def _by_family() -> Iterator[tuple[str, list[Case]]]:
    for family in dict.fromkeys(case.family for case in cases()):
        yield family, [case for case in cases() if case.family == family]


def _ground_truth(store: Store, truth: dict[str, str]) -> str:
    words = ("sick", "harmless", "border", "unusable", "unknown")
    rows: list[list[str]] = []
    for family, found in [*_by_family(), ("all", list(cases()))]:
        for name, group in (
            ("fault", [c for c in found if c.kind != "decoy"]),
            ("decoy", [c for c in found if c.kind == "decoy"]),
        ):
            counts = Counter(truth[case.name] for case in group)
            if group:
                rows.append([f"{family}, {name}", str(len(group)), *(str(counts[word]) for word in words)])
    return "## What training both twins shows\n\n" + table(["planted", "cases", *words], rows)


def _detection(store: Store, truth: dict[str, str]) -> str:
    rows: list[list[str]] = []
    for family, found in [*_by_family(), ("all", list(cases()))]:
        sick = [r for c in found if truth[c.name] == "sick" for r in store.of(c, "check").values()]
        models = {c.name.split(" / ")[0]: c for c in found}
        well = [r for c in models.values() for r in store.of(c, "twin check").values()]
        well += [r for c in found if c.kind == "decoy" for r in store.of(c, "check").values()]
        if not sick or not well:
            continue
        hit = sum(r["verdict"] != "healthy" for r in sick)
        false = sum(r["verdict"] != "healthy" for r in well)
        precision = f"{hit / (hit + false):.3f}" if hit + false else "-"
        seconds = fmean(r["seconds"] for r in sick)
        rows.append(
            [
                family,
                f"{hit} of {len(sick)}",
                f"{hit / len(sick):.3f}",
                f"{false} of {len(well)}",
                precision,
                f"{seconds:.2f}",
            ]
        )
    header = ["family", "sick found", "recall", "healthy accused", "precision", "seconds"]
    return "## Detection, before any training\n\n" + table(header, rows) if rows else ""


def _repair(store: Store, truth: dict[str, str]) -> str:
    sick = [case for case in cases() if truth[case.name] == "sick"]
    ours = {case.name: _lead(store, case, "isograd") for case in sick if store.of(case, "isograd")}
    rows: list[list[str]] = []
    for arm, name in ARMS.items():
        done = [case for case in sick if store.of(case, arm)]
        if not done:
            continue
        restored = [case for case in done if store.restored(case, arm)]
        lead = {case.name: _lead(store, case, arm) for case in done}
        runs = [row for c in done for row in store.of(c, arm).values()]
        rows.append(
            [
                name,
                str(len(done)),
                f"{len(restored)} ({len(restored) / len(done):.0%})",
                f"{fmean(lead.values()):.2f}",
                "" if arm == "isograd" else _beaten(ours, lead),
                f"{fmean(store.scores(c, arm).mean - store.scores(c, 'fault').mean for c in done):+.3f}",
                f"{fmean(row['edits'] for row in runs):.1f}",
                f"{fmean(row['search_seconds'] for row in runs):.1f}",
            ]
        )
    header = ["what is done", "sick cases", "restored", "share of the lead", "isograd better, worse (p)"]
    header += ["gain", "edits", "search s"]
    return "## Repair, judged by training\n\n" + table(header, rows) if rows else ""


def _lead(store: Store, case: Case, arm: str) -> float:
    """Share of the healthy twin's lead over guessing that an arm reaches."""
    chance = case.task().chance
    return (store.scores(case, arm).mean - chance) / (store.scores(case, "twin").mean - chance)


def _beaten(ours: dict[str, float], theirs: dict[str, float]) -> str:
    """Cases in which isograd reaches more, or less, by a tenth of the lead; p of Wilcoxon's test over all."""
    apart = [ours[name] - theirs[name] for name in ours.keys() & theirs.keys()]
    if len(apart) < FEW:
        return ""
    better, worse = sum(d > RESTORED for d in apart), sum(d < -RESTORED for d in apart)
    p = float(wilcoxon(apart).pvalue) if any(apart) else 1.0  # type: ignore[union-attr]
    return f"{better}, {worse} ({'< .001' if p < 0.001 else f'{p:.3f}'})"


def _harm(store: Store) -> str:
    """What each arm does to models that are well."""
    models = {case.name.split(" / ")[0]: case for case in cases()}
    rows: list[list[str]] = []
    for arm in ("isograd", "judged", "selu", "layernorm"):
        done = [case for case in models.values() if store.of(case, f"twin {arm}")]
        if not done:
            continue
        touched = sum(row["edits"] > 0 for c in done for row in store.of(c, f"twin {arm}").values())
        runs = sum(len(store.of(c, f"twin {arm}")) for c in done)
        changed = [c for c in done if any(row["edits"] for row in store.of(c, f"twin {arm}").values())]
        worse = [case for case in changed if store.restored(case, f"twin {arm}") is False]
        names = ", ".join(case.name.split(" / ")[0] for case in worse)
        rows.append(
            [ARMS[arm], str(len(done)), f"{touched} of {runs}", str(len(worse)), names if worse else ""]
        )
    header = ["what is done", "healthy models", "runs touched", "made worse", "which"]
    return "## Harm to healthy twins\n\n" + table(header, rows) if rows else ""


def _short(store: Store, truth: dict[str, str]) -> str:
    """Sick cases that isograd does not restore, and healthy ones that it touches: one by one."""
    rows: list[list[str]] = []
    for case in cases():
        runs = store.of(case, "isograd")
        if truth[case.name] == "sick" and runs and not store.restored(case, "isograd"):
            said = Counter(row["said"] for row in runs.values()).most_common(1)[0][0]
            verdicts = Counter(row.get("verdict", "?") for row in runs.values()).most_common(1)[0][0]
            rows.append(
                [
                    case.name,
                    _shown(store, case, "twin"),
                    _shown(store, case, "fault"),
                    _shown(store, case, "isograd"),
                    verdicts,
                    said[:60],
                ]
            )
    header = ["case", "twin", "fault", "repaired", "verdict", "what was done"]
    return "## What isograd does not restore\n\n" + table(header, rows) if rows else ""


def _shown(store: Store, case: Case, arm: str) -> str:
    scores = store.scores(case, arm)
    return f"{scores.mean:.2f} ± {scores.spread:.2f}" if len(scores.by_seed) > 1 else f"{scores.mean:.2f}"
