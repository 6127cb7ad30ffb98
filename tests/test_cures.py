"""Every remedy cures a case that needs it: a slice of `python -m gallery.cures` here, the table under `slow`."""

from __future__ import annotations

import math

import pytest

pytest.importorskip("sklearn")

from gallery.cures import DECADES, Cure, cures, measured
from isograd.remedies import NAMES

QUICK = {
    "adam_epsilon", "chrono_initialisation", "complete_p", "gated_recurrence", "insert_residual", "leave_out_factor", "loss_scale", "orthogonal_recurrence",
    "pass_logits", "query_key_norm", "safe_loss", "standardise_input", "standardise_weights", "truncate_backpropagation",
}  # fmt: skip


def named(cure: Cure) -> str:
    return f"{cure.remedy}: {cure.case} {cure.variant}".strip()


def test_every_remedy_has_a_case() -> None:
    assert {cure.remedy for cure in cures()} == set(NAMES)


@pytest.mark.parametrize(
    "cure",
    [pytest.param(c, marks=[] if c.remedy in QUICK else [pytest.mark.slow]) for c in cures()],
    ids=named,
)
def test_a_case_that_needs_the_remedy_is_cured_by_it(cure: Cure) -> None:
    row = measured(cure)
    assert not row.rx.why_not, row.rx.why_not
    assert row.sick, f"{row.before:.3g} {cure.unit} needs no remedy"
    assert row.cured, f"{row.before:.3g} -> {row.after:.3g} {cure.unit}"
    if cure.unit == DECADES and math.isfinite(row.rx.decades):
        assert row.after == pytest.approx(row.rx.decades, abs=1.5), "theory expected something else"
