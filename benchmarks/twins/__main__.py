"""Train the twins and print the tables: python -m benchmarks.twins [run ARM …|table|forget ARM …] [--only PATTERN] [--every N] [--seeds N]

`run` adds to results.jsonl what is not yet in it, and can be stopped and started at any time. ARM is 'twin',
'fault', 'check', 'isograd', 'judged', 'selu', 'he', 'layernorm', 'random', 'lr', or any of them behind 'twin ' to treat
the healthy twin; without one, all. What is to be repaired is what training has shown to be sick, or has not judged
yet: run 'twin fault' first. `table` prints what is there; `forget isograd` drops what an older isograd did.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable, Iterator

from benchmarks.twins.arms import CHOOSING_SEED, DRAWS, RATES
from benchmarks.twins.case import Case
from benchmarks.twins.cases import cases
from benchmarks.twins.results import RESULTS, Store, forget
from benchmarks.twins.table import report
from benchmarks.twins.trial import SEEDS, Setting, attempt, model_of, setting
from isograd import trials

FIRST = ("twin", "fault", "check", "twin check")
"""The ground truth, and what is said of it before training."""
ARMS = (
    "isograd",
    "judged",
    "lr",
    "selu",
    "he",
    "layernorm",
    "random",
    "twin isograd",
    "twin judged",
    "twin selu",
    "twin layernorm",
)


def settings(arm: str, chosen: Iterable[Case], seeds: int) -> Iterator[Setting]:
    """Seed by seed, so that what is interrupted has all cases rather than all seeds of some.

    'judged' goes case by case: all seeds share one search.
    """
    once: dict[str, Case] = {}
    for case in chosen:
        once.setdefault(model_of(case) if arm.startswith("twin") else case.name, case)
    if arm.endswith("judged"):
        yield from (setting(case, arm, seed) for case in once.values() for seed in range(seeds))
        return
    for seed in range(seeds):
        yield from (setting(case, arm, seed) for case in once.values())


def worth(arm: str, chosen: list[Case]) -> list[Case]:
    """The cases on which an arm can show something: a repair needs what is sick, and isograd must leave decoys alone."""
    if arm in FIRST or arm.startswith("twin"):
        return chosen
    store = Store(RESULTS)
    decoys = ("decoy",) if arm == "isograd" else ()
    return [case for case in chosen if case.kind in decoys or store.truth(case) in ("sick", "unknown")]


def search(arm: str, chosen: list[Case], seeds: int) -> None:
    """Try what there is to choose from on a seed of its own, then train the best on the others."""
    choices = [{"draw": draw} for draw in range(DRAWS)] if arm == "random" else [{"scale": r} for r in RATES]
    tried = [setting(case, arm, CHOOSING_SEED, **choice) for case in chosen for choice in choices]
    results = iter(kept(arm, tried))
    best = [max(choices, key=lambda _: _score(next(results))) for _ in chosen]
    kept(
        arm,
        [
            setting(case, arm, seed, **choice)
            for seed in range(seeds)
            for case, choice in zip(chosen, best, strict=True)
        ],
    )


def _score(result: object) -> float:
    return float(result["score"]) if isinstance(result, dict) else 0.0


def kept(words: str, wanted: list[Setting]) -> list[object]:
    def progress(done: int, all_: int) -> None:
        print(f"\r{words}: {done} of {all_}", end="", file=sys.stderr, flush=True)

    # In this process: the machine that makes the table has few cores, and others use them.
    found = trials.run(attempt, wanted, map=map, store=RESULTS, progress=progress)
    failed = [result for result in found if isinstance(result, trials.Failed)]
    print(f", {len(failed)} failed: {failed[0].error}" if failed else "", file=sys.stderr)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.twins",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("verb", choices=("run", "table", "forget"))
    parser.add_argument("arms", nargs="*", metavar="ARM")
    parser.add_argument("--only", default="", help="a pattern that the case's name must match")
    parser.add_argument("--every", type=int, default=1, help="each n-th of these cases only: a slice")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    options = parser.parse_args()
    chosen = [case for case in cases() if re.search(options.only, case.name)][:: options.every]
    if options.verb == "table":
        print(report())
        return
    if options.verb == "forget":
        print(f"{forget(RESULTS, options.arms)} results forgotten")
        return
    for arm in options.arms or (*FIRST, *ARMS):
        telling = worth(arm, chosen)
        if arm in ("random", "lr"):
            search(arm, telling, options.seeds)
        else:
            kept(arm, list(settings(arm, telling, options.seeds)))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\ninterrupted: what was done is kept, the same command goes on")
