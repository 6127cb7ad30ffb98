"""One file per thing that goes wrong: a page, a threshold with its reason, and `examine(flow)`.

`examine` yields findings, or says with what evidence all is well, or why it could not look.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module

from isograd.diagnosis import Finding
from isograd.flow import Flow


@dataclass(frozen=True, slots=True)
class Healthy:
    """Examined and found well."""

    evidence: str


@dataclass(frozen=True, slots=True)
class Unexamined:
    """Could not be examined."""

    why: str


Outcome = Finding | Healthy | Unexamined

NAMES = (
    "failed_backward",
    "nonfinite_forward",
    "nonfinite_backward",
    "no_gradient_at_loss",
    "unnormalised_input",
    "vanishing_gradient",
    "epsilon_above_variance",
    "rank_collapse",
    "muted_normalisation",
    "hidden_initialisation",
    "loud_biases",
    "loud_dropout",
    "damped_skips",
    "muted_branches",
    "shrunk_output",
    "exploding_gradient",
    "exploding_activation",
    "far_start",
    "gradient_underflow",
    "dead_units",
    "saturated_units",
    "saturated_attention",
    "parameter_without_gradient",
    "first_update_too_large",
    "first_update_too_small",
    "mixed_samples",
    "short_horizon",
    "exploding_recurrence",
    "closed_gates",
)

STREAMED = (
    "nonfinite_step",
    "fading_gradient",
    "dying_units",
    "ordered_data",
    "recurring_jumps",
    "uncleared_gradient",
    "steps_too_large",
    "growing_gradient",
    "diverging",
    "loss_spike",
    "norm_drift",
    "growing_weights",
    "early_layers_not_moving",
    "steps_too_small",
    "plateau",
)
"""Those that show in a run: each page has a `Detector` that is fed with every step."""


def symptoms() -> Iterator[tuple[str, Callable[[Flow], Iterator[Outcome]]]]:
    """Code and `examine` of every symptom, in the order in which they are told."""
    for name in NAMES:
        module = import_module(f"isograd.symptoms.{name}")
        yield module.CODE, module.examine


def unmeasured_in_time(flow: Flow) -> Outcome:
    """What is to be said of time where no horizon was measured."""
    if any(site.kind == "recurrent" for site in flow.sites):
        return Unexamined(flow.unexamined.get("time") or "measured by `check` and by `isograd horizon`")
    return Healthy("nothing recurs along time")
