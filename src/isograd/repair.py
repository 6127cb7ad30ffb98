"""The least invasive prescription that makes the flow of a model healthy: search by theory, then by measurement.

Prescriptions are tried in the order of their reach - weights before activations, activations before
normalisation, residual connections, gates - and within it the specific before the general. What theory rules out is
not measured. Where no single one is enough, an activation is exchanged together with weights drawn for the new one;
then what remains after the best change is treated in its turn.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import nn

from isograd.causes import distance
from isograd.check import along_time
from isograd.diagnosis import Diagnosis, Severity, diagnose
from isograd.graph.traced import Loss, unwrapped
from isograd.layers import layers
from isograd.measure import measure
from isograd.prescription import Patient, Prescription, Reach, Safety, apply, combined, prescriptions
from isograd.remedies import critical_initialisation, exchange_activation, orthogonal_initialisation, slugs
from isograd.symptoms.vanishing_gradient import threshold

if TYPE_CHECKING:
    from rich.text import Text

Train = Callable[[nn.Module, int], float]
"""train(model, seed) -> score, higher is better; as `isograd.prove` takes it."""

ORDER = (
    "batch-statistics", "standardise-input", "reset-norm-epsilon", "reset-norm-gain", "scale-embeddings", "zero-biases",
    "recurrent-initialisation", "chrono-initialisation", "forget-bias", "scale-residual-branches",
    "rescale-weights", "orthogonal-initialisation", "delta-orthogonal", "critical-initialisation", "classic-initialisation", "lsuv",
)  # fmt: skip
"""Of one reach: what mends one property that is off, before what draws everything anew; the rest follows."""
FIRST = {*ORDER, "leaky-activation"}
"""Remedies that leave the structure as it is; the others are not even looked for before these have failed."""
NARROW = 1.0
"""Depth over width from which a draw of the weights decides more than their gain: the logarithm of the gradient's norm
has a variance of this order, a healthy mean says little of most directions, and every ReLU that is off takes one away
(Hanin and Nica 2018, arXiv:1812.05994). Of AutoTrainer's networks on circles and blobs, tanh or ReLU at the right gain
brought 2 of 17 within two points of the best control, this 11 of 18 (`python -m benchmarks.replay table`)."""
NARROWED = ("VG101", "EG201", "EG202", "SA301", "SA302", "NF401", "NF402")
"""Findings that in such networks are treated with a smooth function and orthogonal weights together."""
SMOOTH = {"elu", "celu", "selu"}
MOST = 40
"""Measurements after which a search gives up."""
SPARE = 4
"""Further candidates of the same reach that are measured when one leaves a warning about depth, and no error."""
BETTER = 0.05
"""Share of the score's distance that training has to gain before a change is said to help."""


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
    seconds: float = 0.0
    note: str = ""
    """Why the search ended before it had an answer, or had nothing to do."""
    score_before: float = math.nan
    score_after: float = math.nan
    """Of `train`, where it was given."""
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
    progress: Callable[[str], None] | None = None,
) -> Repair:
    """Find the least invasive change that makes the flow healthy, by measuring each candidate once.

    Args:
        model: left bitwise as it was; candidates are copies.
        loss: as for `check`.
        budget: seconds after which no further candidate is begun.
        measurements: candidates after which the search ends.
        unsafe: False tries only edits that keep the function that the model computes.
        train: judges by training as well: a model whose flow is healthy is then repaired if it trains better for
            it (`train(model, seed)` returns a score, higher is better). Deep post-norm transformers are such.
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
    search = _Search(model, loss, budget, measurements, unsafe, progress or _silent)
    search.run()
    return search.result() if train is None else _judged(search, train)


def _silent(_: str) -> None:
    pass


class _Search:
    """Candidates tried in order; keeps the best."""

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        budget: float | None,
        measurements: int,
        unsafe: bool,
        progress: Callable[[str], None],
    ) -> None:
        self.model, self.loss, self.unsafe, self.say = model, loss, unsafe, progress
        self.began = time.perf_counter()
        self.ends = math.inf if budget is None else self.began + budget
        self.left = measurements
        self.before = self._examined(model)
        self.patient = Patient(model, self.before, loss)
        self.tried: list[Tried] = []
        self.best: tuple[nn.Module, Prescription | None, Diagnosis] = (model, None, self.before)
        self.note = ""

    def run(self) -> None:
        if not self.before.errors:
            self.note = "the flow is healthy: nothing to repair"
            return
        try:
            spare = SPARE
            for candidate in self._candidates():
                _, found, after = self.best
                if found is not None and not after.errors:  # healthy but for a warning
                    if spare == 0 or candidate.reach > found.reach:
                        return
                    spare -= 1
                if self._try(candidate):
                    return
            self.note = "no prescription makes the flow healthy"
        except KeyboardInterrupt:
            self.note = "interrupted: the best so far"
        except _Spent as spent:
            self.note = f"{spent}: the best so far"

    def result(self) -> Repair:
        model, rx, after = self.best
        seconds = time.perf_counter() - self.began
        cured = not after.errors
        note = "" if cured and rx is not None else self.note
        return Repair(cured, model, rx, self.before, after, tuple(self.tried), seconds, note)

    # -- candidates --------------------------------------------------------------------------------

    def _candidates(self) -> Iterator[Prescription]:
        if self.unsafe and _treated(self.patient, NARROWED) and depth_over_width(self.patient) >= NARROW:
            yield from self._smooth()
        activations: list[Prescription] = []
        for slug in (
            *ORDER,
            "leaky-activation",
        ):  # those behind the cure are not even looked for: LSUV runs the model
            for rx in self.prescribed(self.patient, {slug}):
                if rx.reach <= Reach.INITIALISATION:
                    yield rx
                else:
                    activations.append(rx)
        yield from activations
        yield from self._exchanges(self.patient)
        structural = self.prescribed(self.patient, set(slugs()) - FIRST - {exchange_activation.SLUG})
        yield from structural
        yield from self._with_weights(structural)
        yield from self._further()

    def prescribed(self, patient: Patient, among: set[str]) -> list[Prescription]:
        """Applicable prescriptions of these remedies that change the model, in the order in which they are tried."""
        found = [
            rx for rx in prescriptions(patient, among=among) if any(e.verb != "configure" for e in rx.edits)
        ]
        found = [rx for rx in found if self.unsafe or rx.safety is Safety.SAFE]
        rank = {slug: i for i, slug in enumerate(ORDER)}
        return sorted(found, key=lambda rx: (rx.reach, rank.get(rx.remedy, len(ORDER))))

    def _exchanges(self, patient: Patient) -> Iterator[Prescription]:
        """Another activation alone, then with weights drawn for it: one function after the other, as they are asked for."""
        if not self.unsafe or not _treated(patient, exchange_activation.TREATS):
            return
        flat = [
            n for n in exchange_activation.functions(patient.flow) if n not in exchange_activation.SELF_GATED
        ]
        for rx in exchange_activation.prescribe(patient):
            if not rx.applicable:
                continue
            yield rx
            if any(e.verb == "fill" for e in rx.edits):  # SELU brings its own weights
                continue
            exchanged = dict.fromkeys(flat, exchange_activation.target_of(rx))
            yield from _with_drawn(
                rx, patient, exchanged, (orthogonal_initialisation, critical_initialisation)
            )

    def _smooth(self) -> Iterator[Prescription]:
        """ELU with orthogonal weights, for networks deeper than they are wide."""
        names = [n for n in exchange_activation.functions(self.patient.flow) if n not in SMOOTH]
        if not names:
            return
        rx = exchange_activation.exchange(self.patient, names, "elu")
        if rx.applicable:
            exchanged = dict.fromkeys(names, "elu")
            yield from _with_drawn(rx, self.patient, exchanged, (orthogonal_initialisation,))

    def _with_weights(self, structural: list[Prescription]) -> Iterator[Prescription]:
        """A normalisation or skip together with orthogonal weights."""
        for drawn in orthogonal_initialisation.prescribe(self.patient):
            if drawn.applicable:
                for rx in structural:
                    try:
                        yield combined([rx, replace(drawn, decades=math.nan)])
                    except ValueError:  # it redraws or takes the place of the same weights
                        continue

    def _further(self) -> Iterator[Prescription]:
        """What is prescribed for the best so far, on top of it."""
        _, rx, after = self.best
        if rx is None or rx.key_map(self.model):  # names have changed: edits of both cannot be told together
            return
        for more in self.prescribed(Patient(self.best[0], after, self.loss), set(slugs())):
            try:
                yield replace(combined([rx, more]), decades=math.nan)
            except ValueError:
                continue

    # -- one candidate -----------------------------------------------------------------------------

    def _try(self, rx: Prescription) -> bool:
        """Is the model healthy with it, without a warning about depth?"""
        if any(rx.edits == known.prescription.edits for known in self.tried):
            return False
        limit = max(threshold(self.before.flow.layers), 2.0)
        if not math.isnan(rx.decades) and abs(rx.decades) > limit:
            self.tried.append(Tried(rx, f"theory expects {rx.decades:+.1f} decades: not measured"))
            return False
        if self.left <= 0:
            raise _Spent("the measurements are used up")
        if time.perf_counter() > self.ends:
            raise _Spent("the budget is used up")
        self.left -= 1
        self.say(f"candidate {len(self.tried) + 1}: {rx.title}")
        began = time.perf_counter()
        try:
            changed = apply(self.model, rx)
            after = self._examined(changed)
        except Exception as error:  # a shape that no longer fits, a model that cannot be copied: said
            self.tried.append(Tried(rx, f"could not be tried: {_first_line(error)}"))
            return False
        remaining, seconds = distance(after.flow), time.perf_counter() - began
        codes = ", ".join(f"{f.code} {f.name}" for f in after.errors)
        why = "healthy" if not after.errors else f"{codes}: {remaining:.1f} decades remain"
        if not after.errors and _warned(after):
            why = f"healthy, with a warning: {remaining:.1f} decades remain"
        self.tried.append(Tried(rx, why, remaining, after.verdict, seconds))
        if _badness(after) < _badness(self.best[2]):
            self.best = (changed, rx, after)
        return not after.errors and not _warned(after)

    def _examined(self, model: nn.Module) -> Diagnosis:
        return diagnose(along_time(measure(model, self.loss), model, self.loss))


def _with_drawn(
    rx: Prescription, patient: Patient, exchanged: dict[str, str], remedies: Iterable[ModuleType]
) -> Iterator[Prescription]:
    """An exchange of activations together with weights drawn for the new ones."""
    for remedy in remedies:
        for drawn in remedy.prescribe(replace(patient, exchanged=exchanged)):
            if drawn.applicable:
                yield replace(combined([rx, drawn]), decades=drawn.decades, expected=drawn.expected)


def depth_over_width(patient: Patient) -> float:
    """Sum of 1 / fan-in over the layers of a chain; 0 where skips pass the signal by (Hanin and Nica 2018)."""
    if patient.flow.splits:
        return 0.0
    return sum(1 / layer.fan_in for layer in layers(patient.flow, patient.model, {}) if layer.fan_in)


def _treated(patient: Patient, treats: tuple[str, ...]) -> bool:
    return any(finding.code in treats for finding in patient.diagnosis.findings)


class _Spent(Exception):
    """The budget of a search is used up."""


def _badness(diagnosis: Diagnosis) -> tuple[bool, bool, float]:
    return bool(diagnosis.errors), _warned(diagnosis), distance(diagnosis.flow)


def _warned(diagnosis: Diagnosis) -> bool:
    """A warning about the gradient along depth or time."""
    depth = ("VG", "EG", "RN")
    return any(f.code[:2] in depth and f.severity >= Severity.WARNING for f in diagnosis.findings)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


# -- judged by training --------------------------------------------------------------------------------


def short_training(loss: Loss, *, steps: int = 40, lr: float = 1e-3) -> Train:
    """A training to judge by where there is no other: Adam on the loss's own batch; minus the loss it ends at."""

    def train(model: nn.Module, seed: int) -> float:
        torch.manual_seed(seed)
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr)
        last: list[float] = []
        for _ in range(steps):
            optimizer.zero_grad()
            value = loss(model)
            value.backward()
            optimizer.step()
            last.append(float(value.detach()))
        tail = last[-max(steps // 10, 1) :]
        return -sum(tail) / len(tail)

    return train


def _judged(search: _Search, train: Train) -> Repair:
    """The search's result held against training; where the flow was healthy, candidates are trained too."""
    found = search.result()

    def score(model: nn.Module) -> float:
        with torch.random.fork_rng():
            value = float(train(copy.deepcopy(model), 0))
        return value if math.isfinite(value) else -math.inf

    before = score(search.model)
    found = replace(found, score_before=before)
    if found.prescription is not None:
        after = score(found.model)
        note = "" if after >= before else "the flow is healthy, but the model trains worse"
        return replace(
            found, cured=found.cured and after >= before, score_after=after, note=found.note or note
        )
    if found.before.errors:
        return found
    best, note = replace(found, score_after=before), f"{search.note}, and no change trains better"
    try:
        for rx in _for_training(search):
            if time.perf_counter() > search.ends:
                note = "the budget is used up: the best so far"
                break
            search.say(f"training with: {rx.title}")
            changed = apply(search.model, rx)
            after = search._examined(changed)
            value = score(changed) if not after.errors else -math.inf
            why = f"healthy, and the score goes from {before:.4g} to {value:.4g}"
            why = why if not after.errors else f"{', '.join(f.code for f in after.errors)} with it"
            search.tried.append(Tried(rx, why, distance(after.flow), after.verdict))
            if value > best.score_after + BETTER * abs(before):
                best = replace(
                    best, cured=True, model=changed, prescription=rx, after=after, score_after=value
                )
                note = ""
    except KeyboardInterrupt:
        note = "interrupted: the best so far"
    return replace(best, tried=tuple(search.tried), seconds=time.perf_counter() - search.began, note=note)


def _for_training(search: _Search) -> Iterator[Prescription]:
    """What changes how a healthy flow trains: the residual branches and where the normalisation stands."""
    for cause in ("residual-branch-growth", "post-norm"):
        for rx in prescriptions(search.patient, {cause}):
            changes = any(edit.verb != "configure" for edit in rx.edits)
            if rx.applicable and changes and (search.unsafe or rx.safety is Safety.SAFE):
                yield rx
