"""The search for a prescription: candidates tried in their order, and what each of them was found to be worth.

What theory rules out is not measured. Where no single candidate is enough, what remains after the best change is
treated in its turn.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from torch import nn

from isograd.candidates import candidates, changes, changing, for_training, on_top
from isograd.causes import distance
from isograd.check import along_time
from isograd.diagnosis import FAR, Diagnosis, Severity, diagnose
from isograd.flow import Flow
from isograd.graph.traced import Loss
from isograd.judge import Judge
from isograd.measure import measure
from isograd.prescription import NoCopy, Patient, Prescription, Reach, Safety, apply, prescriptions
from isograd.remedies import (
    lsuv,
    slugs,
)
from isograd.symptoms import closed_gates, short_horizon
from isograd.symptoms.vanishing_gradient import threshold

MOST = 40
"""Measurements after which a search gives up."""
SPARE = 4
"""Further candidates of the same reach that are measured when one leaves a warning about depth, and no error."""
HELP = 0.5
"""Decades that a change has to give back, or one kind of error, if it is to be shown though it is no cure."""
MEMORY = {short_horizon.CODE, closed_gates.CODE}
"""Findings of how long something is remembered."""
SECOND = 1
"""Seed of the training that has to agree before a change of what is healthy is taken."""
IN_VAIN = 2
"""Candidates of one reach that gain nothing in a training: then what is of another kind is asked."""


@dataclass(frozen=True)
class Tried:
    """One candidate of the search and why it was not enough, or that it was."""

    prescription: Prescription
    why: str
    remaining: float = math.nan
    """Decades between head and input, in the worse direction; NaN: not measured."""
    verdict: str = ""
    """Of the flow after the change; '' when it was not measured."""
    seconds: float = 0.0
    score: float = math.nan
    """Of its training; NaN: it was not trained."""


@dataclass(frozen=True)
class Outcome:
    """A model, what was changed in it, and what was then seen."""

    model: nn.Module
    prescription: Prescription | None
    diagnosis: Diagnosis
    score: float = math.nan
    """Of the training that judged it; NaN: none did."""
    again: float = math.nan
    """Of a training from a second seed; NaN: it was not asked."""


class Search:
    """Candidates tried in order; keeps the best."""

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        *,
        budget: float | None,
        measurements: int,
        unsafe: bool,
        judge: Judge | None,
        progress: Callable[[str], None],
    ) -> None:
        self.model, self.loss, self.unsafe, self.say, self.judge = model, loss, unsafe, progress, judge
        self.began = time.perf_counter()
        self.ends = math.inf if budget is None else self.began + budget
        self.left = measurements
        self.before = self._examined(model)
        self.patient = Patient(model, self.before, loss)
        self.tried: list[Tried] = []
        self.best = Outcome(model, None, self.before)
        self.note = ""

    @property
    def cured(self) -> bool:
        """The flow shows no error, and no training speaks against it."""
        return not self.best.diagnosis.errors and not self._worse(self.best)

    def by_hand(self) -> Iterator[Prescription]:
        """For the errors of the best: what changes the training alone, and what the user would have to write."""
        left = self.best.diagnosis.errors
        seen = replace(self.best.diagnosis, findings=tuple(left))
        said = set[str]()
        for rx in prescriptions(Patient(self.best.model, seen, self.loss), among=set(slugs()) - {lsuv.SLUG}):
            if (rx.advice and rx.why_not) or (rx.applicable and not changes(rx)):
                said.update(rx.advice)
                yield rx
        for finding in left:  # what no remedy stands for
            words = [remedy for remedy in finding.remedies if remedy not in slugs() and remedy not in said]
            if words:
                yield Prescription(
                    finding.name,
                    finding.message,
                    safety=Safety.ADVICE,
                    reach=Reach.TRAINING,
                    advice=tuple(words),
                )

    def run(self) -> None:
        """Try candidates until one is healthy; with a healthy flow, what a training may prefer, on top of it."""
        try:
            if self.before.errors:
                self._cure()
            if self.judge is not None and self.cured:
                self._train(self.judge)
            elif not self.before.errors:
                self.note = (
                    "the flow is healthy: nothing to repair; a training may tell more (train=, --steps 50)"
                )
        except KeyboardInterrupt:
            self.note = "interrupted: the best so far"
        except _Spent as spent:
            self.note = f"{spent}: the best so far"
        except NoCopy as error:
            self.note = f"no candidate could be tried: {error}"
        if self.judge is not None and self.judge.failure is not None:
            raised = f"not judged by training, which raised {_first_line(self.judge.failure)}"
            self.note = f"{self.note}; {raised}" if self.note else raised

    def _cure(self) -> None:
        """The first that is healthy; where a warning is left or a training judges, the best of the same reach."""
        spare = SPARE
        for candidate in self._candidates():
            best = self.best
            if best.prescription is not None and self.cured:
                if spare == 0 or self._asked_enough() or candidate.reach > best.prescription.reach:
                    return
                spare -= 1
            if self._try(candidate) and self.judge is None:
                return
        if self.best.diagnosis.errors:
            self.note = "no prescription makes the flow healthy"
        elif not self.cured:
            self.note = "the flow is healthy, but the model trains worse"

    def _asked_enough(self) -> bool:
        """Of the judge, about what is of the least reach: no training is left, or these gain nothing."""
        judge = self.judge
        if judge is None or judge.left == 0:
            return judge is not None
        scored = sum(not math.isnan(tried.score) for tried in self.tried)
        return scored >= IN_VAIN and not judge.prefers(self.best.score, judge.before)

    def _train(self, judge: Judge) -> None:
        """The flow is healthy, from the start or by now: what a training prefers is measured, and the best of it kept.

        A fault that no gradient shows may hide behind the one that was cured.
        """
        if self.best.prescription is None:
            self.say("training the model as it is")
            self.best = replace(self.best, score=judge.before)
        seeds = 1 if self.before.errors else 2
        """That have to agree: what came healthy is not changed for the luck of one."""
        for rx in self._for_training():
            if judge.failure is not None or judge.left < seeds:
                break
            began, changed = time.perf_counter(), self._applied(rx)
            if changed is None:
                continue
            score, why = self._score(changed, rx)
            seen, better = None, judge.prefers(score, self.best.score)
            # What takes a warning away has theory on its side: it need not train better, but no worse.
            relief = self._warned(self.best.diagnosis) and score >= self.best.score
            if (better or relief) and (seen := self._seen_in(changed, rx)) is not None:
                why = f"{self._seen(seen)}, and {why}"
                relief = relief and not self._warned(seen)
                if not seen.errors and (better or relief):
                    outcome = Outcome(changed, rx, seen, score)
                    if seeds > 1:
                        outcome, held = self._again(outcome), self.best.again
                        why += f"; with a second seed from {held:.4g} to {outcome.again:.4g}"
                        better = judge.prefers(outcome.again, held, SECOND)
                        relief = relief and outcome.again >= held
                    if better or relief:
                        self.best = outcome
            self._note(rx, why, seen, began, score)
        if self.best.prescription is None:
            self.note = (
                "the flow is healthy: nothing to repair, and no change trains better"
                if any(not math.isnan(tried.score) for tried in self.tried)
                else "the flow is healthy: nothing to repair; a change of it asks for two trainings"
            )

    def _again(self, outcome: Outcome) -> Outcome:
        """With its score from a second seed, from which what the prescription draws is drawn anew; the best has its own."""
        judge, rx = self.judge, outcome.prescription
        assert judge is not None
        assert rx is not None
        if self.best.prescription is None:
            self.best = replace(self.best, again=judge.untreated(SECOND))
        self.say(f"training with a second seed: {rx.title}")
        try:
            return replace(outcome, again=judge.score(apply(self.model, rx, seed=SECOND), SECOND))
        except Exception:  # the first seed did not raise: it speaks against the change
            return replace(outcome, again=-math.inf)

    # -- candidates --------------------------------------------------------------------------------

    def _candidates(self) -> Iterator[Prescription]:
        """All for the model as it came, then what is prescribed for the best so far, on top of it."""
        yield from candidates(self.patient, unsafe=self.unsafe)
        found = changing(self._patient_now(), set(slugs()), unsafe=self.unsafe)
        yield from on_top(self.best.prescription, self.model, found)

    def _for_training(self) -> Iterator[Prescription]:
        """What may train better than what is healthy by now, on top of it."""
        base, patient = self.best.prescription, self._patient_now()
        asked = set[str]() if base is None else {base.remedy}
        for found in for_training(patient, asked, unsafe=self.unsafe):
            yield from on_top(base, self.model, found)

    def _patient_now(self) -> Patient:
        return Patient(self.best.model, self.best.diagnosis, self.loss)

    # -- one candidate -----------------------------------------------------------------------------

    def _try(self, rx: Prescription) -> bool:
        """Is the model healthy with it, without a warning about depth, and no training against it?"""
        if any(rx.edits == known.prescription.edits for known in self.tried):
            return False
        limit = max(threshold(self.before.flow.layers), 2.0)
        if not math.isnan(rx.decades) and abs(rx.decades) > limit:
            self._note(rx, f"theory expects {rx.decades:+.1f} decades: not measured")
            return False
        began, changed = time.perf_counter(), self._applied(rx)
        if changed is None:
            return False
        seen = self._seen_in(changed, rx)
        if seen is None:
            return False
        outcome = Outcome(changed, rx, seen)
        why, healthy = self._seen(outcome.diagnosis), not outcome.diagnosis.errors
        if healthy and self.judge is not None:
            best = self.best
            self._keep(outcome)  # whatever becomes of its training
            score, told = self._score(changed, rx)
            outcome, self.best = replace(outcome, score=score), best
            why += f", and {told}" if told else ""
        self._note(rx, why, outcome.diagnosis, began, outcome.score)
        self._keep(outcome)
        return healthy and not self._warned(outcome.diagnosis) and not self._worse(outcome)

    def _applied(self, rx: Prescription) -> nn.Module | None:
        """A changed copy; None where that failed, which is noted.

        Raises:
            _Spent: no further candidate may be begun.
            NoCopy: none ever can.
        """
        if self.left <= 0:
            raise _Spent("the measurements are used up")
        if time.perf_counter() > self.ends:
            raise _Spent("the budget is used up")
        self.left -= 1
        self.say(f"candidate {len(self.tried) + 1}: {rx.title}")
        try:
            return apply(self.model, rx)
        except NoCopy:
            raise
        except Exception as error:  # an edit that does not fit: said
            self._note(rx, f"could not be tried: {_first_line(error)}")
            return None

    def _seen_in(self, changed: nn.Module, rx: Prescription) -> Diagnosis | None:
        """Its flow; None where that could not be measured, which is noted."""
        try:
            return self._examined(changed)
        except Exception as error:  # a shape that no longer fits: said
            self._note(rx, f"could not be tried: {_first_line(error)}")
            return None

    def _score(self, changed: nn.Module, rx: Prescription) -> tuple[float, str]:
        """Score of a training and what to say of it; NaN where none judges, minus infinity where this one raised."""
        assert self.judge is not None
        if self.judge.left == 0:
            raise _Spent("the trainings are used up")
        self.say(f"training with: {rx.title}")
        before = self.judge.before
        if math.isnan(before):
            return math.nan, ""
        try:
            score = self.judge.score(changed)
        except Exception as error:  # what was changed does not fit the user's training: said
            return -math.inf, f"its training raised {_first_line(error)}"
        return score, f"the score goes from {before:.4g} to {score:.4g}"

    def _note(
        self,
        rx: Prescription,
        why: str,
        seen: Diagnosis | None = None,
        began: float = math.nan,
        score: float = math.nan,
    ) -> None:
        if seen is None:
            self.tried.append(Tried(rx, why, score=score))
        else:
            seconds = time.perf_counter() - began
            self.tried.append(Tried(rx, why, distance(seen.flow), seen.verdict, seconds, score))

    def _keep(self, outcome: Outcome) -> None:
        best, judge = self.best, self.judge
        scored = not (math.isnan(outcome.score) or math.isnan(best.score))
        if judge is not None and scored and not (outcome.diagnosis.errors or best.diagnosis.errors):
            better = judge.prefers(outcome.score, best.score)
        else:
            better = self._badness(outcome) < self._badness(best) and self._helps(outcome)
        if better:
            self.best = outcome

    def _helps(self, outcome: Outcome) -> bool:
        """Is it a change for the better of what there was, if it is no cure?"""
        after, before = outcome.diagnosis, self.before
        kinds = {f.code for f in before.errors} - {f.code for f in after.errors}
        return bool(kinds) or distance(before.flow) - distance(after.flow) >= HELP

    def _worse(self, outcome: Outcome) -> bool:
        """A training speaks against it."""
        return self.judge is not None and not math.isnan(outcome.score) and outcome.score < self.judge.before

    def _badness(self, outcome: Outcome) -> tuple[bool, bool, bool, float]:
        seen, sick = outcome.diagnosis, bool(outcome.diagnosis.errors)
        return sick, self._worse(outcome), not sick and self._warned(seen), distance(seen.flow)

    def _seen(self, after: Diagnosis) -> str:
        """Why a candidate was not enough, or that it was."""
        remains = _remains(after.flow)
        if after.errors:
            return f"{', '.join(f'{f.code} {f.name}' for f in after.errors)}: {remains}"
        return f"healthy, with a warning: {remains}" if self._warned(after) else "healthy"

    def _warned(self, seen: Diagnosis) -> bool:
        """A warning about the gradient along depth or time, which a cure should not leave.

        Of a short memory only where the model came with one: whether its task needs a longer one is not known, and the
        cure of something else is not to be passed over for what holds on to everything.
        """
        warned = {f.code for f in seen.findings if f.severity >= Severity.WARNING}
        if not MEMORY & {f.code for f in self.before.findings}:
            warned -= MEMORY
        return any(code[:2] in ("VG", "EG", "RN") for code in warned)

    def _examined(self, model: nn.Module) -> Diagnosis:
        return diagnose(along_time(measure(model, self.loss), model, self.loss))


class _Spent(Exception):
    """The budget of a search is used up."""


def _remains(flow: Flow) -> str:
    """How far a flow is from a healthy one, in words."""
    if flow.failure is not None:
        return "its backward raises"
    if flow.nonfinite is not None:
        return "a value is not finite"
    remain = distance(flow)
    return f"{remain:.1f} decades remain" if remain < FAR else "no gradient arrives"


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
