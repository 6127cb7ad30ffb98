"""The trainings that were done, and what they say: is a fault one, and is it repaired?"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Literal

from scipy.stats import ttest_ind

from benchmarks.twins.arms import CHOOSING_SEED
from benchmarks.twins.case import Case
from benchmarks.twins.cases import cases
from benchmarks.twins.trial import model_of, recipe

RESULTS = Path(__file__).with_name("results.jsonl")

SICK = 0.2
"""Share of the twin's lead over guessing that a fault must take to be called one."""
HARMLESS = 0.1
"""Share up to which it is called harmless; what lies between is neither."""
SURE = 0.05
"""Largest p of Welch's test at which the two differ."""
RESTORED = 0.1
"""Share of the twin's lead within which a repaired model counts as restored (2 points where it is less)."""
POINTS = 0.02

LEAD = 0.05
"""Smallest lead of a twin over guessing from which anything can be told."""

Truth = Literal["sick", "harmless", "border", "unusable", "unknown"]
Row = dict[str, Any]


@dataclass(frozen=True)
class Scores:
    """Held-out scores of one arm of one case, by seed."""

    by_seed: dict[int, float]

    @property
    def values(self) -> list[float]:
        return list(self.by_seed.values())

    @property
    def mean(self) -> float:
        return fmean(self.values) if self.by_seed else math.nan

    @property
    def spread(self) -> float:
        return stdev(self.values) if len(self.by_seed) > 1 else math.nan


class Store:
    """What results.jsonl holds, by case and arm."""

    def __init__(self, path: Path = RESULTS) -> None:
        self.rows: dict[tuple[str, str], dict[int, Row]] = defaultdict(dict)
        recipes = {name: recipe(case) for case in cases() for name in (model_of(case), case.name)}
        for line in path.read_text().splitlines() if path.exists() else ():
            record = json.loads(line)
            setting = record["setting"]
            current = setting["recipe"] == recipes.get(setting["case"])
            if "result" in record and setting["seed"] < CHOOSING_SEED and current:
                self.rows[setting["case"], setting["arm"]][setting["seed"]] = record["result"]

    def of(self, case: Case, arm: str) -> dict[int, Row]:
        return self.rows[model_of(case) if arm.startswith("twin") else case.name, arm]

    def scores(self, case: Case, arm: str) -> Scores:
        return Scores({seed: row["score"] for seed, row in sorted(self.of(case, arm).items())})

    def truth(self, case: Case) -> Truth:
        """What training both twins shows of the fault."""
        twin, fault = self.scores(case, "twin"), self.scores(case, "fault")
        if len(twin.by_seed) < 3 or len(fault.by_seed) < 3:
            return "unknown"
        lead = twin.mean - case.task().chance
        if lead < LEAD or twin.spread > lead / 2:
            return "unusable"
        lost = (twin.mean - fault.mean) / lead
        if lost <= HARMLESS:
            return "harmless"
        sure = differ(twin.values, fault.values) < SURE
        return "sick" if lost >= SICK and sure else "border"

    def restored(self, case: Case, arm: str) -> bool | None:
        """Is the mean of the arm within the bar of its healthy twin's? None: not run."""
        twin, found = self.scores(case, "twin"), self.scores(case, arm)
        if not found.by_seed:
            return None
        same = [twin.by_seed[seed] for seed in found.by_seed]
        return found.mean >= fmean(same) - max(POINTS, RESTORED * (twin.mean - case.task().chance))


def forget(path: Path, arms: Iterable[str]) -> int:
    """Drop the results of some arms, as when what they measure has changed. Returns how many."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    dropped = set(arms)
    kept = [line for line in lines if json.loads(line)["setting"]["arm"] not in dropped]
    path.write_text("".join(kept))
    return len(lines) - len(kept)


def differ(first: list[float], second: list[float]) -> float:
    """p of Welch's test; 0 or 1 where neither varies."""
    if len(set(first)) == 1 and len(set(second)) == 1:
        return float(first[0] == second[0])
    return float(ttest_ind(first, second, equal_var=False).pvalue)  # type: ignore[union-attr]
