"""Establish the truth of every trial by training it beside its twin: python -m gallery.establish

Each result goes to truth.json as soon as it is there; a second call goes on with what is missing.
`--only TEXT` narrows to trials whose name contains the text; `--again` forgets their results first.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from gallery.sick import trials
from gallery.training import Outcome, Setting, Task, best_of, train
from gallery.trial import BEYOND_TRAINING, TRUTH, Trial, exact_decades, judged

ENOUGH = 0.9
"""Share of the way from chance to a perfect score at which a training has shown that it works."""

Record = dict[str, Any]


def scores(trial: Trial, *, faulty: bool) -> dict[str, Outcome]:
    """The best score of the faulty network, or of its twin, for each family of optimizers."""
    make, loss = (trial.make, trial.loss) if faulty else (trial.twin.make, trial.twin.loss)
    task = (trial.faulty_task or trial.task)() if faulty else trial.task()
    enough = task.chance + ENOUGH * (1 - task.chance)

    def run(setting: Setting, seed: int) -> float:
        return attempt(trial, make, task, setting, seed, loss, enough)

    return {name: best_of(run, grid, seeds=2, enough=enough) for name, grid in trial.optimizers.items()}


def attempt(
    trial: Trial, make: Any, task: Task, setting: Setting, seed: int, loss: Any, enough: float
) -> float:
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


def _read() -> dict[str, Record]:
    return {"twins": {}} | (json.loads(TRUTH.read_text()) if TRUTH.exists() else {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="")
    parser.add_argument("--again", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    for trial in trials():
        records = _read()
        if options.only not in trial.name or (trial.name in records and not options.again):
            continue
        started = time.perf_counter()
        twins: dict[str, Record] = records["twins"]
        record = by_product(trial) if trial.grids == "exact" else by_training(trial, twins)
        record["seconds"] = round(time.perf_counter() - started, 1)
        records = _read()  # another process may have written in the meantime
        records["twins"] |= twins
        records[trial.name] = record
        TRUTH.write_text(json.dumps(records, indent=1))
        numbers = {k: v["score"] for k, v in record.items() if isinstance(v, dict) and "score" in v}
        print(f"{record['verdict']:8} {trial.name}: {record.get('decades', numbers)}", flush=True)


if __name__ == "__main__":
    main()
