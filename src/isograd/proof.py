"""Does a repair help? Paired trainings with and without it, next to two controls."""

from __future__ import annotations

import hashlib
import inspect
import math
import os
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from isograd import trials
from isograd.controls import random_edit
from isograd.edit import Value
from isograd.graph.preserve import copied, preserved
from isograd.graph.traced import Loss
from isograd.judge import Train
from isograd.measure import measure
from isograd.paired import Difference, paired
from isograd.prescription import Prescription, apply, combined

if TYPE_CHECKING:
    from rich.text import Text


RATES = (0.03, 0.1, 0.3, 3.0, 10.0)
"""What the learning rate is multiplied by in the search for the best."""
FEWEST = 3
"""Pairs below which nothing is said."""
BEFORE, AFTER, RANDOM, RATE = "before", "after", "random edit", "learning rate"


@dataclass(frozen=True)
class Arm:
    """The trainings of one variant of the model."""

    name: str
    """'before', 'after', 'random edit' or 'learning rate'."""
    scores: tuple[float, ...]
    """By seed; NaN where the score was not finite or the training raised."""
    seconds: float
    """Mean time of a training."""
    said: str = ""
    """What was changed: '× 0.1'."""
    errors: tuple[str, ...] = ()

    @property
    def mean(self) -> float:
        """Of the scores that are finite; NaN if none is."""
        finite = [score for score in self.scores if math.isfinite(score)]
        return fmean(finite) if finite else math.nan


@dataclass(frozen=True, repr=False)
class Proof:
    """What paired trainings say of a repair. Prints itself."""

    prescription: Prescription
    seeds: tuple[int, ...]
    arms: dict[str, Arm]
    """By name; 'before' and 'after' always, the controls as far as they were run."""
    unrun: dict[str, str]
    """By name: why a control was not run."""
    decades: tuple[float, float, float]
    """Gradient between head and input before, as theory expects it after, and after; NaN: not known."""
    notes: tuple[str, ...] = ()

    def against(self, name: str = BEFORE) -> Difference:
        """The repaired model's scores minus those of another arm, seed by seed.

        A training that diverged counts as the lowest score that any training reached.
        """
        finite = [s for arm in self.arms.values() for s in arm.scores if math.isfinite(s)]
        floor = min(finite, default=0.0)

        def whole(arm: Arm) -> list[float]:
            return [score if math.isfinite(score) else floor for score in arm.scores]

        return paired(whole(self.arms[name]), whole(self.arms[AFTER]))

    @property
    def effect(self) -> Difference:
        """After minus before."""
        return self.against(BEFORE)

    @property
    def independent(self) -> bool:
        """Do the scores depend on the seed? If not, the pairs are one pair told several times."""
        return any(len(set(self.arms[name].scores)) > 1 for name in (BEFORE, AFTER))

    @property
    def equalled(self) -> tuple[str, ...]:
        """Controls that the repair does not surely exceed."""
        return tuple(n for n in self.arms if n not in (BEFORE, AFTER) and not self.against(n).exceeds)

    @property
    def helps(self) -> bool:
        """Is the repaired model surely better than the model before?"""
        return self.independent and self.effect.better

    @property
    def proven(self) -> bool:
        """Does it help, and more than each control that was run?"""
        return self.helps and not self.equalled

    def __repr__(self) -> str:
        return self.__rich__().plain

    def __rich__(self) -> Text:
        from isograd.render.proof import document

        return document(self)

    @property
    def sentence(self) -> str:
        """The result in plain words."""
        from isograd.render.proof import sentence

        return sentence(self)

    def to_json(self) -> str:
        from isograd.render.proof import to_json

        return to_json(self)


