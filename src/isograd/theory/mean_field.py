"""Mean field of one layer, repeated: x -> phi(x) -> W phi(x) + b with W_ij ~ N(0, sigma_w^2 / fan_in).

The pre-activation variance q follows q' = V(q) = sigma_w^2 E phi^2 + sigma_b^2, and each layer
multiplies the squared norm of the gradient by chi_1 = sigma_w^2 E phi'^2, both averages over
x ~ N(0, q) (Poole et al. 2016, arXiv:1606.05340; Schoenholz et al. 2017, arXiv:1611.01232).
A convolution has the same V and chi_1, with fan_in = input channels x kernel size (Xiao et al. 2018,
arXiv:1806.05393), away from its padded border.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from isograd.theory.quadrature import Activation, Moments, Phi, activation

SMALLEST, LARGEST = 1e-30, 1e30
"""A q beyond these is reported as 0 or infinite."""
EXACT = 1e-12
"""Relative change of q that cannot be told from none."""
NARROW = 1e-6
"""A passage through which q moves by less than this share a layer is reported as a fixed point:
it holds a chain for thousands of layers."""
ROUNDING = 4e-16
"""Distance, in log q, of two places that are the same."""
MARGIN = 1e-6
"""How far chi_q must be from 1 to call a fixed point stable or unstable."""


@dataclass(frozen=True, slots=True)
class FixedPoint:
    """Where a deep chain settles, and what each layer there does to the gradient."""

    q: float
    """Variance of the pre-activations; 0 or infinity where they shrink or grow without end."""
    chi_1: float
    """Factor per layer on the squared norm of the gradient."""
    chi_q: float
    """dV/dq: factor per layer on a small deviation of q; below 1 the point attracts."""

    @property
    def gain(self) -> float:
        """Factor per layer on the norm of the gradient."""
        return math.sqrt(self.chi_1)

    @property
    def depth_scale(self) -> float:
        """xi = 1 / |log chi_1| in layers; chains train to about 6 xi (Schoenholz et al. 2017)."""
        if self.chi_1 == 0 or math.isinf(self.chi_1):
            return 0.0
        distance = abs(math.log(self.chi_1))
        return 1 / distance if distance > EXACT else math.inf


@dataclass(frozen=True, slots=True)
class Critical:
    """An initialisation that keeps the gradient's size: weights N(0, sigma_w^2 / fan_in), biases N(0, sigma_b2)."""

    sigma_w: float
    sigma_b2: float
    q: float
    """Pre-activation variance there; NaN when every q will do."""
    kind: str
    """'scale-invariant': every q is a fixed point.
    'drifting': q falls to 0 and the gain rises to 1, both like a power of depth.
    'stable', 'half-stable', 'unstable': q returns to the point from both sides, one or neither."""
    chi_q: float


def moments(phi: Phi, q: float) -> Moments:
    """Averages of an activation over pre-activations N(0, q).

    Args:
        phi: a name of `theory.NAMES`, or any elementwise function that autograd can differentiate.
        q: variance, positive and finite.

    Raises:
        ValueError: q is not positive and finite, phi is unknown or not elementwise, or an average does not converge.
    """
    if not 0 < q < math.inf:
        raise ValueError(f"q is a variance, positive and finite; got {q:g}")
    return activation(phi).moments(float(q))


def fixed_point(phi: Phi, *, sigma_w: float, sigma_b2: float = 0.0, q: float = 1.0) -> FixedPoint:
    """Where the pre-activation variance settles in a deep chain of one kind of layer.

    Args:
        phi: a name or an elementwise function.
        sigma_w: standard deviation of the weights times sqrt(fan_in).
        sigma_b2: variance of the biases.
        q: pre-activation variance to start from; with several fixed points it decides which is met.

    Returns:
        The first fixed point in the direction in which q moves. That is the limit wherever V rises with q,
        as it does for every activation that grows with |x|.

    Raises:
        ValueError: a scale is negative or not finite, or as `moments`.
    """
    if not (0 < sigma_w < math.inf and 0 <= sigma_b2 < math.inf):
        raise ValueError(f"need sigma_w > 0 and sigma_b2 >= 0, finite; got {sigma_w:g} and {sigma_b2:g}")
    at = activation(phi)
    moments(phi, q)

    def growth(log_q: float) -> float:
        variance = math.exp(log_q)
        return (sigma_w**2 * at.moments(variance).square + sigma_b2) / variance - 1

    return _fixed_point(at, sigma_w, _settle(growth, math.log(q)))


