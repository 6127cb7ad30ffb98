"""Published training problems, replayed: python -m benchmarks.replay [run ARM …|table|save|forget ARM …] [--every N] [--seeds N]

`run` adds to replay.jsonl what is not yet in it, and can be stopped and started at any time. ARM is 'check' (is it
detected, before training?), 'none', 'selu', 'autotrainer', 'lr', 'random', 'isograd', 'judged' (isograd with as many trainings to choose by) or 'orders' (does the label of a
case depend on the order of its rows?); all by default. `save` writes the table into replay.md, `table` prints what is there, `forget isograd` drops what an older isograd did. Detection covers all published cases of the
gallery; repair the networks of AutoTrainer's benchmark whose data can be made here in full (circle and blob), for its
300 epochs, each with its own optimizer and batch.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.autotrainer import SELU, Trainer, Watched, activation, initialiser, rate, repaired
from benchmarks.population import Member, Recipe, Run, member, trained
from benchmarks.twins.results import forget
from gallery.autotrainer import autotrainer_facts, data, key, shows
from gallery.case import Case
from gallery.cases import published
from gallery.keras_net import Spec, loss_of
from gallery.zoo import graded
from isograd import trials
from isograd.graph.traced import Loss
from isograd.prescription import apply
from isograd.repair import Repair, repair

RESULTS = Path(__file__).with_name("replay.jsonl")
EPOCHS = 300
SEEDS = 10
ARMS = ("none", "selu", "autotrainer", "lr", "random", "isograd", "judged")
RATES = (0.1, 0.3, 3.0, 10.0)
DRAWS = 4
CHOOSING_SEED = 1000
"""Seed of the trainings that 'judged' chooses by."""
TUNED = ("optimizer", "lr", "clip", "batch")

Row = dict[str, Any]


@cache
def networks() -> dict[str, Spec]:
    """The networks on circle and blob, by name.

    Without `demo_oscillating_blob`, which updates after each single row (210,000 steps a training) and whose
    published fault is no gradient fault.
    """
    facts = [fact for fact in autotrainer_facts() if fact["dataset"] in ("circle", "blob")]
    return {key(fact, 0).removesuffix(" #0"): fact for fact in facts if fact["batch_size"] > 1}


@cache
def cases() -> dict[str, Case]:
    """The published cases of the gallery, by name."""
    return {case.name: case for case in published()}


GRADIENT = {"vanishing_gradient", "exploding_gradient", "dying_relu"}


def sick(fact: Spec) -> bool:
    """Does the published label name a gradient problem? Rates and losses that oscillate are others."""
    return fact["role"] == "buggy" and bool(GRADIENT & set(fact["ground_truth"]))


# -- one trial ------------------------------------------------------------------------------------------


@cache
def trainer(dataset: str, epochs: int) -> Trainer:
    """Shared by the arms: AutoTrainer's first training is the untreated one."""
    return Trainer(data(dataset), epochs)


def attempt(wanted: Row) -> list[Row]:
    """Check a case; or treat a network and train it, once for each seed, all seeds together. One row for each."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    if wanted["arm"] == "check":
        return [_checked(cases()[wanted["case"]])]
    if wanted["arm"] == "orders":
        return _orders(**wanted)
    fact, seeds = networks()[wanted["case"]], range(wanted["seeds"])
    train, recipe = trainer(fact["dataset"], wanted["epochs"]), Recipe.of(fact)
    match wanted["arm"]:
        case "none":
            rows = [_row(seen, 0, [seen.run]) for seen in train.watched([(recipe, seed) for seed in seeds])]
        case "selu":
            changed = SELU(recipe)
            found = train.watched([(changed, seed) for seed in seeds])
            rows = [_row(seen, _changed(recipe, changed), [seen.run]) for seen in found]
        case "autotrainer":
            rows = [_autotrainer(recipe, tries) for tries in repaired(recipe, train, seeds)]
        case "isograd" | "judged" as arm:
            rows = _isograd(recipe, train, seeds, judged=arm == "judged")
        case arm:
            rows = _searched(arm, recipe, train, seeds)
    return rows


def _checked(case: Case) -> Row:
    started = time.process_time()
    grade = graded(case)
    return {
        "said": grade.said,
        "faults": list(grade.faults),
        "codes": list(grade.codes),
        "cause": grade.cause,
        "seconds": round(time.process_time() - started, 3),
    }


def _orders(case: str, arm: str, seeds: int, epochs: int) -> list[Row]:
    """Does the label depend on the order of the rows? A case's initial weights, trained as the gallery trains them."""
    name, own = case.split(" #")
    fact = networks()[name]
    recipe, found = Recipe(fact["layers"], fact["loss"]), data(fact["dataset"])
    model = member(recipe, found, int(own)).model
    runs = trained([Member(model, recipe, seed) for seed in range(seeds)], found, epochs)
    best = [max(run.held_out, default=run.untrained) for run in runs]
    return [{"score": round(score, 4), "shows": shows(fact, score)} for score in best]


def _row(seen: Watched, edits: int, runs: Sequence[Run]) -> Row:
    """What one seed ends with, after so many changes; `runs` are all the trainings that it took."""
    seconds = sum(run.seconds for run in runs)
    row = {"score": round(seen.run.final, 4), "edits": edits, "trainings": len(runs), "seconds": round(seconds, 2)}  # fmt: skip
    return row if seen.run.lost is None else row | {"lost": seen.run.lost}


def _autotrainer(recipe: Recipe, tries: list[tuple[Recipe, Watched]]) -> Row:
    first, (answer, last) = tries[0][1], tries[-1]
    row = _row(last, _changed(recipe, answer), [seen.run for _, seen in tries])
    return row | {"alarm": first.problem, "alarm_epoch": first.at, "silent": not last.problem}


