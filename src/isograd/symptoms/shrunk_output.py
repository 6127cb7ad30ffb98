"""VG108 shrunk-output: next to nothing of what the head says reaches the loss.

What it means
    Between the head and the loss the output is multiplied by a small constant, or clipped to a narrow range. All
    classes look alike to the loss, and it falls only once the weights of the head have grown by as much as was taken,
    which SGD never does and Adam takes thousands of steps for. No gradient is lost between the layers.

Why it happens
    A temperature that divides where it should multiply, a scale that was meant for another head, a clamp to the
    range of something else. A factor that is learned, or small beside what the head gives, is healthy.

Evidence
    The product of all constants behind the last layer with weights, which scale signal and gradient alike, and the range
    of what the loss is given. Of cosines, products of normalised vectors, the range that they can have. A factor of the loss
    itself is none of the output.

What helps
    Without the factor, or with one nearer to 1. A temperature divides.

References
    Hinton et al. 2015, Distilling the Knowledge in a Neural Network, on temperatures; Yang et al. 2022, Tensor Programs V,
    on the multiplier of the output.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import takewhile

from isograd.diagnosis import Finding, Severity
from isograd.flow import Flow
from isograd.graph.operations import LOSSES
from isograd.losses import NORMALISED_LOG, OF_CLASSES, REGRESSIONS
from isograd.statistics import Site
from isograd.symptoms import Healthy, Outcome, Unexamined
from isograd.symptoms.no_gradient_at_loss import VIEWS

CODE = "VG108"
NAME = "shrunk-output"

FACTOR = 0.03
"""Constant behind the head: at 0.1 a classifier of digits still learns in 150 steps of Adam at 1e-3, at 0.03 it has lost a
sixth of its lead, at 0.01 half of it, and SGD two thirds at all of them. Published multipliers lie above 0.04."""
CLIPS = {"clamp", "clip", "hardtanh"}
FLAT = 0.3
"""Logits, from the smallest to the largest, that make all classes alike; of values the share of the targets' scatter."""


def examine(flow: Flow) -> Iterator[Outcome]:
    """Constants and clips between the head and the loss."""
    if flow.failure is not None or not math.isfinite(flow.loss):
        yield Unexamined("the loss is not finite or the backward failed")
        return
    yield (
        _shrunk(flow)
        or _confined(flow)
        or _cosines(flow)
        or Healthy("no constant behind the head shrinks what it says")
    )


def _shrunk(flow: Flow) -> Finding | None:
    """A constant behind the head by which hardly anything of its output reaches the loss: a temperature, a forgotten scale."""
    call = next((c for c in flow.losses if c.function in OF_CLASSES | REGRESSIONS), None)
    behind = behind_the_head(flow)
    if call is None or not behind:
        return None
    small = call.input_max - call.input_min if call.function in OF_CLASSES else call.excess
    times = math.prod(flow.factors[site.depth] for site in behind)
    if not small < FLAT or times > FACTOR:
        return None
    site = min(behind, key=lambda one: flow.factors[one.depth])
    return Finding(
        CODE,
        NAME,
        Severity.ERROR,
        f"what the head gives is multiplied by {times:.2g} before {call.function}: its weights have to grow "
        f"{1 / times:.0f} times before the loss can fall",
        cause=f"the factor of {site.name}; the layers are not to blame",
        sites=(site.place,),
        evidence={
            "factor": times,
            "threshold": FACTOR,
            "spread": small,
            "cause": "factor",
            "causes": "factor",
        },
        remedies=(leave_out(site),),
    )


def behind_the_head(flow: Flow) -> list[Site]:
    """The constants between the last layer with weights and the loss."""
    layers = flow.weighted
    after = flow.sites[layers[-1] + 1 :] if layers else ()
    inside = takewhile(lambda site: site.operation not in LOSSES | NORMALISED_LOG, after)
    return [site for site in inside if site.depth in flow.factors]


