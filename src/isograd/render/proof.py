"""The text and the JSON of a proof."""

from __future__ import annotations

import json
import math
import textwrap
from typing import Any

from rich.text import Text

from isograd.paired import Difference
from isograd.proof import AFTER, BEFORE, RANDOM, RATE, Arm, Proof
from isograd.render.numbers import decades, minus, signal
from isograd.render.text import WIDTH

WORDS = {RANDOM: "a random edit of the same kind", RATE: "the best learning rate alone"}


def sentence(proof: Proof) -> str:
    """The result in plain words, with its numbers."""
    before, after, effect = proof.arms[BEFORE], proof.arms[AFTER], proof.effect
    scores = f"{_number(after.mean)} against {_number(before.mean)}, {_interval(effect)}"
    if not proof.independent:
        return (
            f"Nothing is proven: every seed gives the same score ({_number(after.mean)} against "
            f"{_number(before.mean)}), so that the pairs are one and the same."
        )
    if effect.worse:
        return f"The repair does harm: {scores}."
    if not effect.better:
        return f"The repair does not help, as far as {effect.n} seeds can tell: {scores}."
    said = f"The repair helps: {scores}"
    equalled = proof.equalled
    if equalled:
        names = " and ".join(WORDS[name] for name in equalled)
        shown = ", ".join(f"{_number(proof.arms[name].mean)} with {WORDS[name]}" for name in equalled)
        return f"{said}; but not surely more than {names} ({shown})."
    if not (controls := [name for name in WORDS if name in proof.arms]):
        return f"{said}; no control was run beside it."
    shown = ", ".join(f"{_number(proof.arms[name].mean)}" for name in controls)
    return f"{said}; more than {' and '.join(WORDS[name] for name in controls)} ({shown})."


def document(proof: Proof) -> Text:
    """The sentence, then every arm with its scores, the gradient, and what was not run."""
    text = Text()
    title, style = (
        ("proven", "bold green")
        if proof.proven
        else ("helps", "bold yellow")
        if proof.helps
        else ("not proven", "bold red")
    )
    said = textwrap.fill(sentence(proof), WIDTH, initial_indent="  ", subsequent_indent="  ")
    text.append(title, style).append(f"  {proof.prescription.title}\n{said}")
    rows = [("", "mean", "by seed", "s")]
    for arm in proof.arms.values():
        name = f"{arm.name} {arm.said}".strip()
        rows.append((name, _number(arm.mean), " ".join(map(_number, arm.scores)), signal(arm.seconds)))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    for i, (name, mean, scores, seconds) in enumerate(rows):
        line = f"\n  {name:<{widths[0]}}  {mean:>{widths[1]}}  {scores:<{widths[2]}}  {seconds:>{widths[3]}}"
        text.append(line, "dim" if i == 0 else "")
    if flow := _flow(proof.decades):
        text.append("\n  gradient  ", "dim").append(flow)
    for name, why in proof.unrun.items():
        text.append("\n  not run   ", "dim").append(f"{name}: {why}")
    for note in proof.notes:
        text.append("\n  note      ", "dim").append(note)
    return text


def _flow(values: tuple[float, float, float]) -> str:
    words = ("before", "expected after", "after")
    shown = [
        f"{decades(value)} {word}" for value, word in zip(values, words, strict=True) if not math.isnan(value)
    ]
    return f"{', '.join(shown)} (decades between head and input)" if shown else ""


def _number(value: float) -> str:
    return "-" if math.isnan(value) else minus(f"{value:.3f}")


def _interval(effect: Difference) -> str:
    probability = "p < 0.001" if effect.p < 0.001 else f"p = {effect.p:.3f}"
    bounds = f"95% {effect.low:+.3f} to {effect.high:+.3f}"
    return minus(f"{effect.mean:+.3f} ({bounds}, {probability}, {effect.n} seeds)")


def to_json(proof: Proof) -> str:
    """Strict JSON: null where nothing finite is known."""
    before, expected, after = proof.decades
    content = {
        "prescription": proof.prescription.title,
        "remedy": proof.prescription.remedy,
        "proven": proof.proven,
        "helps": proof.helps,
        "sentence": proof.sentence,
        "seeds": list(proof.seeds),
        "arms": {name: _arm(arm) for name, arm in proof.arms.items()},
        "effect": _difference(proof.effect),
        "against": {
            name: _difference(proof.against(name)) for name in proof.arms if name not in (BEFORE, AFTER)
        },
        "decades": {"before": _finite(before), "expected": _finite(expected), "after": _finite(after)},
        "unrun": proof.unrun,
        "notes": list(proof.notes),
    }
    return json.dumps(content, indent=2, allow_nan=False) + "\n"


def _arm(arm: Arm) -> dict[str, Any]:
    return {
        "mean": _finite(arm.mean),
        "scores": [_finite(score) for score in arm.scores],
        "seconds": _finite(arm.seconds),
        "said": arm.said,
        "errors": list(arm.errors),
    }


def _difference(found: Difference) -> dict[str, float | int | None]:
    return {
        "mean": found.mean,
        "low": found.low,
        "high": found.high,
        "p": found.p,
        "cohen_d": _finite(found.size),
        "n": found.n,
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