def _isograd(recipe: Recipe, train: Trainer, seeds: Sequence[int], *, judged: bool) -> list[Row]:
    """Each seed's network is repaired for itself, or as training has judged best on a seed of its own; those of equal
    structure are then trained together."""
    chosen, tries = _chosen(recipe, train) if judged else (None, [])
    members: list[Member] = []
    searches: list[Row] = []
    for seed in seeds:
        started = time.process_time()
        model = member(recipe, train.data, seed).model.train()
        answer = chosen or repair(model, _first_batch(recipe, train))
        rx = answer.prescription
        members.append(Member(model if rx is None else apply(model, rx, seed=seed), recipe, seed))
        searches.append(
            {
                "edits": 0 if rx is None else len(rx.edits),
                "said": "" if rx is None else rx.title,
                "verdict": answer.before.verdict,
                "cured": answer.cured,
                "search_seconds": round(chosen.seconds if chosen else time.process_time() - started, 2),
            }
        )
    treated = [one for one, did in zip(members, searches, strict=True) if did["edits"]]
    untreated = [(recipe, seed) for seed, did in zip(seeds, searches, strict=True) if not did["edits"]]
    runs, known = iter(trained(treated, train.data, train.epochs)), iter(train.watched(untreated))
    seen = [Watched(next(runs)) if did["edits"] else next(known) for did in searches]
    return [_row(one, did["edits"], [one.run, *tries]) | did for one, did in zip(seen, searches, strict=True)]


def _chosen(recipe: Recipe, train: Trainer) -> tuple[Repair, list[Run]]:
    """What isograd prescribes where it may choose by as many trainings as random search, and those trainings."""
    tries: list[Run] = []

    def score(model: nn.Module, again: int) -> float:
        tries.extend(trained([Member(model, recipe, CHOOSING_SEED + again)], train.data, train.epochs))
        return _learned(tries[-1])

    model = member(recipe, train.data, CHOOSING_SEED).model.train()
    return repair(model, _first_batch(recipe, train), train=score, trainings=DRAWS), tries


def _first_batch(recipe: Recipe, train: Trainer) -> Loss:
    loss, x, y = loss_of(recipe.loss), train.data.x[: recipe.batch], train.data.y[: recipe.batch]
    return lambda m: loss(m(x), y)


def _searched(arm: str, recipe: Recipe, train: Trainer, seeds: Sequence[int]) -> list[Row]:
    """The best of four by accuracy on the training rows, which is all that a user would choose by."""
    tries = [(seed, number) for seed in seeds for number in range(DRAWS)]
    recipes = [_drawn(recipe, seed, n) if arm == "random" else rate(RATES[n])(recipe) for seed, n in tries]
    seen = train.watched([(changed, seed) for changed, (seed, _) in zip(recipes, tries, strict=True)])
    best: list[Row] = []
    for first in range(0, len(tries), DRAWS):
        chosen = max(range(first, first + DRAWS), key=lambda i: _learned(seen[i].run))
        runs = [one.run for one in seen[first : first + DRAWS]]
        best.append(_row(seen[chosen], _changed(recipe, recipes[chosen]), runs))
    return best


def _learned(run: Run) -> float:
    return max(run.train, default=0.0) if run.lost is None else 0.0


def _drawn(recipe: Recipe, seed: int, number: int) -> Recipe:
    """One or two changes: an activation with an initialiser, an initialiser alone, the learning rate."""
    choice = random.Random(f"{json.dumps(recipe.layers)} {seed} {number}")
    kernels = ("he_uniform", "glorot_uniform", "lecun_uniform", "he_normal")
    for kind in choice.sample(("activation", "initialiser", "rate"), choice.randint(1, 2)):
        if kind == "activation":
            name = choice.choice(("relu", "sigmoid", "tanh", "elu", "selu"))
            recipe = activation(name, choice.choice(kernels))(recipe)
        elif kind == "initialiser":
            recipe = initialiser(choice.choice(kernels))(recipe)
        else:
            recipe = replace(recipe, lr=10 ** choice.uniform(-4, -1))
    return recipe


def _changed(before: Recipe, after: Recipe) -> int:
    """Layers that differ or are new, and one for each setting of the training that does."""
    old = {json.dumps(layer) for layer in before.layers}
    layers = sum(json.dumps(layer) not in old for layer in after.layers)
    return layers + sum(getattr(before, name) != getattr(after, name) for name in TUNED)


# -- command -----------------------------------------------------------------------------------------------


def settings(arm: str, seeds: int, epochs: int, every: int) -> list[Row]:
    """What an arm is to be tried on: those that search at random only on networks that they are to repair."""
    if arm == "check":
        return [{"case": name, "arm": arm} for name in list(cases())[::every]]
    if arm == "orders":
        names = [name for name in cases() if name.split(" #")[0] in networks()][::every]
        return [{"case": name, "arm": arm, "seeds": seeds, "epochs": epochs} for name in names]
    names = [
        name for name, fact in networks().items() if sick(fact) or arm not in ("lr", "random", "judged")
    ][::every]
    return [{"case": name, "arm": arm, "seeds": seeds, "epochs": epochs} for name in names]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.replay",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("verb", choices=("run", "table", "save", "forget"))
    parser.add_argument("arms", nargs="*", metavar="ARM")
    parser.add_argument("--every", type=int, default=1, help="each n-th case only: a slice")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    options = parser.parse_args()
    if options.verb in ("table", "save"):
        from benchmarks.replay_table import PAGE, report, saved

        print(saved(PAGE, report(RESULTS)) if options.verb == "save" else report(RESULTS))
        return
    if options.verb == "forget":
        print(f"{forget(RESULTS, options.arms)} results forgotten")
        return
    for arm in options.arms or ("check", *ARMS, "orders"):

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
