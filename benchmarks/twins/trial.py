"""One training of one arm, as a setting of plain values: what `isograd.trials` keeps and resumes."""

from __future__ import annotations

import time
from functools import cache
from typing import Any

import torch

import isograd
from benchmarks.twins.arms import BLIND, Arm, at_rate, drawn, judged, untreated, with_isograd
from benchmarks.twins.case import Case, train
from benchmarks.twins.cases import cases

SEEDS = 5
Setting = dict[str, Any]


@cache
def _by_name() -> dict[str, Case]:
    return {case.name: case for case in cases()}


@cache
def _first_of() -> dict[str, Case]:
    """Cases of the same model share their healthy twin: the first stands for all."""
    found: dict[str, Case] = {}
    for case in cases():
        found.setdefault(model_of(case), case)
    return found


def model_of(case: Case) -> str:
    return case.name.split(" / ")[0]


def setting(case: Case, arm: str, seed: int, **choice: float) -> Setting:
    """`arm` 'twin' trains the healthy model, 'twin <arm>' treats it first; all others start from the fault."""
    name = model_of(case) if arm.startswith("twin") else case.name
    return {"case": name, "arm": arm, "seed": seed, "recipe": recipe(case), **choice}


def recipe(case: Case) -> str:
    """How a case is trained; what was trained otherwise does not count."""
    return f"{case.optimizer} {case.lr:g} x {case.steps}"


def attempt(setting: Setting) -> dict[str, Any]:
    """Build, treat, train. Returns the score and what was done, for the store."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    name, _, rest = str(setting["arm"]).partition(" ")
    on_twin = name == "twin"
    case = _first_of()[setting["case"]] if on_twin else _by_name()[setting["case"]]
    seed = int(setting["seed"])
    model = case.build(seed, faulty=not on_twin).train()
    if (rest if on_twin else name) == "check":
        return _checked(case, model, seed)
    treated = _arm(rest or "twin" if on_twin else name, setting)(case, model, seed)
    started = time.perf_counter()
    score = train(case, treated.model, seed, lr_scale=treated.lr_scale, clip=treated.clip)
    return {
        "score": round(score, 4),
        "seconds": round(time.perf_counter() - started, 2),
        "search_seconds": round(treated.seconds, 2),
        "said": treated.said,
        "edits": treated.edits,
        **treated.facts,
    }


def _arm(name: str, setting: Setting) -> Arm:
    if name in BLIND:
        return BLIND[name]
    match name:
        case "fault" | "twin":
            return untreated
        case "isograd":
            return with_isograd
        case "judged":
            return judged(faulty=not setting["arm"].startswith("twin"))
        case "random":
            return drawn(int(setting["draw"]))
        case "lr":
            return at_rate(float(setting["scale"]))
        case _:
            raise ValueError(f"no arm is called {name!r}")


def _checked(case: Case, model: torch.nn.Module, seed: int) -> dict[str, Any]:
    """The diagnosis alone, without any training."""
    started = time.perf_counter()
    diagnosis = isograd.check(model, case.loss(seed))
    return {
        "verdict": diagnosis.verdict,
        "codes": [finding.code for finding in diagnosis.errors],
        "causes": sorted({str(f.evidence.get("cause", "")) for f in diagnosis.errors}),
        "seconds": round(time.perf_counter() - started, 2),
    }