def _confined(flow: Flow) -> Finding | None:
    """Logits that are clipped to so small a range that no class can win."""
    inside = [site for site in flow.sites if site.kind != "loss" and site.operation not in VIEWS]
    if (
        not inside
        or inside[-1].operation not in CLIPS
        or not any(c.function in OF_CLASSES for c in flow.losses)
    ):
        return None
    site = inside[-1]
    bounds = site.numbers
    if len(bounds) != 2 or max(bounds) - min(bounds) >= FLAT:
        return None
    return Finding(
        CODE,
        NAME,
        Severity.ERROR,
        f"{site.name} leaves the logits a range of {max(bounds) - min(bounds):.2g}, in which no class can win",
        cause=f"a {site.operation} before a loss of logits; the layers are not to blame",
        sites=(site.place,),
        evidence={"low": min(bounds), "high": max(bounds), "threshold": FLAT, "cause": "clipped-output"},
        remedies=(f"{site.source or site.name}: pass the logits as they are",),
    )


def _cosines(flow: Flow) -> Finding | None:
    """Cosines times a constant, within which no class can win, whatever is learned."""
    behind = cosines(flow)
    if not behind:
        return None
    site, times = (
        min(behind, key=lambda one: flow.factors[one.depth]),
        math.prod(flow.factors[s.depth] for s in behind),
    )
    return Finding(
        CODE,
        NAME,
        Severity.ERROR,
        f"the logits are cosines times {times:.2g}: within a range of {2 * times:.2g} no class can win, whatever is learned",
        cause=f"the factor of {site.name}: a temperature that multiplies where it should divide",
        sites=(site.place,),
        evidence={"factor": times, "threshold": FLAT / 2, "cause": "factor", "causes": "factor"},
        remedies=(f"{site.source or site.name}: divide by the temperature, 0.05 to 0.1",),
    )


def cosines(flow: Flow) -> list[Site]:
    """The constants behind products of normalised vectors, where they leave classes less than a range of FLAT.

    No weights can make such logits any larger.
    """
    inside = [site for site in flow.sites if site.kind != "loss" and site.operation not in NORMALISED_LOG]
    product = next((site for site in reversed(inside) if site.kind == "product"), None)
    behind = behind_the_head(flow)
    if product is None or not behind or not any(c.function in OF_CLASSES for c in flow.losses):
        return []
    after = {site for site in inside[product.depth + 1 :] if site.kind != "reshape"}
    confined = 2 * math.prod(flow.factors[site.depth] for site in behind) < FLAT
    return behind if confined and after <= set(behind) and _of_unit(flow, product, behind) else []


def _of_unit(flow: Flow, product: Site, factors: list[Site]) -> bool:
    """Are both of the vectors of norm 1 that are multiplied here?

    Of two towers on one input both are seen inside of the product. Else the nearest site before it is normalised, and
    the product, as one with vectors of norm 1 does, keeps the root mean square.
    """
    normed = [s for s in flow.ledgers.get(product.depth, ()) if _unit(s.site, s.activation_rms)]
    if len(normed) == 2:
        return True
    rms = flow.column("activation_rms").tolist()
    before = [s for s in flow.sites[: product.depth] if s not in factors and s.kind != "reshape"]
    kept = rms[product.depth] / rms[product.depth - 1] if product.depth else math.nan
    return bool(before) and _unit(before[-1], rms[before[-1].depth]) and 0.5 < kept < 2


def _unit(site: Site, rms: float) -> bool:
    width = site.shape[-1] if site.shape else 0
    return site.kind == "normalisation" and not site.parameters and abs(rms * math.sqrt(width) - 1) < 0.1


def leave_out(site: Site) -> str:
    """What to do about a constant that the user's code multiplies by or clamps to."""
    what = (
        "widen the clamp, or leave it out"
        if site.operation in CLIPS
        else "leave the factor out, or bring it nearer to 1"
    )
    return f"{site.source or site.name}: {what}"
