"""Averages over a Gaussian pre-activation, for any activation function.

Composite Gauss-Legendre quadrature in float64, split where the function or its slope jumps and
refined panel by panel until the answer stands still: the closed forms are met to about 13 digits.
"""

from __future__ import annotations

import copy
import difflib
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Phi = str | Callable[[Tensor], Tensor]
"""An activation: a name of `NAMES`, or any elementwise function or module that autograd can differentiate."""

NAMES: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda x: x,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "relu6": F.relu6,
    "elu": F.elu,
    "selu": F.selu,
    "celu": F.celu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "mish": F.mish,
    "softplus": F.softplus,
    "softsign": F.softsign,
    "hardtanh": F.hardtanh,
    "hardsigmoid": F.hardsigmoid,
    "hardswish": F.hardswish,
    "tanhshrink": F.tanhshrink,
    "softshrink": F.softshrink,
    "logsigmoid": F.logsigmoid,
    "erf": torch.erf,
    "sin": torch.sin,
    "exp": torch.exp,
}

ORDER = 20
"""Nodes per panel: a panel of a smooth integrand is exact to rounding when it spans about one period."""
TOLERANCE = 1e-13
"""Change on halving a panel, relative to the whole integral, below which the panel stands."""
ENOUGH = 1e-7
"""Doubt that is let pass when halving no longer helps, as with a function that is itself rounded."""
ROUNDS, PANELS = 40, 1 << 14
JUMP = 1e-10
"""A change that stays above this share of the function's size however closely one looks is a jump.
Well above rounding, and below torch's own softplus, whose slope jumps by 2e-9 at its threshold."""
BISECTIONS = 46
ORDERS = 40
"""Hermite orders kept for a pair of correlated pre-activations."""
FARTHEST = 38.0
"""Standard deviations: beyond, the Gaussian density is below the smallest float64."""
GRID = 8
"""Variances to a decade between which averages are interpolated: to 2e-4 of a smooth function's."""


@dataclass(frozen=True, slots=True)
class Moments:
    """Averages of an activation phi over a pre-activation x ~ N(0, q)."""

    q: float
    mean: float
    """E phi(x)."""
    square: float
    """E phi(x)^2: what the next layer receives."""
    fourth: float
    """E phi(x)^4."""
    slope_square: float
    """E phi'(x)^2: what the gradient is multiplied by."""
    slope_fourth: float
    """E phi'(x)^4."""
    joint: float
    """E phi(x)^2 phi'(x)^2."""
    mean_growth: float
    """q d/dq E phi."""
    square_growth: float
    """q d/dq E phi^2."""
    slope_growth: float
    """q d/dq E phi'^2."""

    def scaled(self, q: float) -> Moments:
        """Of the same function at another q, where phi(c x) = c phi(x) for every c > 0."""
        by = q / self.q
        return Moments(
            q,
            self.mean * math.sqrt(by),
            self.square * by,
            self.fourth * by**2,
            self.slope_square,
            self.slope_fourth,
            self.joint * by,
            self.mean_growth * math.sqrt(by),
            self.square_growth * by,
            self.slope_growth,
        )

    @property
    def variance(self) -> float:
        """Var phi(x), the square without its mean."""
        return self.square - self.mean**2

    @property
    def forward_gain(self) -> float:
        """The sigma_w that keeps the mean square at 1 when q is 1."""
        return self.square**-0.5

    @property
    def centred_gain(self) -> float:
        """The same for weights whose rows sum to zero, as in weight standardisation."""
        return self.variance**-0.5

    @property
    def backward_gain(self) -> float:
        """The sigma_w that keeps the gradient's size."""
        return self.slope_square**-0.5


