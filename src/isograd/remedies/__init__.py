"""One file per cure: a page, the codes and causes it `TREATS`, and `prescribe(patient)`.

`prescribe` looks at the patient and yields a prescription for every variant of the cure that fits, or says
with `not_applicable` why none does. It changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from typing import Protocol, cast

from isograd.prescription import Patient, Prescription

NAMES = (
    "adam_epsilon",
    "batch_first",
    "batch_statistics",
    "chrono_initialisation",
    "classic_initialisation",
    "clip_gradients",
    "complete_p",
    "critical_initialisation",
    "deep_norm",
    "delta_orthogonal",
    "exchange_activation",
    "forget_bias",
    "gated_recurrence",
    "identity_blocks",
    "insert_normalisation",
    "insert_residual",
    "leaky_activation",
    "leave_out_factor",
    "loss_scale",
    "lower_dropout",
    "lower_learning_rate",
    "lsuv",
    "orthogonal_initialisation",
    "orthogonal_recurrence",
    "pass_logits",
    "pre_norm",
    "query_key_norm",
    "recurrent_initialisation",
    "rescale_weights",
    "reset_norm_epsilon",
    "reset_norm_gain",
    "safe_loss",
    "scale_embeddings",
    "scale_residual_branches",
    "standardise_input",
    "standardise_weights",
    "truncate_backpropagation",
    "warm_up",
    "zero_biases",
)


class Remedy(Protocol):
    """What a file of this folder holds."""

    SLUG: str
    TREATS: tuple[str, ...]

    def prescribe(self, patient: Patient) -> Iterator[Prescription]: ...


def remedies() -> Iterator[Remedy]:
    """Every remedy, in the order of `NAMES`."""
    for name in NAMES:
        yield cast(Remedy, import_module(f"isograd.remedies.{name}"))


def slugs() -> list[str]:
    """Names of all remedies."""
    return [remedy.SLUG for remedy in remedies()]
