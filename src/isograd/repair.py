"""The least invasive prescription that makes the flow of a model healthy: search by theory, then by measurement."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import nn

from isograd.diagnosis import Diagnosis
from isograd.graph.traced import Loss, unwrapped
from isograd.judge import TRAININGS, Judge, Train
from isograd.prescription import Prescription
from isograd.search import MOST, Search, Tried

if TYPE_CHECKING:
    from rich.text import Text


@dataclass(frozen=True, repr=False)
class Repair:
    """What a search found. Prints itself: the diff, the expected and the measured effect, and what was not enough."""

    cured: bool
    model: nn.Module
    """A repaired copy; the best that was found where none is healthy; the model itself where nothing helped."""
    prescription: Prescription | None
    before: Diagnosis
    after: Diagnosis
    tried: tuple[Tried, ...] = ()
    by_hand: tuple[Prescription, ...] = ()
    """For the errors that are left: what belongs into the training, and lines of the user's that no edit reaches."""
    seconds: float = 0.0
    note: str = ""
    """Why the search ended before it had an answer, or had nothing to do."""
    score_before: float = math.nan
    score_after: float = math.nan
    """Of `train`, where it was given."""
    failure: Exception | None = field(default=None, compare=False)
    """What `train` raised; the search then went on without it."""
    target: str = field(default="", compare=False)

    def to_code(self) -> str:
        """The prescription as Python; see `Prescription.to_code`.

        Raises:
            ValueError: nothing was prescribed.
        """
        if self.prescription is None:
            raise ValueError(f"nothing to apply: {self.note or 'no change helped'}")
        return self.prescription.to_code()

    def __repr__(self) -> str:
        return self.__rich__().plain

    def __rich__(self) -> Text:
        from isograd.render.prescription import repair_document

        return repair_document(self)

    def to_json(self) -> str:
        from isograd.render.prescription import repair_to_json

        return repair_to_json(self)


def repair(
    model: nn.Module,
    loss: Loss,
    *,
    budget: float | None = None,
    measurements: int = MOST,
    unsafe: bool = True,
    train: Train | None = None,
    trainings: int = TRAININGS,
    progress: Callable[[str], None] | None = None,
) -> Repair:
    """Find the least invasive change that makes the flow healthy, by measuring each candidate once.

    Args:
        model: left bitwise as it was; candidates are copies.
        loss: as for `check`.
        budget: seconds after which no further candidate is begun.
        measurements: candidates after which the search ends.
        unsafe: False tries only edits that keep the function that the model computes.
        train: judges by training as well (`train(model, seed)` returns a score, higher is better): of the changes of
            the least reach that make the flow healthy the one that trains best is taken, and a model whose flow is
            healthy is repaired if it trains better for it, as deep post-norm transformers do. What it raises is kept
            in `.failure`.
        trainings: of changed models, at most; a change of what is healthy takes two, from two seeds that have to agree.
        progress: is told what is tried.

    Returns:
        `cured`: the flow of `.model` shows no error (and with `train`, its score is not lower). A healthy model
        comes back as it is, with nothing prescribed. Ctrl-C ends the search and keeps the best so far.

    Raises:
        TypeError, ValueError: see `measure`.

    Example:
        >>> found = isograd.repair(model, lambda m: cross_entropy(m(x), y))
        >>> print(found)
        >>> model = found.model
    """
    model = unwrapped(model)[0]
    search = Search(
        model,
        loss,
        budget=budget,
        measurements=measurements,
        unsafe=unsafe,
        judge=None if train is None else Judge(model, train, trainings),
        progress=progress or _silent,
    )
    search.run()
    return _found(search)


def _found(search: Search) -> Repair:
    best, judge = search.best, search.judge
    return Repair(
        cured=search.cured,
        model=best.model,
        prescription=best.prescription,
        before=search.before,
        after=best.diagnosis,
        tried=tuple(search.tried),
        by_hand=tuple(search.by_hand()),
        seconds=time.perf_counter() - search.began,
        note=search.note,
        score_before=math.nan if judge is None or math.isnan(best.score) else judge.before,
        score_after=best.score,
        failure=None if judge is None else judge.failure,
    )


def _silent(_: str) -> None:
    pass