def prove(
    model: nn.Module | Callable[[int], nn.Module],
    rx: Prescription | Sequence[Prescription],
    train: Train,
    *,
    seeds: int | Sequence[int] = 5,
    loss: Loss | None = None,
    map: trials.Map | Executor | None = None,
    store: str | os.PathLike[str] | None = None,
    progress: trials.Progress | None = None,
) -> Proof:
    """Train a model with and without a repair, and tell whether it helps.

    For each seed the same training runs on the model as it is, on the repaired model, and on the model with
    a random edit of the same kind; what a repair draws at random is drawn anew for each seed. If `train` takes a keyword `lr_scale`, the best of several learning rates
    is found on a seed of its own and the model as it is trained with it on all others.

    Args:
        model: copied for each training, never changed. Or a function from a seed to a model, so that the
            initial weights differ from seed to seed as well.
        rx: what to apply, as for `apply`.
        train: `train(model, seed)` trains the model it is given and returns a held-out score, higher being
            better, with the order of its data decided by the seed. torch, Python and NumPy are seeded with
            it beforehand. It may take the keywords `lr_scale`, a factor on its learning rate, and those that
            the prescription configures, such as `clip_grad_norm`. It should train as long as it takes the
            healthy model to learn something, no longer.
        seeds: how many, or which; three at least.
        loss: as for `check`; the gradient is then measured before and after, without it neither is known.
        map, store, progress: see `isograd.trials.run`. The store is for this model and this training only.

    Returns:
        A proof, also of no effect. Ctrl-C returns what three seeds or more can tell, or raises.

    Raises:
        ValueError: fewer than three seeds, nothing to apply, or edits that conflict.
        RuntimeError: all trainings of the model before or after raised.

    Source:
        Paired, seeded trainings against controls as the patch test: MLM4DNN (FSE 2025), RunSleuth.
    """
    numbers = tuple(range(seeds)) if isinstance(seeds, int) else tuple(seeds)
    if len(numbers) < FEWEST:
        raise ValueError(f"{len(numbers)} seeds are too few to tell anything: {FEWEST} at least")
    whole = combined([rx] if isinstance(rx, Prescription) else rx)
    build: Callable[[int], nn.Module] = (lambda _: model) if isinstance(model, nn.Module) else model
    apply(build(numbers[0]), whole)  # what cannot be applied is told before any training
    given, ignored = _configuration(train, whole.configuration)
    trial = _trial(build, whole, train, given)
    digest = hashlib.sha256(repr(whole.edits).encode()).hexdigest()[:8]

    def setting(arm: str, seed: int, scale: float = 1.0) -> dict[str, Any]:
        return {"arm": arm, "seed": seed, "scale": scale, "edits": digest if arm in (AFTER, RANDOM) else ""}

    takes_rate = "lr_scale" in _keywords(train)
    first = [setting(arm, seed) for seed in numbers for arm in (BEFORE, AFTER, RANDOM)]
    search = [setting(RATE, max(numbers) + 1, scale) for scale in RATES] if takes_rate else []
    total = len(first) + len(search) + (len(numbers) if takes_rate else 0)

    def run(wanted: list[dict[str, Any]], done: int) -> list[Any]:
        say = (lambda n, _: progress(done + n, total)) if progress is not None else None  # type: ignore[misc]
        return trials.run(trial, wanted, map=map, store=store, progress=say)

    notes = [
        f"{name} = {value} of the prescription was not used: train takes no {name}" for name, value in ignored
    ]
    unrun: dict[str, str] = {}
    results: dict[int, Any] = {}
    rated: list[Any] = []
    best = 1.0
    try:
        results = dict(enumerate(run(first + search, 0)))
        if takes_rate:
            best = max(RATES, key=lambda scale: _score(results[len(first) + RATES.index(scale)], -math.inf))
            rated = run([setting(RATE, seed, best) for seed in numbers], len(first) + len(search))
    except trials.Interrupted as stopped:
        results = results or stopped.results
        notes.append("interrupted before the end")
    if not takes_rate:
        unrun[RATE] = (
            "train takes no lr_scale: train(model, seed, lr_scale=1.0) lets the learning rate be changed"
        )
    elif not rated:
        unrun[RATE] = "interrupted before it was trained"

    arms = {name: range(place, len(first), 3) for place, name in enumerate((BEFORE, AFTER, RANDOM))}
    complete = [i for i in range(len(numbers)) if all(arms[name][i] in results for name in arms)]
    if len(complete) < FEWEST:
        raise trials.Interrupted(results)
    found = {name: _arm(name, [results[where[i]] for i in complete]) for name, where in arms.items()}
    if rated:
        found[RATE] = _arm(RATE, [rated[i] for i in complete], f"× {best:g}")
    for name in (BEFORE, AFTER):
        if len(found[name].errors) == len(complete):
            raise RuntimeError(
                f"every training of the model {name} the repair raised: {found[name].errors[0]}"
            )
    notes += [note for arm in found.values() if (note := _told(arm))]
    decades = _decades(build(numbers[0]), whole, loss)
    return Proof(whole, tuple(numbers[i] for i in complete), found, unrun, decades, tuple(notes))


