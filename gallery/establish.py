"""Establish the truth of every case by training it, beside its twin if it has one: python -m gallery.establish

Each result goes to truth.json as soon as it is there; a second call goes on with what is missing.
`--only PATTERN` narrows to names that match; `--again` forgets their results first.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import torch
import transformers
from torch import nn

from gallery.autotrainer import autotrainer_facts, autotrainer_trained, key, shows
from gallery.case import Case
from gallery.forum import named, program_trained, settled
from gallery.healthy import healthy
from gallery.published import SEEDS
from gallery.sick import trials
from gallery.sick_values import observed, value_cases
from gallery.training import Outcome, Setting, best_of, train
from gallery.trial import BEYOND_TRAINING, TRUTH, Trial, evidence, exact_decades, judged

ENOUGH = 0.9
"""Share of the way from chance to a perfect score at which a training has shown that it works."""

Record = dict[str, Any]


def scores(trial: Trial, *, faulty: bool) -> dict[str, Outcome]:
    """The best score of the faulty network, or of its twin, for each family of optimizers."""
    make, loss = (trial.make, trial.loss) if faulty else (trial.twin.make, trial.twin.loss)
    task = (trial.faulty_task or trial.task)() if faulty else trial.task()
    enough = task.chance + ENOUGH * (1 - task.chance)

    def run(setting: Setting, seed: int) -> float:
        return train(
            make,
            task,
            setting,
            seed=seed,
            steps=trial.steps,
            enough=enough,
            loss=loss,
            score=trial.score,
            every=max(10, trial.steps // 10),
        )

    return {name: best_of(run, grid, seeds=2, enough=enough) for name, grid in trial.optimizers.items()}


def by_training(trial: Trial, twins: dict[str, Record]) -> Record:
    """Train the trial and, once for all that share it, its twin."""
    key = f"{trial.twin.name} / {trial.task().name} / {trial.grids} / {trial.steps}"
    if key not in twins:
        twins[key] = {name: asdict(outcome) for name, outcome in scores(trial, faulty=False).items()}
    twin_scores = {name: outcome["score"] for name, outcome in twins[key].items()}
    found = {name: asdict(outcome) for name, outcome in scores(trial, faulty=True).items()}
    chance = trial.task().chance
    verdict = judged({name: outcome["score"] for name, outcome in found.items()}, twin_scores, chance)
    return {"verdict": verdict, **found, "twin": key, "twin_scores": twin_scores, "chance": chance}


def by_product(trial: Trial) -> Record:
    """The exact product of gradients, in float64, mean over three seeds."""
    decades: list[float] = []
    for seed in range(3):
        torch.manual_seed(seed)
        model = trial.make()
        assert isinstance(model, nn.Sequential)
        decades.append(exact_decades(model, *trial.task().held_out))
    mean = sum(decades) / len(decades)
    return {"verdict": "sick" if abs(mean) > BEYOND_TRAINING else "border", "decades": mean, "seeds": decades}


FITTED = 0.5
"""Share of its first loss below which a model has shown that its gradient teaches it its batch."""
FITS = (*(Setting("adamw", lr) for lr in (1e-3, 3e-3, 1e-2, 3e-4, 1e-4)), Setting("sgd", 0.1))


def by_fitting(case: Case, steps: int = 250) -> Record:
    """Train a healthy case on its own batch until its loss is halved."""
    fitted: list[tuple[float, str]] = []
    first = math.nan
    for setting in FITS:
        model, loss = case.build()
        optimizer = setting.attach(model)
        first = value = loss(model).item()
        lowest = math.inf
        for _ in range(steps):
            optimizer.zero_grad()
            total = loss(model)
            total.backward()
            optimizer.step()
            value = total.item()
            if not math.isfinite(value):
                break
            lowest = min(lowest, value)
            if lowest < FITTED * first:
                break
        fitted.append((lowest, str(setting)))
        if lowest < FITTED * first:
            break
    lowest, setting = min(fitted)
    verdict = "healthy" if lowest < FITTED * first else "border"
    return {"verdict": verdict, "first_loss": first, "lowest_loss": lowest, "setting": setting}


def _read() -> dict[str, Record]:
    return {"twins": {}} | (json.loads(TRUTH.read_text()) if TRUTH.exists() else {})


def work() -> Iterator[tuple[str, Callable[[dict[str, Record]], Record]]]:
    """Everything to be established: its name, and how."""

    def by_trial(trial: Trial) -> Callable[[dict[str, Record]], Record]:
        return lambda twins: by_product(trial) if trial.grids == "exact" else by_training(trial, twins)

    def by_looking(case: Case) -> Callable[[dict[str, Record]], Record]:
        return lambda _: observed(case)

    def program(name: str, spec: dict[str, Any]) -> Callable[[dict[str, Record]], Record]:
        return lambda _: program_trained(spec, name)

    def published(fact: dict[str, Any], seed: int) -> Callable[[dict[str, Record]], Record]:
        def run(_: dict[str, Record]) -> Record:
            accuracy = autotrainer_trained(fact, seed)
            return {"verdict": shows(fact, accuracy), "accuracy": accuracy}

        return run

    def by_own_batch(case: Case) -> Callable[[dict[str, Record]], Record]:
        return lambda _: by_fitting(case)

    yield from ((case.name, by_own_batch(case)) for case in healthy() if case.family != "unit")
    yield from ((trial.name, by_trial(trial)) for trial in trials())
    yield from ((case.name, by_looking(case)) for case in value_cases())
    yield from (
        (key(fact, seed), published(fact, seed)) for fact in autotrainer_facts() for seed in range(SEEDS)
    )
    yield from ((name, program(name, spec)) for name, spec, _ in named() if settled(name, spec) is None)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="a pattern that the name must match")
    parser.add_argument("--again", action="store_true", help="forget what is recorded of these")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    for name, establish in work():
        records = _read()
        if not re.search(options.only, name) or (name in records and not options.again):
            continue
        started = time.perf_counter()
        twins: dict[str, Record] = records["twins"]
        record = establish(twins)
        record["seconds"] = round(time.perf_counter() - started, 1)
        records = _read()  # another process may have written in the meantime
        records["twins"] |= twins
        records[name] = record
        unfinished = TRUTH.with_suffix(".new")
        unfinished.write_text(json.dumps(records, indent=1))
        unfinished.replace(TRUTH)
        print(f"{record['verdict']:8} {name}: {evidence(record)}", flush=True)


if __name__ == "__main__":
    main()