def _settle(growth: Callable[[float], float], start: float) -> float:
    """Follow the sign of the growth of q from log q = start to where it stops; infinity or 0 when it never does."""
    first = growth(start)
    if abs(first) <= EXACT:
        return math.exp(start)
    way = math.copysign(1.0, first)

    def onward(log_q: float) -> float:
        return way * growth(log_q)

    trail, step = [(start, way * first)], math.log(2)
    while math.log(SMALLEST) < trail[-1][0] < math.log(LARGEST) and math.isfinite(trail[-1][1]):
        log_q = trail[-1][0] + way * step
        trail.append((log_q, onward(log_q)))
        if trail[-1][1] < -EXACT or _dips(trail[-3:]):
            stop = _first_stop(onward, trail[-3:][0][0], log_q)
            if stop is not None:
                return math.exp(stop)
        step *= 1.2  # what is far changes slowly
    return math.inf if way > 0 else 0.0


def _first_stop(onward: Callable[[float], float], a: float, b: float) -> float | None:
    """The first zero on the way from a to b, or the first minimum that comes within `NARROW` of zero."""
    places = [a + (b - a) * k / 32 for k in range(33)]
    trail: list[tuple[float, float]] = []
    for place in places:
        trail.append((place, onward(place)))
        if _dips(trail[-3:]):
            lowest = _lowest(onward, trail[-3][0], place)
            if onward(lowest) < NARROW:
                return lowest if onward(lowest) > -EXACT else _zero(onward, trail[-3][0], lowest)
        if trail[-1][1] < -EXACT:
            return _zero(onward, trail[-2][0], place)
    return None


def _dips(trail: list[tuple[float, float]]) -> bool:
    """The middle of three points is the lowest, by more than rounding."""
    return len(trail) == 3 and EXACT < trail[1][1] < (1 - EXACT) * min(trail[0][1], trail[2][1])


def _fixed_point(at: Activation, sigma_w: float, q: float) -> FixedPoint:
    m = at.moments(min(max(q, SMALLEST), LARGEST))
    chi_1 = sigma_w**2 * m.slope_square
    return FixedPoint(q, chi_1, sigma_w**2 * m.square_growth / m.q)


def chi(phi: Phi, *, sigma_w: float, sigma_b2: float = 0.0, q: float = 1.0) -> float:
    """chi_1 at the true fixed point: the factor per layer on the squared norm of the gradient.

    Arguments and errors as `fixed_point`.
    """
    return fixed_point(phi, sigma_w=sigma_w, sigma_b2=sigma_b2, q=q).chi_1


def gain(phi: Phi, *, sigma_w: float, sigma_b2: float = 0.0, q: float = 1.0) -> float:
    """sqrt(chi_1) at the true fixed point: the factor per layer on the norm of the gradient.

    Arguments and errors as `fixed_point`.
    """
    return fixed_point(phi, sigma_w=sigma_w, sigma_b2=sigma_b2, q=q).gain


def depth_scale(phi: Phi, *, sigma_w: float, sigma_b2: float = 0.0, q: float = 1.0) -> float:
    """xi = 1 / |log chi_1| in layers; infinite at a critical point.

    Arguments and errors as `fixed_point`.
    """
    return fixed_point(phi, sigma_w=sigma_w, sigma_b2=sigma_b2, q=q).depth_scale


def critical(phi: Phi, q: float | None = None, *, centred: bool = False) -> Critical:
    """The initialisation at which a deep chain keeps the size of its gradient, chi_1 = 1 at a fixed point.

    One sigma_w and sigma_b2 make a given q critical: 1 / sqrt(E phi'^2) and q - sigma_w^2 E phi^2. Without q,
    the first of these that exists: any q for an activation with phi(2x) = 2 phi(x); q -> 0 without biases
    for an odd one that does not grow there; q = 1 where that is stable; the half-stable point, chi_q = 1;
    the smallest q that needs no negative sigma_b2.

    Args:
        phi: a name or an elementwise function.
        q: the pre-activation variance to hold.
        centred: the rows of W sum to zero, as under weight standardisation, so that E phi drops out.

    Raises:
        ValueError: there is no such point, and what to do instead; or as `moments`.
    """
    at = activation(phi)
    line = _Line(at, centred)
    if q is not None:
        moments(phi, q)
        point = line.point(q)
        if point.sigma_b2 < 0:
            raise _none(at, f"at q = {q:g}, where sigma_b^2 would have to be {point.sigma_b2:.4g}", centred)
        return point
    if at.homogeneous and not centred:
        return Critical(line.sigma_w(1.0), 0.0, math.nan, "scale-invariant", 1.0)
    if at.odd and (drifting := line.drifting()) is not None:
        return drifting
    at_one = line.point(1.0)
    if at_one.sigma_b2 >= 0 and at_one.kind != "unstable":
        return at_one
    for found in (line.half_stable(), line.least()):
        if found is not None:
            return found
    raise _none(at, "at any q", centred)


