"""What to change in a model, as data: edits with their places, how safe they are, what theory expects of them.

A remedy looks at a model and returns prescriptions; it changes nothing. An `Edit` names a place, a callable of
torch (or of `isograd.surgery`, `isograd.modules`, `isograd.calls`) and plain values. `apply` calls that callable there, and
`Prescription.to_code` prints the same calls in the same order, so that both do the same thing.

A remedy is a file of `isograd/remedies/`: its docstring is its page, `SLUG` its name, `TREATS` the codes and
causes that it is for, and `prescribe(patient)` yields a prescription for every variant, or one made by
`not_applicable` that says why there is none. `remedies/reset_norm_gain.py` is the shortest example.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import dataclass, field, replace
from enum import Enum, IntEnum
from textwrap import shorten
from typing import TYPE_CHECKING

import torch
from torch import nn

from isograd import surgery
from isograd.diagnosis import Diagnosis
from isograd.edit import Edit, Value, has, perform, printed
from isograd.flow import Flow
from isograd.graph.preserve import copied
from isograd.graph.traced import Loss, unwrapped
from isograd.warning import warn

if TYPE_CHECKING:
    from rich.text import Text


class Safety(Enum):
    """What an edit may do to the function that the model computes."""

    SAFE = "safe"
    """The same function, provably: every output is equal, up to rounding."""
    UNSAFE = "unsafe"
    """Another function: trained weights are lost or have to adapt."""
    ADVICE = "advice"
    """Words only: nothing that could be applied here."""


class Reach(IntEnum):
    """How deep a change goes into the model. Of two that cure, the lower is taken; edits are made in this order."""

    TRAINING = 0
    INITIALISATION = 1
    ACTIVATION = 2
    NORMALISATION = 3
    RESIDUAL = 4
    GATING = 5


@dataclass(frozen=True, repr=False)
class Prescription:
    """Edits of one remedy, what they are for and what is to be expected of them. Prints itself as a diff."""

    remedy: str
    """Slug of the remedy: `isograd explain SLUG` shows its page."""
    title: str
    """What is done, in a line: 'ReLU in place of 20 sigmoids'."""
    edits: tuple[Edit, ...] = ()
    safety: Safety = Safety.UNSAFE
    reach: Reach = Reach.INITIALISATION
    treats: tuple[str, ...] = ()
    """Codes of findings and slugs of causes."""
    expected: str = ""
    """What theory expects, in words."""
    decades: float = math.nan
    """Decades that theory expects to remain between head and input; NaN: no theory for this model."""
    references: tuple[str, ...] = ()
    advice: tuple[str, ...] = ()
    """What cannot be done for the user: lines to change by hand, what to do with an optimizer."""
    why_not: str = ""
    """Not applicable, because …: there are no edits then."""

    @property
    def applicable(self) -> bool:
        return not self.why_not and bool(self.edits)

    @property
    def configuration(self) -> dict[str, Value]:
        """What the training is to be given: {'clip_grad_norm': 1.0}."""
        return {e.place: e.arguments["value"] for e in self.edits if e.verb == "configure"}

    def __add__(self, other: Prescription) -> Prescription:
        return combined([self, other])

    def key_map(self, model: nn.Module) -> dict[str, str]:
        """State-dict keys of `model` that the edits change: old key -> new key. Empty: all are kept.

        Found on a copy. Load an old checkpoint with `{key_map.get(k, k): v for k, v in checkpoint.items()}`.
        """
        twin = _copied(unwrapped(model)[0])
        names = _names(twin)
        with surgery.drawing(twin, 0):
            for edit in self.edits:
                twin = perform(twin, edit)
        return _renamed(names, twin)

    def to_code(self) -> str:
        """Python that makes the same edits in the user's script: a function `repair(model)` that needs torch only."""
        from isograd.patch import code

        return code(self)

    # Rendering is imported when it is asked for: the core neither needs nor knows it.

    def __repr__(self) -> str:
        return self.__rich__().plain

    def __rich__(self) -> Text:
        from isograd.render.prescription import document

        return document(self)

    def to_json(self) -> str:
        from isograd.render.prescription import to_json

        return to_json(self)


