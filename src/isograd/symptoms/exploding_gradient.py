"""EG201 exploding-gradient: the gradient grows from layer to layer on its way to the input.

What it means
    The first layers receive a gradient many times larger than the head's. A learning rate that suits the
    one destroys the other: the loss spikes, weights grow without bound, and NaN values follow.

Why it happens
    Backpropagation multiplies the Jacobians of the layers, and a gain above 1 grows like sigma^L: weights
    drawn too large for the activation, residual branches that add up without normalisation, or batch
    normalisation without skip connections, which multiplies by about 1.2 per layer whatever the weights.

Evidence
    The decades between the output and the input side, from a backward that is rescaled at each backbone
    node and cannot overflow. Growth must be exponential (the median layer grows too): along a healthy
    residual stream the gradient grows like a power of depth, and that is no finding below 5 decades.
    From +3 decades SGD trained at no learning rate in 109 networks trained on digits
    (`python -m gallery.border`), at 30 layers and more from +2.

What helps
    An initialisation at the critical gain; residual branches scaled by 1/sqrt(depth); residual connections
    around batch-normalised layers; normalisation; gradient clipping and a lower learning rate as a stopgap.

References
    Pascanu et al. 2013; Yang et al. 2019, A Mean Field Theory of Batch Normalization; Zhang et al. 2019, Fixup.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from isograd.diagnosis import Finding, Severity
from isograd.flow import Flow
from isograd.symptoms import Healthy, Outcome, Unexamined
from isograd.symptoms.vanishing_gradient import threshold

CODE = "EG201"
NAME = "exploding-gradient"

ANYWAY = 5.0
"""Decades that no power law of a trainable depth reaches: sqrt(1000 blocks) is 1.5."""
EXPONENTIAL = 0.5
"""Share of the growth that the median layer alone must account for to call it exponential."""


def examine(flow: Flow) -> Iterator[Outcome]:
    """Decades gained along the main backbone and along those of the model's other inputs."""
    if flow.failure is not None or flow.nonfinite is not None:
        yield Unexamined("the gradient is not finite or the backward failed")
        return
    for line in (flow, *flow.towers):
        yield from _along(line)


def _along(flow: Flow) -> Iterator[Outcome]:
    grown, limit = flow.lost, max(threshold(flow.layers), 3 * flow.spread)
    if math.isnan(grown):
        yield Unexamined("no backbone between the loss and an input, so no product of gains")
        return
    exponential = flow.typical >= EXPONENTIAL * grown
    if grown < limit or (not exponential and grown < ANYWAY):
        kind = "exponential" if exponential else "not exponential"
        yield Healthy(f"{grown:+.1f} decades over {flow.layers} layers (an error from {limit:+.1f} if exponential; {kind})")
        return
    sigma = 10 ** (grown / max(len(flow.decades_by_layer), 1))
    column = flow.column("decades").nan_to_num(0.0)
    worst = [int(i) for i in column.argsort(descending=True)[:3] if column[i] > 0]
    factor = f"{10**grown:.0e}" if grown < 300 else f"10^{grown:.0f}"
    yield Finding(
        CODE,
        NAME,
        Severity.ERROR,
        f"{grown:+.1f} decades over {flow.layers} layers, sigma {sigma:.3g} per layer; "
        f"the first layers receive {factor} times the gradient at the head",
        sites=tuple(flow.sites[i].place for i in worst),
        evidence={
            "decades": grown,
            "decades_end_to_end": flow.decades,
            "layers": flow.layers,
            "sigma": sigma,
            "threshold": limit,
            "typical": flow.typical,
            "finite_width_spread": flow.spread,
        },
        remedies=("critical-initialisation", "scale-residual-branches", "insert-residual", "clip-gradients"),
    )