class Activation:
    """An elementwise function with its slope, its kinks and its Gaussian averages."""

    def __init__(self, function: Callable[[Tensor], Tensor], name: str) -> None:
        self.function = function
        self.name = name
        probe = torch.linspace(-20.0, 20.0, 801, dtype=torch.float64, device="cpu") + 0.0123
        value = self._value(probe)
        if value.shape != probe.shape or not torch.allclose(self._value(probe[:9]), value[:9], rtol=1e-9):
            raise ValueError(f"{name} is not elementwise and deterministic: theory needs phi(x) unit by unit")
        self.kinks = _kinks((self._value, lambda x: self.value_and_slope(x)[1]))
        self.odd = torch.allclose(self._value(-probe), -value, rtol=1e-12, atol=1e-12)
        doubled = torch.allclose(self._value(2 * probe), 2 * value, rtol=1e-12, atol=1e-12)
        self.homogeneous = doubled and all(abs(kink) < 1e-9 for kink in self.kinks)

    def _value(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self.function(x.clone())  # a copy: it may work in place

    def value_and_slope(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """phi(x) and phi'(x), the derivative that backpropagation uses."""
        with torch.inference_mode(False), torch.enable_grad():
            x = x.clone().requires_grad_()
            value = self.function(x.clone())
            if not value.requires_grad:
                raise ValueError(f"{self.name} has no derivative that autograd knows")
            (slope,) = torch.autograd.grad(value.sum(), x)
        return value.detach(), slope

    def moments(self, q: float) -> Moments:
        """Averages over x ~ N(0, q); one that is not finite in float64 is infinite."""
        return _moments(self, 1.0).scaled(q) if self.homogeneous else _moments(self, q)

    def near(self, q: float) -> Moments:
        """The same to about 1e-4, interpolated on a grid that all calls share: a deep chain asks for hundreds of q."""
        if self.homogeneous:
            return self.moments(q)
        place = GRID * math.log10(q)
        first = math.floor(place) - 1
        nodes = [_smooth(self, first + k) for k in range(4)]
        if any(node is None for node in nodes):
            return self.moments(q)
        # Lagrange's cubic through the four nodes around it
        x = place - first
        weights = [math.prod((x - j) / (k - j) for j in range(4) if j != k) for k in range(4)]
        mean, square, fourth, slope, slope4, joint, *growth = (
            sum(w * value for w, value in zip(weights, column, strict=True))
            for column in zip(*(node or () for node in nodes), strict=True)
        )
        square, slope = math.exp(square), math.exp(slope)
        return Moments(
            q,
            mean * math.sqrt(square),
            square,
            math.exp(fourth) * square**2,
            slope,
            math.exp(slope4) * slope**2,
            math.exp(joint) * square * slope,
            growth[0] * math.sqrt(square),
            growth[1] * square,
            growth[2] * slope,
        )

    def averages(self, q: float) -> list[float]:
        """The fields of `Moments` after q, in order."""
        scale = math.sqrt(q)

        def integrands(z: Tensor) -> Tensor:
            value, slope = self.value_and_slope(scale * z)
            # q d/dq E f(sqrt(q) Z) = E f (Z^2 - 1) / 2 needs no derivative, and so holds across kinks and jumps.
            growth = (z * z - 1) / 2
            value2, slope2 = value * value, slope * slope
            rows = [value, value2, value2 * value2, slope2, slope2 * slope2, value2 * slope2]
            return torch.stack([*rows, value * growth, value2 * growth, slope2 * growth])

        return self._average(integrands, q)

    def hermite(self, q: float) -> tuple[float, ...]:
        """Coefficients of phi(sqrt(q) z) in the orthonormal Hermite polynomials of z, orders 0 to `ORDERS` - 1."""
        scale = math.sqrt(q)

        def integrands(z: Tensor) -> Tensor:
            polynomials = [torch.ones_like(z), z]
            for k in range(1, ORDERS - 1):
                polynomials.append((z * polynomials[-1] - math.sqrt(k) * polynomials[-2]) / math.sqrt(k + 1))
            return self._value(scale * z) * torch.stack(polynomials)

        return tuple(self._average(integrands, q))

    def kernel(self, q: float, correlation: float) -> float:
        """E phi(u) phi(v) for u, v ~ N(0, q) with a correlation, by Mehler's formula: sum of a_k^2 c^k.

        What the orders left out hold is counted with c^ORDERS; exact to 1e-3 of E phi^2 at any
        correlation, and far closer away from 1.
        """
        squares = (
            [a * a * q for a in _hermite(self, 1.0)]
            if self.homogeneous
            else [a * a for a in _hermite(self, q)]
        )
        rest = max(self.moments(q).square - sum(squares), 0.0)
        return sum(a2 * correlation**k for k, a2 in enumerate(squares)) + rest * correlation**ORDERS

    def _average(self, integrands: Callable[[Tensor], Tensor], q: float) -> list[float]:
        try:
            return average(integrands, self._edges(math.sqrt(q)))
        except ArithmeticError:
            raise ValueError(
                f"the averages of {self.name} over N(0, {q:g}) do not converge: "
                "its slope has no finite mean square, or it oscillates too fast"
            ) from None

    def _edges(self, scale: float) -> list[float]:
        # The function changes over lengths of order 1 around 0 and its kinks, the density over lengths of order 1 in z.
        near = [s * 2.0**k for k in range(-2, 7) for s in (-1.0, 1.0)]
        places = [centre + offset for centre in {0.0, *self.kinks} for offset in (0.0, *near)]
        return [p / scale for p in places] + [-26.0, -18.0, -12.0, *range(-8, 9, 2), 12.0, 18.0, 26.0]


@lru_cache(maxsize=8192)
def _moments(at: Activation, q: float) -> Moments:
    return Moments(q, *at.averages(q))


@lru_cache(maxsize=1024)
def _smooth(at: Activation, node: int) -> tuple[float, ...] | None:
    """The averages at a node of the grid as numbers that change slowly with q; None: one is zero or infinite."""
    m = at.moments(10 ** (node / GRID))
    try:
        size = math.sqrt(m.square)
        found = (
            m.mean / size,
            math.log(m.square),
            math.log(m.fourth / m.square**2),
            math.log(m.slope_square),
            math.log(m.slope_fourth / m.slope_square**2),
            math.log(m.joint / m.square / m.slope_square),
            m.mean_growth / size,
            m.square_growth / m.square,
            m.slope_growth / m.slope_square,
        )
    except (ValueError, ZeroDivisionError, OverflowError):
        return None
    return found if all(map(math.isfinite, found)) else None


@lru_cache(maxsize=1024)
def _hermite(at: Activation, q: float) -> tuple[float, ...]:
    return at.hermite(q)


def average(f: Callable[[Tensor], Tensor], edges: list[float]) -> list[float]:
    """E f(Z) over Z ~ N(0, 1) for f: (node,) -> (component, node), panels starting at `edges`.

    Raises:
        ArithmeticError: the panels were halved `ROUNDS` times, or into `PANELS`, and the sum still moved.
    """
    inner = sorted({e for e in edges if -FARTHEST < e < FARTHEST})
    grid = torch.tensor([-FARTHEST, *inner, FARTHEST], dtype=torch.float64, device="cpu")
    left, right = grid[:-1], grid[1:]
    coarse, settled, rounds = None, torch.zeros((), dtype=torch.float64, device="cpu"), 0
    while True:
        middle = (left + right) / 2
        if coarse is None:  # all panels in one call: most of its time is the calling
            starts, ends = torch.cat((left, left, middle)), torch.cat((right, middle, right))
            coarse, *halves = _panels(f, starts, ends).chunk(3, 1)
        else:
            halves = _panels(f, torch.cat((left, middle)), torch.cat((middle, right))).chunk(2, 1)
        fine = torch.stack((halves[0], halves[1]))  # (half, component, panel)
        total = settled + fine.sum((0, 2))
        size = settled.abs() + fine.abs().sum((0, 2))
        change = (fine.sum(0) - coarse).abs()
        moved = (change > TOLERANCE * size[:, None]).any(0)  # NaN counts as settled
        if rounds == ROUNDS or int(moved.sum()) > PANELS:
            if (change.sum(1) > ENOUGH * size).any():
                raise ArithmeticError
            moved = torch.zeros_like(moved)
        if not moved.any():
            return [value if math.isfinite(value) else math.inf for value in total.tolist()]
        settled, rounds = settled + fine[:, :, ~moved].sum((0, 2)), rounds + 1
        left, right = torch.cat((left[moved], middle[moved])), torch.cat((middle[moved], right[moved]))
        coarse = torch.cat((fine[0][:, moved], fine[1][:, moved]), 1)


def _panels(f: Callable[[Tensor], Tensor], left: Tensor, right: Tensor) -> Tensor:
    nodes, weights = _gauss_legendre()
    half = (right - left)[:, None] / 2
    z = half * nodes + (left + right)[:, None] / 2  # (panel, node)
    density = half * weights * torch.exp(-z * z / 2) / math.sqrt(2 * math.pi)
    values = f(z.flatten()).reshape(-1, *z.shape)
    # A far tail may overflow where the density is zero: nothing times infinity is nothing here.
    return torch.where(density > 0, values * density, 0.0).sum(-1)


@cache
def _gauss_legendre() -> tuple[Tensor, Tensor]:
    """Nodes and weights on [-1, 1] from the Jacobi matrix (Golub and Welsch 1969)."""
    k = torch.arange(1, ORDER, dtype=torch.float64, device="cpu")
    beta = k / (4 * k * k - 1).sqrt()
    jacobi = torch.diag(beta, 1) + torch.diag(beta, -1)
    nodes, vectors = cast("tuple[Tensor, Tensor]", torch.linalg.eigh(jacobi))
    return nodes, 2 * vectors[0] ** 2


def _kinks(functions: tuple[Callable[[Tensor], Tensor], ...]) -> tuple[float, ...]:
    """Where phi or phi' jumps, by bisection of 4,000 intervals at once.

    In each interval keep the half over which the function changes more. Over a smooth stretch the
    change dies with the width; over a jump it stays.
    """
    near = torch.linspace(-20.0, 20.0, 4001, dtype=torch.float64, device="cpu")
    far = torch.logspace(math.log10(20.0), 4, 60, dtype=torch.float64, device="cpu")[1:]
    grid = torch.cat((-far.flip(0), near, far)) + 1e-3 * math.pi  # off the round numbers where kinks sit
    places: set[float] = set()
    for f in functions:
        left, right = grid[:-1], grid[1:]
        below, above = f(left), f(right)
        for _ in range(BISECTIONS):
            middle = (left + right) / 2
            value = f(middle)
            lower = (value - below).abs() >= (above - value).abs()
            left, right = torch.where(lower, left, middle), torch.where(lower, middle, right)
            below, above = torch.where(lower, below, value), torch.where(lower, value, above)
            size = torch.maximum(below.abs(), above.abs()).clamp_min(1.0)
            jumps = (above - below).abs() > JUMP * size  # the rest is smooth, and is not looked at again
            left, right, below, above = left[jumps], right[jumps], below[jumps], above[jumps]
        places |= {round(float(x), 12) for x in (left + right) / 2}
    return tuple(sorted(places))


def activation(phi: Phi) -> Activation:
    """The activation of a name or a callable.

    Raises:
        ValueError: an unknown name, or a function that is not elementwise or has no derivative.
    """
    if isinstance(phi, nn.Module):
        # Read each time: its parameters may have changed.
        return Activation(copy.deepcopy(phi).to("cpu", torch.float64), type(phi).__name__)
    return _known(phi)


@lru_cache(maxsize=64)
def _known(phi: Phi) -> Activation:
    if not isinstance(phi, str):
        return Activation(phi, getattr(phi, "__name__", "the activation"))
    if phi not in NAMES:
        close = difflib.get_close_matches(phi, NAMES, 3)
        hint = f"did you mean {' or '.join(close)}?" if close else f"the names are {', '.join(NAMES)};"
        raise ValueError(
            f"no activation is called {phi!r}: {hint} any elementwise torch function can be passed"
        )
    return Activation(NAMES[phi], phi)