def _none(at: Activation, where: str, centred: bool) -> ValueError:
    advice = "put a normalisation between the layers"
    if not centred:
        advice = f"centre the weights (centred=True gives their scale), {advice},"
    return ValueError(
        f"{at.name} has no critical initialisation {where}: {advice} or take another activation"
    )


@dataclass(frozen=True)
class _Line:
    """The critical line of an activation: sigma_w and sigma_b2 for which chi_1 = 1 at the fixed point q."""

    at: Activation
    centred: bool

    def sigma_w(self, q: float) -> float:
        slope_square = self.at.moments(q).slope_square
        return slope_square**-0.5 if slope_square > 0 else math.inf

    def sigma_b2(self, q: float) -> float:
        m = self.at.moments(q)
        if not 0 < m.slope_square < math.inf:
            return -math.inf
        sigma_b2 = q - (m.variance if self.centred else m.square) / m.slope_square
        return 0.0 if abs(sigma_b2) <= EXACT * q else sigma_b2

    def chi_q(self, q: float) -> float:
        m = self.at.moments(q)
        growth = m.square_growth - (2 * m.mean * m.mean_growth if self.centred else 0.0)
        return growth / q / m.slope_square

    def point(self, q: float) -> Critical:
        chi_q = self.chi_q(q)
        kind = "half-stable" if abs(chi_q - 1) < MARGIN else "stable" if chi_q < 1 else "unstable"
        return Critical(self.sigma_w(q), self.sigma_b2(q), q, kind, chi_q)

    def drifting(self) -> Critical | None:
        """q -> 0 without biases, where q falls slowly instead of growing."""
        sigma_w = self.sigma_w(SMALLEST)
        falls = all(sigma_w**2 * self.at.moments(q).square <= q for q in (1e-4, 1e-2, 1.0))
        return Critical(sigma_w, 0.0, 0.0, "drifting", 1.0) if math.isfinite(sigma_w) and falls else None

    def half_stable(self) -> Critical | None:
        """The q at which chi_q = 1 too."""
        return self._where(lambda log_q: self.chi_q(math.exp(log_q)) - 1)

    def least(self) -> Critical | None:
        """The smallest q that needs no biases."""
        return self._where(lambda log_q: self.sigma_b2(math.exp(log_q)) * math.exp(-log_q))

    def _where(self, f: Callable[[float], float]) -> Critical | None:
        grid = [math.log(10) * k / 8 for k in range(-24, 33)]  # q from 1e-3 to 1e4
        values = [f(log_q) for log_q in grid]
        for a, b, below, above in zip(grid[:-1], grid[1:], values[:-1], values[1:], strict=True):
            if -math.inf < below * above < 0 and min(abs(below), abs(above)) > EXACT:
                point = self.point(math.exp(_zero(f, a, b)))
                if point.sigma_b2 >= 0 and point.kind != "unstable":
                    return point
        return None


def _zero(f: Callable[[float], float], a: float, b: float) -> float:
    """A zero of f between a and b, where its signs differ.

    Bisection, with inverse quadratic steps where the last three points are smooth enough for them: about 10 values
    of f instead of 60. Source: Chandrupatla 1997, Advances in Engineering Software 28.
    """
    at_a, at_b, share = f(a), f(b), 0.5
    while True:
        x = a + share * (b - a)
        at_x = f(x)
        if (at_x > 0) == (at_a > 0):
            c, at_c = a, at_a
        else:
            c, at_c, b, at_b = b, at_b, a, at_a
        a, at_a = x, at_x
        best, least = (a, at_a) if abs(at_a) < abs(at_b) else (b, at_b)
        least_share = ROUNDING * max(abs(best), 1.0) / abs(b - a) if a != b else 1.0
        if least_share > 0.5 or least == 0:
            return best
        place, height = (a - b) / (c - b), (at_a - at_b) / (at_c - at_b)
        share = 0.5
        if height**2 < place and (1 - height) ** 2 < 1 - place:
            share = at_a / (at_b - at_a) * at_c / (at_b - at_c)
            share += (c - a) / (b - a) * at_a / (at_c - at_a) * at_b / (at_c - at_b)
        share = min(max(share, least_share), 1 - least_share)


def _lowest(f: Callable[[float], float], a: float, b: float) -> float:
    """The minimum of f between a and b, where it has one, by golden section."""
    ratio = (math.sqrt(5) - 1) / 2
    for _ in range(40):
        c, d = b - ratio * (b - a), a + ratio * (b - a)
        a, b = (a, d) if f(c) < f(d) else (c, b)
    return (a + b) / 2