@dataclass(frozen=True)
class Patient:
    """What a remedy looks at. It may read all of it and change nothing."""

    model: nn.Module
    diagnosis: Diagnosis
    loss: Loss | None = None
    """For remedies that need data; without it they say so."""
    exchanged: dict[str, str] = field(default_factory=dict[str, str])
    """Activation functions that another prescription exchanges: weights are drawn for what takes their place."""

    @property
    def flow(self) -> Flow:
        return self.diagnosis.flow

    @property
    def told(self) -> set[str]:
        """Codes of the findings, and the causes that they name."""
        found = self.diagnosis.findings
        return {f.code for f in found} | {str(f.evidence["cause"]) for f in found if "cause" in f.evidence}


def not_applicable(remedy: str, why: str, *advice: str) -> Prescription:
    """The honest answer of a remedy that has nothing to do here: 'not applicable, because `why`'."""
    return Prescription(remedy, "not applicable", safety=Safety.ADVICE, why_not=why, advice=advice)


def prescribe(diagnosis: Diagnosis, model: nn.Module, loss: Loss | None = None) -> list[Prescription]:
    """What could be done about the findings of a diagnosis, least invasive first.

    Args:
        diagnosis: of this model, by `check` or `diagnose`.
        model: looked at, not changed.
        loss: as for `check`; remedies that need data are not applicable without it.

    Returns:
        Applicable prescriptions by reach, those that a finding names before others of the same, then those that do not
        apply, each with the reason. Empty: nothing to treat.
    """
    patient = Patient(unwrapped(model)[0], diagnosis, loss)
    named = {slug for finding in diagnosis.findings for slug in finding.remedies}
    return sorted(
        prescriptions(patient), key=lambda rx: (not rx.applicable, rx.reach, rx.remedy not in named)
    )


def prescriptions(
    patient: Patient, wanted: Set[str] | None = None, among: Set[str] | None = None
) -> Iterator[Prescription]:
    """What every remedy says (or those `among` them) that treats one of these codes and causes.

    By default those of the diagnosis: the causes that were tested, the codes where none was.
    """
    from isograd.remedies import remedies  # a remedy imports the nouns of this file

    wanted = _wanted(patient.diagnosis) if wanted is None else wanted
    for remedy in remedies():
        treats = remedy.SLUG in wanted or wanted & set(remedy.TREATS)
        if treats and (among is None or remedy.SLUG in among):
            yield from remedy.prescribe(patient)


def _wanted(diagnosis: Diagnosis) -> set[str]:
    """Causes that were tested, where they were; codes and named remedies otherwise."""
    wanted: set[str] = set()
    for finding in diagnosis.findings:
        causes = str(finding.evidence.get("causes", finding.evidence.get("cause", "")))
        wanted |= set(finding.remedies) | {cause for cause in causes.split(",") if cause}
        if "causes" not in finding.evidence:
            wanted.add(finding.code)
    return wanted


def combined(prescriptions: Iterable[Prescription]) -> Prescription:
    """One prescription that makes the edits of all, in an order that does not depend on how they are listed.

    Weights are filled before modules are exchanged, and those before anything is wrapped around them. The same
    edit in two prescriptions is made once.

    Raises:
        ValueError: two edits of one place conflict.
    """
    ordered = sorted(prescriptions, key=lambda rx: (rx.reach, rx.remedy, rx.title))
    if not ordered:
        raise ValueError("no prescription to apply: prescribe(diagnosis, model) gives some")
    for rx in ordered:
        if rx.why_not:
            raise ValueError(f"{rx.remedy} is not applicable, because {rx.why_not}")
    edits: list[Edit] = []
    for rx in ordered:
        before = tuple(edits)
        for edit in rx.edits:
            if edit in before:
                continue
            for earlier in before:
                _agree(earlier, edit, rx)
            edits.append(edit)
    if len(ordered) == 1:
        return ordered[0]
    safest = all(rx.safety is Safety.SAFE for rx in ordered)
    return Prescription(
        " + ".join(dict.fromkeys(rx.remedy for rx in ordered)),
        "; ".join(rx.title for rx in ordered),
        tuple(edits),
        Safety.SAFE if safest else Safety.UNSAFE,
        max(rx.reach for rx in ordered),
        tuple(dict.fromkeys(t for rx in ordered for t in rx.treats)),
        "; ".join(rx.expected for rx in ordered if rx.expected),
        references=tuple(dict.fromkeys(r for rx in ordered for r in rx.references)),
        advice=tuple(dict.fromkeys(a for rx in ordered for a in rx.advice)),
    )


