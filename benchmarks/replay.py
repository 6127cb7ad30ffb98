"""Published training problems, replayed: python -m benchmarks.replay [run ARM …|table|forget ARM …] [--every N] [--seeds N]

`run` adds to replay.jsonl what is not yet in it, and can be stopped and started at any time. ARM is 'check' (is it
detected, before training?), 'none', 'isograd', 'autotrainer', 'selu', 'random' or 'lr'; all by default. `table`
prints what is there, `forget isograd` drops what an older isograd did. Detection covers all published cases of the gallery; repair the networks of AutoTrainer's
benchmark whose data can be made here in full (circle and blob), with its 300 epochs of Adam.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections import defaultdict
from functools import cache
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from scipy.stats import ttest_ind

from benchmarks.autotrainer import SELU, Recipe, Watched, activation, initialiser, repaired, trained
from benchmarks.report import table
from benchmarks.twins.results import forget
from gallery.autotrainer import Data, autotrainer_build, autotrainer_facts, data, key
from gallery.case import Case
from gallery.cases import published
from gallery.keras_net import Spec, loss_of
from gallery.zoo import graded
from isograd import trials
from isograd.repair import repair

RESULTS = Path(__file__).with_name("replay.jsonl")
EPOCHS = 300
SEEDS = 10
ARMS = ("none", "isograd", "autotrainer", "selu", "random", "lr")
NAMES = {
    "none": "nothing",
    "isograd": "isograd.repair",
    "autotrainer": "AutoTrainer's rules and order",
    "selu": "blind: SELU, LeCun",
    "random": "random search, best of 4",
    "lr": "learning rate alone, best of 4",
}
RATES = (0.03, 0.1, 0.3, 3.0)
DRAWS = 4
CLOSE = 0.02
"""Two points: as close to the best healthy control as a repair must come."""
LOW = 0.6
"""AutoTrainer's own bar."""
EFFECT = 0.2
"""Smallest Cohen's d of a patch that counts (MLM4DNN)."""
TELLING = 10
"""Trainings a side from which the test is made."""

Row = dict[str, Any]


@cache
def networks() -> dict[str, Spec]:
    """The networks on circle and blob, by name."""
    return {_name(fact): fact for fact in autotrainer_facts() if fact["dataset"] in ("circle", "blob")}


def _name(fact: Spec) -> str:
    return key(fact, 0).removesuffix(" #0")


GRADIENT = {"vanishing_gradient", "exploding_gradient", "dying_relu"}


def sick(fact: Spec) -> bool:
    """Does the published label name a gradient problem? Rates and losses that oscillate are others."""
    return fact["role"] == "buggy" and bool(GRADIENT & set(fact["ground_truth"]))


@cache
def _published() -> dict[str, Case]:
    return {case.name: case for case in published()}


# -- one trial ------------------------------------------------------------------------------------------


