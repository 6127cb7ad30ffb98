"""What a chain of operations should do to the signal and to the gradient, from the real input on.

Each operation carries the second moments of the signal forward (Poole et al. 2016, arXiv:1606.05340) and says by
how much it multiplies the squared *norm* of the gradient on the way back. With random weights W of
standard deviation s, ||W^T u||^2 = fan_in s^2 ||u||^2 on average, whatever the two widths are, and the same
holds for a convolution with fan_in = input channels x kernel size away from its border.

The mean of log ||gradient|| over draws of the weights lies below the log of that factor, and scatters:
both follow from the widths, to first order in 1/width.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

LN10 = math.log(10)


@dataclass(frozen=True, slots=True)
class Signal:
    """Second moments of a layer's output over its units and samples."""

    q: float
    """Mean square."""
    mean: float = 0.0
    """Mean over the units: what a LayerNorm takes off."""
    shared: float = 0.0
    """Mean product of one unit in two samples: what a BatchNorm takes off. At most q; NaN: nobody asks for it."""
    width: float = math.inf
    """Units: they average the random weights; of a convolution, its channels."""

    @property
    def rms(self) -> float:
        return math.sqrt(self.q)


@dataclass(frozen=True, slots=True)
class Response:
    """What one operation, or several in a row, does: factors on average, and their scatter over draws.

    With d the deviation of log q at its input, log chi = mean + sensitivity d + a and
    log q' = mean + elasticity d + e, where a and e scatter with the weights.
    """

    signal: Signal
    """Its output."""
    chi: float
    """Factor on the squared norm of the gradient."""
    variance: float = 0.0
    """Var a."""
    bias: float = 0.0
    """E a: a logarithm is concave."""
    sensitivity: float = 0.0
    elasticity: float = 0.0
    noise: float = 0.0
    """Var e."""
    drift: float = 0.0
    """E e."""
    joint: float = 0.0
    """Cov(a, e)."""

    def then(self, after: Response) -> Response:
        """Both in a row, this one nearer to the input."""
        return Response(
            signal=after.signal,
            chi=self.chi * after.chi,
            variance=self.variance
            + after.variance
            + after.sensitivity**2 * self.noise
            + 2 * after.sensitivity * self.joint,
            bias=self.bias + after.bias + after.sensitivity * self.drift,
            sensitivity=self.sensitivity + after.sensitivity * self.elasticity,
            elasticity=self.elasticity * after.elasticity,
            noise=after.elasticity**2 * self.noise + after.noise,
            drift=after.elasticity * self.drift + after.drift,
            joint=after.elasticity * (self.joint + after.sensitivity * self.noise) + after.joint,
        )

    @property
    def decades(self) -> float:
        """Mean of log10 of the factor on the norm of the gradient, over draws of the weights."""
        return (math.log(self.chi) + self.bias) / (2 * LN10) if self.chi > 0 else -math.inf

    @property
    def spread(self) -> float:
        """Standard deviation of the same, in decades."""
        return math.sqrt(max(self.variance, 0.0)) / (2 * LN10)

    @property
    def gain(self) -> float:
        """Factor on the norm of the gradient, root mean square over draws."""
        return math.sqrt(self.chi)


class Operation(Protocol):
    """Something a signal passes through."""

    def response(self, signal: Signal) -> Response: ...


def propagate(chain: Iterable[Operation], signal: Signal) -> Response:
    """The response of operations in a row, input first."""
    total = Response(signal, 1.0, elasticity=1.0)
    for operation in chain:
        total = total.then(operation.response(total.signal))
    return total


@dataclass(frozen=True, slots=True)
class Expected:
    """What theory expects of a chain: one response per operation, input first, and all in a row."""

    steps: tuple[Response, ...]
    total: Response

    @property
    def decades(self) -> float:
        """log10 of gradient norm at the input over that at the output: the mean over draws of the weights."""
        return self.total.decades

    @property
    def spread(self) -> float:
        """Standard deviation of `decades` over draws of the weights."""
        return self.total.spread


def expected(chain: Sequence[Operation], *, rms: float, shared: float = 0.0) -> Expected:
    """What the signal and the gradient should be along a chain, from the real input and not from a fixed point.

    Args:
        chain: operations, input first.
        rms: root mean square of the input.
        shared: mean product of one input feature in two samples (the mean square of the batch's mean);
            only a BatchNorm asks for it.

    Returns:
        `steps[i].signal` the output of operation i, `steps[i].gain` its factor on the norm of the gradient,
        `steps[i].decades` the mean of its logarithm; `decades` and `spread` of the whole chain.

    Raises:
        ValueError: rms is not positive, an activation is unknown, or the signal becomes exactly zero.
    """
    if not 0 < rms < math.inf:
        raise ValueError(f"the input's rms must be positive and finite; got {rms:g}")
    total, steps = Response(Signal(rms**2, shared=shared), 1.0, elasticity=1.0), list[Response]()
    for operation in chain:
        steps.append(operation.response(total.signal))
        total = total.then(steps[-1])
    return Expected(tuple(steps), total)
