"""`isograd repair --prove`: what is trained, and from which seeds."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from isograd import trials
from isograd.cli.errors import TargetError, users_code
from isograd.cli.inputs import InputSpec
from isograd.cli.target import load, resolve
from isograd.graph.traced import Loss
from isograd.judge import Train, short_training
from isograd.prescription import Prescription
from isograd.proof import Proof, prove

STEPS = 60


def proof(
    text: str,
    inputs: Sequence[InputSpec],
    rx: Prescription,
    loss: Loss,
    *,
    train: str | None,
    seeds: int,
    store: Path | None = None,
    progress: trials.Progress | None = None,
) -> Proof:
    """Prove a prescription for the target `text`, trained by the function that `train` names.

    Without one, each model is trained on the target's own batch. The target is built anew for each seed; one
    that takes an argument called `seed` is given it.

    Raises:
        TargetError: `train` names no function of a model and a seed, or raises from every seed.
    """
    trained = short_training(loss, steps=STEPS) if train is None else named(train)

    def build(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        found: Any = resolve(text)
        if (
            callable(found)
            and not isinstance(found, nn.Module)
            and "seed" in inspect.signature(found).parameters
        ):
            made: Any = cast(Any, found)(seed=seed)
            return made if isinstance(made, nn.Module) else made[0]
        return load(text, inputs, seed=seed).model

    try:
        return prove(build, rx, trained, seeds=seeds, loss=loss, store=store, progress=progress)
    except (RuntimeError, ValueError, OSError) as error:  # the last: a store that cannot be written
        raise TargetError(f"{text} was not proven: {error}") from error


def named(text: str) -> Train:
    """The training function that `file.py:train` names."""
    if ":" not in text:
        raise TargetError(
            f"{text} names no training",
            why="a training is file.py:name or package.module:name",
            type_=f"--train {text if text.endswith('.py') else 'net.py'}:train",
        )
    found: Any = resolve(text, model=False)
    takes = list(inspect.signature(found).parameters) if callable(found) else []
    if len(takes) < 2 or isinstance(found, type):
        raise TargetError(
            f"{text} is no training",
            why="it is called as train(model, seed) and returns a score, higher being better",
            type_="def train(model, seed, lr_scale=1.0): …; return held_out_accuracy",
        )
    return cast(Train, found)


def judging(text: str, train: Train) -> Train:
    """The same, for one training in this process: what it raises is shown as the user's own traceback."""

    def judge(model: nn.Module, seed: int) -> float:
        with users_code(f"{text} raised while it trained"):
            score: Any = train(model, seed)
        try:
            return float(score)
        except (TypeError, ValueError):
            raise TargetError(
                f"{text} returned {score!r}, which is no number",
                why="the score tells which of two trainings is better: higher is better",
                type_="return held_out_accuracy",
            ) from None

    return judge