def _agree(earlier: Edit, later: Edit, rx: Prescription) -> None:
    """Edits of two prescriptions may not undo each other."""
    where = earlier.place or "the model"
    if earlier.place == later.place and earlier.verb == later.verb:
        apart = earlier.rows is not None and later.rows is not None and earlier.rows != later.rows
        if earlier.verb == "wrap" or apart or (earlier.verb == "alter" and earlier.of != later.of):
            return
        raise ValueError(
            f"two edits of {where} conflict: {printed(earlier)} and {printed(later)} ({rx.remedy}); apply one of them"
        )
    inside = later.place.startswith(f"{earlier.place}." if earlier.place else "")
    if earlier.verb in ("replace", "wrap") and inside and earlier.place != later.place:
        raise ValueError(
            f"two edits conflict: {later.place} ({rx.remedy}) lies in {where}, which {printed(earlier)} takes the "
            "place of; apply one of them, and prescribe for the result"
        )


def apply(
    model: nn.Module,
    rx: Prescription | Sequence[Prescription],
    *,
    in_place: bool = False,
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None = None,
    seed: int = 0,
) -> nn.Module:
    """Make the edits of one or several prescriptions on a deep copy of the model.

    Tied parameters stay tied; train/eval mode, `requires_grad`, device and number format are kept. The user's random
    numbers go on as if nothing had been drawn.

    Args:
        model: not touched unless `in_place`.
        rx: several may be listed in any order.
        in_place: change the model itself and return it.
        optimizer: follows to the returned model, or several do: their parameters are exchanged in their groups, and
            the state of what was refilled or is gone is dropped. An optimizer that is not given goes on training the
            old weights.
        seed: of what is drawn at random. A search measures the draw of seed 0.

    Raises:
        TypeError: the prescription was given in the place of the model.
        ValueError: nothing to apply, conflicting edits, another model than was prescribed for, one that cannot be
            copied, or an optimizer of another model.
    """
    if isinstance(model, Prescription) or isinstance(rx, nn.Module):
        raise TypeError("the model comes first: apply(model, rx)")
    whole = combined([rx] if isinstance(rx, Prescription) else rx)
    if not whole.edits:
        raise ValueError(f"{whole.remedy} has no edits to apply: {'; '.join(whole.advice) or whole.title}")
    model = unwrapped(model)[0]
    changed = model if in_place else _copied(model)
    old, names = dict(model.named_parameters()), _names(changed)
    given = [optimizer] if isinstance(optimizer, torch.optim.Optimizer) else list(optimizer or ())
    held = {id(p) for follows in given for group in follows.param_groups for p in group["params"]}
    if given and not any(id(p) in held for p in old.values()):
        raise ValueError("the optimizer trains no parameter of this model: give the one that was made for it")
    # a copied Keras model calls its parameters by other names, in the same order
    places = dict(zip(old, (name for name, _ in changed.named_parameters()), strict=False))
    with surgery.drawing(changed, seed):
        for edit in whole.edits:
            place = edit.place if edit.verb != "fill" else places.get(edit.place, edit.place)
            if edit.verb != "configure" and not has(changed, place, edit.verb):
                raise ValueError(f"the model has no {place}: {whole.remedy} was prescribed for another one")
            changed = perform(changed, replace(edit, place=place))
    if given:
        filled = {edit.place for edit in whole.edits if edit.verb == "fill"}
        left = surgery.rebind(given, old, changed, _renamed(names, changed), filled)
        if left:
            warn(
                f"new parameters are in no group of the optimizer, which trains others only: {', '.join(left)}; give "
                "apply all optimizers, or add_param_group to the one that is to train them"
            )
    return changed


class NoCopy(ValueError):
    """The model cannot be copied."""


def _copied(model: nn.Module) -> nn.Module:
    try:
        return copied(model)
    except Exception as error:
        why = shorten(str(error), 160, placeholder=" …")
        raise NoCopy(
            f"the model cannot be copied ({why}): apply(model, rx, in_place=True) changes the model itself"
        ) from error


def _names(model: nn.Module) -> dict[int, list[str]]:
    """State-dict keys by the identity of their tensor: tied parameters have several."""
    found: dict[int, list[str]] = {}
    for key, tensor in model.state_dict(keep_vars=True).items():
        found.setdefault(id(tensor), []).append(key)
    return found


def _renamed(old: dict[int, list[str]], model: nn.Module) -> dict[str, str]:
    new = _names(model)
    pairs = [pair for tensor, keys in old.items() for pair in zip(keys, new.get(tensor, ()), strict=False)]
    return {before: after for before, after in pairs if before != after}