def attempt(setting: Row) -> Row:
    """Check a case, or treat a network and train it."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    if setting["arm"] == "check":
        grade = graded(_published()[setting["case"]])
        return {
            "said": grade.said,
            "faults": list(grade.faults),
            "codes": list(grade.codes),
            "cause": grade.cause,
            "seconds": round(grade.seconds, 3),
        }
    fact, seed, epochs = networks()[setting["case"]], setting["seed"], setting["epochs"]
    recipe, found = Recipe(fact["layers"], fact["loss"]), data(fact["dataset"])
    started = time.perf_counter()
    match setting["arm"]:
        case "none":
            seen, did = trained(recipe, found, seed, epochs), {"trainings": 1, "edits": 0}
        case "isograd":
            seen, did = _isograd(fact, recipe, found, seed, epochs)
        case "autotrainer":
            tries = list(repaired(recipe, found, seed, epochs))
            recipe, seen = tries[-1]
            did = {
                "trainings": len(tries),
                "alarm": tries[0][1].problem,
                "alarm_epoch": tries[0][1].at,
                "silent": not seen.problem,
                "edits": _changed(fact["layers"], recipe.layers),
            }
        case "selu":
            changed = SELU(recipe)
            seen = trained(changed, found, seed, epochs)
            did = {"trainings": 1, "edits": _changed(fact["layers"], changed.layers)}
        case _:
            seen, did = _searched(setting["arm"], fact, recipe, found, seed, epochs)
    return {"score": round(seen.final, 4), "seconds": round(time.perf_counter() - started, 1), **did}


def _isograd(fact: Spec, recipe: Recipe, found: Data, seed: int, epochs: int) -> tuple[Watched, Row]:
    model, _ = autotrainer_build(fact, seed)
    loss = loss_of(fact["loss"])
    x, y = found.x[: recipe.batch], found.y[: recipe.batch]
    started = time.perf_counter()
    answer = repair(model.train(), lambda m: loss(m(x), y))
    search = time.perf_counter() - started
    rx = answer.prescription
    seen = trained(recipe, found, seed, epochs, model=answer.model)
    return seen, {
        "trainings": 1,
        "edits": 0 if rx is None else len(rx.edits),
        "said": "" if rx is None else rx.title,
        "verdict": answer.before.verdict,
        "cured": answer.cured,
        "search_seconds": round(search, 2),
    }


def _searched(
    arm: str, fact: Spec, recipe: Recipe, found: Data, seed: int, epochs: int
) -> tuple[Watched, Row]:
    """The best of four by accuracy on the training rows, which is all that a user would choose by."""
    tries: list[tuple[Watched, int]] = []
    for number in range(DRAWS):
        changed = (
            _drawn(recipe, f"{fact['case_id']} {seed} {number}") if arm == "random" else _rate(recipe, number)
        )
        edits = _changed(fact["layers"], changed.layers)
        tries.append((trained(changed, found, seed, epochs), edits))
    seen, edits = max(tries, key=lambda pair: max(pair[0].train, default=0.0))
    return seen, {"trainings": DRAWS, "edits": edits}


def _rate(recipe: Recipe, number: int) -> Recipe:
    return Recipe(recipe.layers, recipe.loss, lr=recipe.lr * RATES[number])


def _drawn(recipe: Recipe, seed: str) -> Recipe:
    """One or two changes: an activation with an initialiser, an initialiser alone, the learning rate."""
    choice = random.Random(seed)
    kernels = ("he_uniform", "glorot_uniform", "lecun_uniform", "he_normal")
    for kind in choice.sample(("activation", "initialiser", "rate"), choice.randint(1, 2)):
        if kind == "activation":
            name = choice.choice(("relu", "sigmoid", "tanh", "elu", "selu"))
            recipe = activation(name, choice.choice(kernels))(recipe)
        elif kind == "initialiser":
            recipe = initialiser(choice.choice(kernels))(recipe)
        else:
            recipe = Recipe(recipe.layers, recipe.loss, lr=10 ** choice.uniform(-4, -1))
    return recipe


def _changed(before: list[Spec], after: list[Spec]) -> int:
    """Layers that differ or are new."""
    same = sum(json.dumps(spec) in {json.dumps(old) for old in before} for spec in after)
    return max(len(after) - same, 0)


# -- what is there -----------------------------------------------------------------------------------------


def _rows() -> dict[tuple[str, str], dict[int, Row]]:
    found: dict[tuple[str, str], dict[int, Row]] = defaultdict(dict)
    for line in RESULTS.read_text().splitlines() if RESULTS.exists() else ():
        record = json.loads(line)
        if "result" in record:
            setting = record["setting"]
            found[setting["case"], setting["arm"]][setting["seed"]] = record["result"]
    return found


def report() -> str:
    """Detection, repair, and each case that falls short."""
    rows = _rows()
    return "\n\n".join(part for part in (_detection(rows), _repair(rows), _short(rows)) if part)


def _detection(rows: dict[tuple[str, str], dict[int, Row]]) -> str:
    """By family of published cases: what `isograd.check` says before training."""
    lines: list[list[str]] = []
    families = sorted({case.family for case in _published().values()})
    for family in (*families, "all"):
        asked = [
            (case, rows[case.name, "check"][0])
            for case in _published().values()
            if family in ("all", case.family) and (case.name, "check") in rows
        ]
        ill = [row for case, row in asked if case.sick]
        well = [row for case, row in asked if not case.sick]
        if not asked:
            continue
        hit = sum("miss" not in row["faults"] for row in ill)
        false = sum("false alarm" in row["faults"] for row in well)
        cause = sum(
            not {"wrong cause", "wrong verdict", "wrong code", "miss"} & set(row["faults"]) for row in ill
        )
        seconds = fmean(row["seconds"] for _, row in asked)
        counts = [f"{hit} of {len(ill)}", f"{false} of {len(well)}"]
        shares = [_share(hit, len(ill)), _share(hit, hit + false)]
        lines.append([family, *counts, *shares, f"{cause} of {len(ill)}", f"{seconds:.2f}"])
    header = [
        "published cases",
        "found",
        "false alarms",
        "recall",
        "precision",
        "verdict and cause right",
        "s",
    ]
    return "## Detection\n\n" + table(header, lines) if lines else ""


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.3f}" if whole else "-"


def control(rows: dict[tuple[str, str], dict[int, Row]], dataset: str) -> float:
    """Mean accuracy of the best healthy network of the same data; what the gallery states where none was trained."""
    means = [
        fmean(row["score"] for row in rows[name, "none"].values())
        for name, fact in networks().items()
        if fact["dataset"] == dataset
        and not sick(fact)
        and not fact["ground_truth"]
        and (name, "none") in rows
    ]
    return max(means, default=data(dataset).sound)


def _repair(rows: dict[tuple[str, str], dict[int, Row]]) -> str:
    lines: list[list[str]] = []
    for arm in ARMS:
        done = {n: rows[n, arm] for n, fact in networks().items() if sick(fact) and (n, arm) in rows}
        paired = {n: r for n, r in done.items() if (n, "none") in rows}
        if not paired:
            continue
        goal = {n: control(rows, networks()[n]["dataset"]) for n in paired}
        scores = {n: _scores(r) for n, r in paired.items()}
        before = {n: _scores(rows[n, "none"]) for n in paired}
        tested = [n for n in paired if min(len(scores[n]), len(before[n])) >= TELLING]
        runs = [row for r in paired.values() for row in r.values()]
        lines.append(
            [
                NAMES[arm],
                f"{len(paired)} x {max(map(len, scores.values()))}",
                _of(fmean(scores[n]) >= LOW for n in paired),
                _of(fmean(scores[n]) >= goal[n] - CLOSE for n in paired),
                f"{fmean(goal[n] - fmean(scores[n]) for n in paired):.3f}",
                f"{fmean(fmean(scores[n]) - fmean(before[n]) for n in paired):+.3f}",
                _of(_accepted(before[n], scores[n]) for n in tested) if tested else "n < 10",
                f"{fmean(row['edits'] for row in runs):.1f}",
                f"{fmean(row['trainings'] for row in runs):.1f}",
            ]
        )
    header = [
        "what is done",
        "networks x seeds",
        ">= 0.6",
        "within 2 points of the best control",
        "short of it by",
    ]
    header += ["gained", "accepted by the test", "edits", "trainings"]
    return "## Repair of AutoTrainer's networks\n\n" + table(header, lines) if lines else ""


def _scores(runs: dict[int, Row]) -> list[float]:
    return [row["score"] for row in runs.values()]


def _of(true: Any) -> str:
    values = list(true)
    return f"{sum(values)} of {len(values)}"


def _accepted(before: list[float], after: list[float]) -> bool:
    """Patched against unpatched: p < .05 and an effect, in the right direction."""
    spread = ((stdev(before) ** 2 + stdev(after) ** 2) / 2) ** 0.5
    if spread == 0:
        return after[0] > before[0]
    p = float(ttest_ind(after, before, equal_var=False).pvalue)  # type: ignore[union-attr]
    return p < 0.05 and (fmean(after) - fmean(before)) / spread >= EFFECT


def _short(rows: dict[tuple[str, str], dict[int, Row]]) -> str:
    """Networks that isograd does not bring to the best control, healthy ones that it changes, cases misjudged."""
    lines: list[list[str]] = []
    for name, fact in networks().items():
        runs = rows.get((name, "isograd"))
        if not runs:
            continue
        score, goal = fmean(_scores(runs)), control(rows, fact["dataset"])
        first = next(iter(runs.values()))
        touched = sum(row["edits"] > 0 for row in runs.values())
        if sick(fact) and score < goal - CLOSE:
            lines.append(
                [name, f"{score:.3f} for {goal:.3f}", first["verdict"], first["said"][:70] or "nothing done"]
            )
        elif not sick(fact) and touched:
            lines.append(
                [
                    name,
                    f"no gradient fault, changed on {touched} of {len(runs)} seeds",
                    first["verdict"],
                    first["said"][:70],
                ]
            )
    for name in _published():
        if (row := rows.get((name, "check"), {}).get(0)) and row["faults"]:
            lines.append([name, ", ".join(row["faults"]), row["said"], ", ".join(row["codes"])])
    return "## What falls short\n\n" + table(["case", "what", "verdict", "said"], lines) if lines else ""


# -- command -----------------------------------------------------------------------------------------------


def settings(arm: str, seeds: int, epochs: int, every: int) -> list[Row]:
    if arm == "check":
        return [{"case": name, "arm": arm, "seed": 0} for name in list(_published())[::every]]
    names = list(networks())[::every]
    return [{"case": n, "arm": arm, "seed": seed, "epochs": epochs} for seed in range(seeds) for n in names]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.replay",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("verb", choices=("run", "table", "forget"))
    parser.add_argument("arms", nargs="*", metavar="ARM")
    parser.add_argument("--every", type=int, default=1, help="each n-th case only: a slice")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    options = parser.parse_args()
    if options.verb == "table":
        print(report())
        return
    if options.verb == "forget":
        print(f"{forget(RESULTS, options.arms)} results forgotten")
        return
    for arm in options.arms or ("check", *ARMS):

        def progress(done: int, all_: int, arm: str = arm) -> None:
            print(f"\r{arm}: {done} of {all_}", end="", file=sys.stderr, flush=True)

        wanted = settings(arm, options.seeds, options.epochs, options.every)
        found = trials.run(attempt, wanted, map=map, store=RESULTS, progress=progress)
        failed = [result for result in found if isinstance(result, trials.Failed)]
        print(f", {len(failed)} failed: {failed[0].error}" if failed else "", file=sys.stderr)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\ninterrupted: what was done is kept, the same command goes on")
