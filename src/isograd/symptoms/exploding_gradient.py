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
    residual stream the gradient grows like a power of depth, and that is no finding below 4.5 decades.
    SGD trained at no learning rate from about +2.7 decades on, at 24 layers from +2 (109 networks on
    digits, `python -m gallery.border`). Where normalisation or residual connections hold the forward
    signal, it takes 4.5: shipped networks of that kind reach 4 and train. Where saturated units hold it, one decade is
    enough: inputs that are close are torn apart from layer to layer, which is chaos, and a pattern of signs is left.

What helps
    An initialisation at the critical gain; residual branches scaled by 1/sqrt(depth); residual connections
    around batch-normalised layers; normalisation; gradient clipping and a lower learning rate as a stopgap.

References
    Pascanu et al. 2013; Poole et al. 2016, Exponential expressivity through transient chaos; Yang et al. 2019, A Mean
    Field Theory of Batch Normalization; Zhang et al. 2019, Fixup.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from statistics import median

from isograd.diagnosis import Finding, Severity
from isograd.flow import Flow, per_layer
from isograd.graph.operations import ACTIVATIONS
from isograd.symptoms import Healthy, Outcome, Unexamined
from isograd.symptoms.vanishing_gradient import LUCK, expected

CODE = "EG201"
NAME = "exploding-gradient"

ERROR = 2.7
"""Decades that count up to 8 layers: +2.1 there still trains by SGD, +3.0 (He's weights times 3.3) does not."""
ERROR_DEEP = 2.0
"""The same at 24 layers: tanh of gain 3 over 20 layers, +2.4 decades, learned nothing at any rate."""
MOST_DEEP = 1.57
"""The line through both goes on to 33 layers and 1.6 decades: 1.1^50 left SGD at every rate with nothing."""
HELD = 4.5
"""Decades that count where normalisation or skips hold the forward signal, so that each layer's effective
step adapts to its gradient: batch normalisation without skips passes them after 54 layers; the steepest
healthy model of the zoo (an RWKV of 12 blocks) stays below."""
CHAOTIC = 1.0
"""Decades that count where the activations are saturated and so hold the forward signal: tanh networks of 3 to 12 layers
trained on digits with weights 3 to 10 times Xavier's lost 17 to 43% of their lead at 1.0 to 1.6 decades, 60% and more
beyond 2, and 2 to 12% at 0.4 to 0.8."""
SATURATED = 1 / 3
"""Share of its units that are saturated in the median activation of such a network: at twice Xavier's weights 0.15."""
COORDINATES = 4
"""Features of an input that are coordinates: a network has to make high frequencies of them first, and chaos does (Tancik
et al. 2020, Fourier features let networks learn high frequency functions in low dimensional domains)."""
EXPONENTIAL = 0.4
"""Share of the gradient's growth that the median layer alone, and the growth of the signal, must account for where nothing
holds it: a half in decoders of 12 blocks without any norm, which learn nothing; a tenth and 0.39 in that RWKV."""


def examine(flow: Flow) -> Iterator[Outcome]:
    """Decades gained along the main backbone and along those of the model's other inputs."""
    if flow.failure is not None or flow.nonfinite is not None:
        yield Unexamined("the gradient is not finite or the backward failed")
        return
    for line in (flow, *flow.towers):
        yield from _along(line)


def _along(flow: Flow) -> Iterator[Outcome]:
    grown, limit = flow.lost, max(_threshold(flow), LUCK * flow.spread)
    if math.isnan(grown):
        yield Unexamined("no backbone between the loss and an input, so no product of gains")
        return
    if grown < limit:
        yield Healthy(f"{grown:+.1f} decades over {flow.lost_over} layers (an error from {limit:+.1f})")
        return
    sigma = per_layer(grown, max(flow.lost_over, 1))
    column = flow.column("decades").nan_to_num(0.0)
    worst = [int(i) for i in column.argsort(descending=True)[:3] if column[i] > 0]
    factor = f"{10**grown:.0e}" if grown < 300 else f"10^{grown:.0f}"
    yield Finding(
        CODE,
        NAME,
        Severity.ERROR,
        f"{grown:+.1f} decades over {flow.lost_over} layers, sigma {sigma:.3g} per layer; "
        f"the first layers receive {factor} times the gradient at the head",
        sites=tuple(flow.sites[i].place for i in worst),
        evidence={
            "decades": grown,
            "decades_end_to_end": flow.decades,
            "layers": flow.lost_over,
            "sigma": sigma,
            "threshold": limit,
            "typical": flow.typical,
            "finite_width_spread": flow.spread,
            **expected(flow),
        },
        remedies=("critical-initialisation", "scale-residual-branches", "insert-residual", "clip-gradients"),
    )


def _threshold(flow: Flow) -> float:
    """Decades that count as an error for this network."""
    bounded = [a.saturated for a in flow.activations if a.carries and ACTIVATIONS[a.function].bounded]
    if bounded and median(bounded) >= SATURATED and not of_coordinates(flow):
        return CHAOTIC
    hidden = flow.sites[flow.hidden]
    holding = sum(
        site.kind in ("residual add", "normalisation")
        or any(step.site.kind == "normalisation" for step in flow.ledgers.get(site.depth, ()))
        for site in hidden
    )
    exponential = flow.typical >= EXPONENTIAL * flow.lost
    growing = flow.growth >= EXPONENTIAL * flow.lost and exponential
    if holding >= flow.layers / 3 and not growing:
        return HELD
    share = min(max((flow.layers - 8) / 16, 0.0), MOST_DEEP)
    return ERROR + share * (ERROR_DEEP - ERROR)


def of_coordinates(flow: Flow) -> bool:
    """Does the first layer read so few features that they are coordinates?"""
    first = min((p for p in flow.parameters if p.fan_in), key=lambda p: p.depth, default=None)
    return first is None or first.fan_in <= COORDINATES
