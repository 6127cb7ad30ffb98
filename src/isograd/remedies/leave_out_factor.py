"""leave-out-factor: a constant that the signal is multiplied by or clamped to, and that costs it, is left out.

What it does
    Lets the call at the user's line give the tensor itself in place of its product with a number: a temperature or
    scale between head and loss, factors between the layers that add up to decades, one that mutes residual branches, saturates the
    function behind it or makes the logits of attention too large; and in place of a clamp that most of it lies beyond. The line
    to edit is shown.
    Cosines, which no weights can make larger, are divided by what they are multiplied by: a temperature belongs there.

When it helps
    Where nothing but the constant is wrong. Weights that make up for it would have to be as far off, and an optimizer whose
    steps have a size of their own, as Adam's, would move them by too much or next to nothing.

Expected effect
    Signal and gradient as if the factor were 1.

Safety
    Unsafe: the model computes another function. Learned scales are left alone, and so is what the loss is multiplied by.

References
    Hinton et al. 2015, arXiv:1503.02531, on temperatures; Yang et al. 2022, arXiv:2203.03466, on the multiplier of the output.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

from isograd.edit import Edit
from isograd.prescription import Patient, Prescription, Reach, not_applicable
from isograd.remedies.exchange_activation import line_of
from isograd.statistics import Site
from isograd.symptoms import (
    far_start,
    muted_branches,
    saturated_attention,
    saturated_units,
    shrunk_output,
    vanishing_gradient,
)

SLUG = "leave-out-factor"
TREATS = (
    "factor", shrunk_output.CODE, muted_branches.CODE, vanishing_gradient.CODE, far_start.CODE, saturated_units.CODE,
    saturated_attention.CODE,
)  # fmt: skip


def prescribe(patient: Patient) -> Iterator[Prescription]:
    """The constants that the findings are about, at their lines in the model."""
    costly = _costly(patient)
    picked = saturated_attention.multiplied(patient.flow) if saturated_attention.CODE in patient.told else {}
    if lines := _lines(picked):
        times = max(picked.values())
        yield _without(
            lines,
            f"logits of attention without their factor of {times:.3g}",
            times,
            tuple(dict.fromkeys(saturated_attention.divided(site) for site in picked)),
        )
    if not costly:
        if not lines:
            yield not_applicable(
                SLUG, "the signal is multiplied by no constant that costs it, and clamped to none"
            )
        return
    lines = _lines(costly)
    by_hand = tuple(dict.fromkeys(shrunk_output.leave_out(site) for site in costly))
    if not lines:
        yield not_applicable(SLUG, "the lines that multiply are not known", *by_hand)
        return
    if shrunk_output.CODE in patient.told and shrunk_output.cosines(patient.flow):
        yield _without(
            lines,
            "cosines divided by their temperature, not multiplied",
            math.prod(costly.values()) ** 2,
            by_hand,
            True,
        )
    abreast = muted_branches.CODE in patient.told
    whole = min(costly.values()) if abreast else math.prod(costly.values())
    clamps = sum(site.operation in shrunk_output.CLIPS for site in costly)
    said = f"{len(costly)} constant factors left out, {whole:.2g} {'the smallest' if abreast else 'in all'}"
    if clamps:
        said = f"{clamps} clamps left out" + (
            f", and {len(costly) - clamps} factors" if len(costly) > clamps else ""
        )
    yield _without(lines, said, whole, by_hand)


def _lines(sites: Iterable[Site]) -> dict[tuple[str, str], dict[str, None]]:
    """Where they are written, by module and operation."""
    lines: dict[tuple[str, str], dict[str, None]] = {}
    for site in sites:
        if site.source:
            lines.setdefault((site.module, site.operation), {})[line_of(site.source)] = None
    return lines


def _without(
    lines: dict[tuple[str, str], dict[str, None]],
    title: str,
    times: float,
    by_hand: tuple[str, ...],
    inverse: bool = False,
) -> Prescription:
    """The calls at these lines without the number that they multiply by, or with its inverse."""
    how = {"inverse": True} if inverse else {}
    return Prescription(
        SLUG,
        title,
        tuple(
            Edit(
                module,
                "alter",
                "calls.leave_out_factor",
                {"of": of, "lines": tuple(found), **how},
                before=f"{of} by a constant",
            )
            for (module, of), found in lines.items()
        ),
        reach=Reach.INITIALISATION,
        treats=TREATS,
        expected=f"{-math.log10(times):+.1f} decades of signal and gradient"
        if times != 1
        else "what lay beyond the clamps receives a gradient",
        references=("Yang et al. 2022, arXiv:2203.03466",),
        advice=by_hand,
    )


def _costly(patient: Patient) -> dict[Site, float]:
    """What the findings blame, or would, and its size: only what makes the signal small, or the output far too large."""
    flow, codes = patient.flow, patient.told
    found: list[Site] = []
    if shrunk_output.CODE in codes:
        found += [site for site in shrunk_output.behind_the_head(flow) if flow.factors[site.depth] < 1]
    if vanishing_gradient.CODE in codes:
        found += vanishing_gradient.costly(flow)
    if far_start.CODE in codes:
        site, _ = far_start.loudest(flow)
        found += [site] if site is not None and site.depth in flow.factors else []
    if saturated_units.CODE in codes:
        found += saturated_units.pushing(flow)
    along = {site: flow.factors.get(site.depth, 1.0) for site in found}
    muted = muted_branches.constants(flow) if muted_branches.CODE in codes else {}
    return along | {site: times for inside in muted.values() for site, times in inside}