def _keywords(train: Train) -> set[str]:
    return set(inspect.signature(train).parameters)


def _configuration(
    train: Train, wanted: dict[str, Value]
) -> tuple[dict[str, Value], list[tuple[str, Value]]]:
    """What of the prescription's configuration the training takes, and what it does not."""
    keywords = _keywords(train)
    given = {name: value for name, value in wanted.items() if name in keywords}
    return given, [item for item in wanted.items() if item[0] not in keywords]


def _trial(
    build: Callable[[int], nn.Module], rx: Prescription, train: Train, given: dict[str, Value]
) -> Callable[[dict[str, Any]], dict[str, float]]:
    """One training, from a setting. The user's random generators are left as they are, should it run here."""

    def trial(setting: dict[str, Any]) -> dict[str, float]:
        arm, seed = setting["arm"], setting["seed"]
        with _alone(), preserved(nn.Module()):
            _seeded(seed)
            model = build(seed)
            treated = {AFTER: rx, RANDOM: random_edit(rx, model, seed)}.get(arm)
            patient = (
                apply(model, treated, seed=seed) if treated is not None and treated.edits else copied(model)
            )
            keywords: dict[str, Any] = dict(given) if arm == AFTER else {}
            if arm == RATE:
                keywords["lr_scale"] = setting["scale"]
            _seeded(seed)
            started = time.perf_counter()
            score = float(train(patient, seed, **keywords))
            return {"score": score, "seconds": time.perf_counter() - started}

    return trial


_training = threading.Lock()


@contextmanager
def _alone() -> Iterator[None]:
    """One training at a time in a process: threads share torch's random generators, and pairs would not be pairs."""
    with _training:
        yield


def _seeded(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed % 2**32)


def _score(result: Any, otherwise: float) -> float:
    score = math.nan if isinstance(result, trials.Failed) else float(result["score"])
    return score if math.isfinite(score) else otherwise


def _arm(name: str, results: Sequence[Any], said: str = "") -> Arm:
    seconds = [result["seconds"] for result in results if not isinstance(result, trials.Failed)]
    return Arm(
        name,
        tuple(_score(result, math.nan) for result in results),
        fmean(seconds) if seconds else math.nan,
        said,
        tuple(result.error for result in results if isinstance(result, trials.Failed)),
    )


def _told(arm: Arm) -> str:
    """How many trainings came to nothing."""
    lost = sum(not math.isfinite(score) for score in arm.scores)
    raised = f", {len(arm.errors)} raised: {arm.errors[0]}" if arm.errors else ""
    return f"{arm.name}: {lost} of {len(arm.scores)} trainings gave no finite score{raised}" if lost else ""


def _decades(model: nn.Module, rx: Prescription, loss: Loss | None) -> tuple[float, float, float]:
    if loss is None:
        return math.nan, rx.decades, math.nan
    return measure(model, loss).lost, rx.decades, measure(apply(model, rx), loss).lost
