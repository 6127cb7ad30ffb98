"""The operations and blocks that networks are made of, as theory sees them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from isograd.theory.chain import LN10, Operation, Response, Signal, propagate
from isograd.theory.quadrature import Moments, Phi, activation


@dataclass(frozen=True, slots=True)
class Linear:
    """A dense or convolutional layer with independent random weights and biases of mean zero.

    fan_in is input units, or input channels x kernel size; fan_out is output units, or output channels.
    An orthogonal or delta-orthogonal weight of gain g has weight_std = g / sqrt(max(fan_in, fan_out)), the same
    factor, and, where it is square, no scatter of its own.
    """

    fan_in: int
    fan_out: int
    weight_std: float
    bias_std: float = 0.0
    orthogonal: bool = False

    def response(self, signal: Signal) -> Response:
        chi, bias = self.fan_in * self.weight_std**2, self.bias_std**2
        q = chi * signal.q + bias
        scatter, noise = (0.0, 0.0) if self.orthogonal else (2 / self.fan_in, 2 / self.fan_out)
        return Response(
            Signal(q, 0.0, chi * signal.shared + bias, self.fan_out),
            chi,
            variance=scatter,
            bias=-scatter / 2,
            elasticity=chi * signal.q / q if q > 0 else 0.0,
            noise=noise,
            drift=-noise / 2,
        )


DIGITS = 3
"""Of a variance, to which the correlation of two samples is taken behind an activation."""


@dataclass(frozen=True, slots=True)
class Elementwise:
    """An activation function, on pre-activations that are Gaussian with mean zero."""

    phi: Phi

    def response(self, signal: Signal) -> Response:
        if signal.q == 0:
            raise ValueError("a signal that is exactly zero has no gain through an activation")
        m = self.moments(signal.q)
        shared = self._shared(signal, m)
        if m.slope_square == 0:
            return Response(Signal(m.square, m.mean, shared, signal.width), 0.0)
        sensitivity, elasticity = m.slope_growth / m.slope_square, m.square_growth / m.square
        scatter = 3 * (m.slope_fourth / m.slope_square**2 - 1) / signal.width
        spread = (m.fourth / m.square**2 - 1) / signal.width
        joint = (m.joint / (m.square * m.slope_square) - 1) / signal.width
        # Units drawn from a Gaussian scatter in size, which came with the signal already, and in shape.
        size = 2 / signal.width
        return Response(
            Signal(m.square, m.mean, shared, signal.width),
            m.slope_square,
            variance=scatter - size * sensitivity**2,
            bias=-scatter / 2 + size / 2 * sensitivity,
            sensitivity=sensitivity,
            elasticity=elasticity,
            noise=spread - size * elasticity**2,
            drift=-spread / 2 + size / 2 * elasticity,
            joint=joint - size * sensitivity * elasticity,
        )

    def _shared(self, signal: Signal, m: Moments) -> float:
        """E phi(u) phi(v) of two samples."""
        if math.isnan(signal.shared):
            return math.nan
        correlation = min(signal.shared / signal.q, 1.0)
        q = float(f"{signal.q:.{DIGITS}g}")
        return activation(self.phi).kernel(q, correlation) if correlation else m.mean**2

    def moments(self, q: float) -> Moments:
        """What the function does to pre-activations of variance q."""
        return activation(self.phi).moments(q)


@dataclass(frozen=True, slots=True)
class Interpolated(Elementwise):
    """The same to about 1e-4, for the hundreds of variances along a measured network."""

    def moments(self, q: float) -> Moments:
        return activation(self.phi).near(q)


@dataclass(frozen=True, slots=True)
class LayerNorm:
    """Each sample to mean 0 and variance `weight`^2 over its units; gain |weight| / standard deviation."""

    weight: float = 1.0
    eps: float = 1e-5

    def response(self, signal: Signal) -> Response:
        return _normalised(signal, signal.q - signal.mean**2, self.weight, self.eps)


@dataclass(frozen=True, slots=True)
class RMSNorm:
    """Each sample to mean square `weight`^2 over its units; gain |weight| / rms."""

    weight: float = 1.0
    eps: float = 1e-6

    def response(self, signal: Signal) -> Response:
        normalised = _normalised(signal, signal.q, self.weight, self.eps)
        scale = self.weight / math.sqrt(signal.q + self.eps)
        return replace(normalised, signal=replace(normalised.signal, mean=signal.mean * scale))


def _normalised(signal: Signal, variance: float, weight: float, eps: float) -> Response:
    scale = weight**2 / (variance + eps)
    shared = max(signal.shared - (signal.q - variance), 0.0) * scale
    return Response(
        Signal(variance * scale, 0.0, shared, signal.width),
        scale,
        sensitivity=-variance / (variance + eps),
        elasticity=eps / (variance + eps),
    )


@dataclass(frozen=True, slots=True)
class BatchNorm:
    """Each unit to mean 0 and variance `weight`^2 over the batch, in training.

    Takes off what the samples share, so that a chain of phi and BatchNorm without skips multiplies the
    gradient by sqrt(E phi'^2 / Var phi) >= 1 a layer: sqrt(pi / (pi - 1)) = 1.2112 for ReLU (Yang et al.
    2019, arXiv:1902.08129). `batch` counts samples, times positions for a convolution; a small batch adds
    (B - 2) / (B - 3), exact for a linear chain and within 1% of others from B = 32.
    """

    weight: float = 1.0
    eps: float = 1e-5
    batch: float = math.inf

    def response(self, signal: Signal) -> Response:
        if self.batch <= 3:
            raise ValueError(
                f"the gradient through a BatchNorm over {self.batch} values has no finite mean square"
            )
        variance = signal.q - signal.shared
        scale = self.weight**2 / (variance + self.eps)
        finite = 1.0 if math.isinf(self.batch) else (self.batch - 2) / (self.batch - 3)
        return Response(Signal(variance * scale, 0.0, 0.0, signal.width), scale * finite)


@dataclass(frozen=True, slots=True)
class Dropout:
    """Units set to zero with probability p in training, the rest scaled by 1 / (1 - p)."""

    p: float

    def response(self, signal: Signal) -> Response:
        chi = 1 / (1 - self.p)
        scatter = 3 * self.p / (1 - self.p) / signal.width
        return Response(
            replace(signal, q=signal.q * chi), chi, variance=scatter, bias=-scatter / 2, elasticity=1.0
        )


@dataclass(frozen=True, slots=True)
class Scale:
    """Every unit times a constant."""

    factor: float

    def response(self, signal: Signal) -> Response:
        chi = self.factor**2
        scaled = replace(signal, q=signal.q * chi, mean=signal.mean * self.factor, shared=signal.shared * chi)
        return Response(scaled, chi, elasticity=1.0)


@dataclass(frozen=True, slots=True)
class Averaging:
    """A mean over positions, as attention takes at initialisation when its logits are small.

    `share` of the variance survives: 1 where the positions are alike; 1/T for uniform attention over T
    independent positions, `causal_share(T)` when each position sees only those before it. Depth makes
    positions more alike, so that the truth lies between.
    """

    share: float

    def response(self, signal: Signal) -> Response:
        return Response(replace(signal, q=signal.q * self.share), self.share, elasticity=1.0)


def causal_share(positions: int) -> float:
    """Mean over t of 1/t: what uniform causal attention leaves of the variance of independent positions."""
    return sum(1 / t for t in range(1, positions + 1)) / positions


@dataclass(frozen=True, slots=True)
class Residual:
    """skip x h + scale x f(h), with a branch that ends in random weights of its own."""

    branch: Sequence[Operation]
    skip: float = 1.0
    scale: float = 1.0

    def response(self, signal: Signal) -> Response:
        inner = propagate(self.branch, signal)
        skip, scale = self.skip**2, self.scale**2
        stream, added = skip * signal.q, scale * inner.signal.q
        q, width = stream + added, min(signal.width, inner.signal.width)
        chi = skip + scale * inner.chi
        by_branch, of_branch = scale * inner.chi / chi, added / q
        # The cross term of two independent vectors scatters even when neither norm does.
        variance = 4 * by_branch * (1 - by_branch) / width + by_branch**2 * inner.variance
        noise = 4 * of_branch * (1 - of_branch) / width + of_branch**2 * inner.noise
        return Response(
            Signal(
                q,
                self.skip * signal.mean + self.scale * inner.signal.mean,
                skip * signal.shared + scale * inner.signal.shared,
                width,
            ),
            chi,
            variance=variance,
            bias=-variance / 2,
            sensitivity=by_branch * inner.sensitivity,
            elasticity=1 - of_branch + of_branch * inner.elasticity,
            noise=noise,
            drift=-noise / 2,
            joint=by_branch * of_branch * inner.joint,
        )


def pre_norm(branches: Sequence[Sequence[Operation]], norm: Operation | None = None) -> list[Operation]:
    """h + f(norm(h)) for each branch: the stream grows by the branch, and the gain falls to 1 like 1/depth.

    With branches that pass on variance v and gradient c (for ReLU the same), the stream is q_0 + L v after L of them
    and the gradient has grown by (1 + L v / q_0)^(c / 2v): as a power of depth, not exponentially.
    """
    return [Residual((norm or LayerNorm(), *branch)) for branch in branches]


def post_norm(branches: Sequence[Sequence[Operation]], skip: float = 1.0) -> list[Operation]:
    """norm(skip h + f(h)) for each branch: gain^2 = (skip^2 + c) / (skip^2 + v), 1 for a ReLU branch.

    DeepNorm (Wang et al. 2022, arXiv:2203.00555) raises `skip` with depth, which brings each gain nearer to 1.
    """
    return [operation for branch in branches for operation in (Residual(branch, skip=skip), LayerNorm())]


def batch_norm_gain(phi: Phi, batch: float = math.inf) -> float:
    """Factor per layer on the norm of the gradient in a chain of Linear, BatchNorm and phi without skips."""
    m = activation(phi).moments(1.0)
    norm = BatchNorm(eps=0.0, batch=batch).response(Signal(m.square, shared=m.mean**2))
    return math.sqrt(m.slope_square * norm.chi)


def spread(widths: Sequence[int], phi: Phi, q: float = 1.0) -> float:
    """Standard deviation, over draws of Gaussian weights, of log10 of a dense chain's gain.

    Var log ||J^T v||^2 = sum of 2 / n_in + 3 (k - 1) / n_out with k = E phi'^4 / (E phi'^2)^2 over N(0, q): 2/n a layer
    for a linear chain, 5/n for ReLU. This holds q still; `expected` also counts how q itself scatters.

    Args:
        widths: (layer + 1,) units, input first.
        phi: activation after each layer.
        q: pre-activation variance.
    """
    m = activation(phi).moments(q)
    excess = 3 * (m.slope_fourth / m.slope_square**2 - 1)
    variance = sum(2 / n_in + excess / n_out for n_in, n_out in pairwise(widths))
    return math.sqrt(variance) / (2 * LN10)
