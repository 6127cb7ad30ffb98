"""Singular values of a packed operator: all of them where that is affordable, else what an iteration knows.

The iteration is Golub and Kahan's bidiagonalisation on the smaller side of the operator, from random signs,
on all blocks at once. One run gives the largest singular value with its residual and a Gauss quadrature of
the spectrum (stochastic Lanczos quadrature; Ubaru, Chen and Saad, 2017). What a Lanczos process says about
the smallest values is no estimate of them, and is not reported.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from isograd.spectra.distribution import Distribution, pooled, standard_error
from isograd.spectra.jacobian import Product

LARGEST_DENSE = 512
"""Outputs of one block up to which the Jacobian is assembled: one backward each."""
LARGEST_ASSEMBLED = 2**25
"""Elements of all assembled blocks together: 256 MB in float64."""
MOST_AT_ONCE = 2**20
"""Elements of the cotangents of one backward."""
MOST_STEPS = 100
QUADRATURE_STEPS = 24
"""Steps of a run that only adds to the distribution: it resolves about a tenth of the singular values."""
MOST_RUNS = 8
FEWEST_PROBES, MOST_PROBES = 16, 256


@dataclass(frozen=True, slots=True)
class Estimate:
    """Singular values of a packed operator, without its factor 10**log10."""

    method: str
    """'diagonal', 'dense' or 'golub-kahan'."""
    largest: float
    rms: float
    smallest: float | None = None
    error: float = 0.0
    """Relative residual of the largest value."""
    rms_error: float = 0.0
    """Relative standard error of the RMS."""
    condition: float | None = None
    """Largest over smallest of the worst block."""
    distribution: Distribution | None = None
    unexamined: str = ""
    """Why all but the RMS is missing."""


def estimate(product: Product, tolerance: float, seed: int) -> Estimate:
    """The singular values by the cheapest method that is exact enough."""
    generator = torch.Generator().manual_seed(seed)
    found = diagonal(product, generator) or (dense(product) if fits_dense(product) else None)
    return found or iterated(product, tolerance, generator)


# -- all of them ---------------------------------------------------------------------------------------


def diagonal(product: Product, generator: torch.Generator) -> Estimate | None:
    """All singular values of an elementwise map from one backward; None where it is none.

    A cotangent of ones gives the diagonal, and random signs, which any other element would disturb,
    tell whether that is all.
    """
    if [t.shape for t in product.output.like] != [t.shape for t in product.input.like]:
        return None
    signs = product.output.random(product.blocks, generator)
    values = product.vjp(torch.ones_like(signs))
    if not torch.allclose(product.vjp(signs), signs * values, rtol=4 * product.eps, atol=0.0):
        return None
    return _all(values.abs().sort(1, descending=True).values, values.shape[1], product.eps, "diagonal")


def fits_dense(product: Product) -> bool:
    """Is assembling the matrix affordable in time and memory?"""
    size = product.blocks * product.outputs * product.inputs
    return product.outputs <= LARGEST_DENSE and size <= LARGEST_ASSEMBLED


def dense(product: Product) -> Estimate:
    """All singular values of the assembled matrix: one backward per output, many at once where they can be."""
    units = torch.eye(product.outputs, dtype=torch.float64, device=product.output.like[0].device)
    at_once = max(1, MOST_AT_ONCE // (product.blocks * max(product.outputs, product.inputs)))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="There is a performance drop")  # no slower than one by one
        rows = [product.vjps(some[:, None].expand(-1, product.blocks, -1)) for some in units.split(at_once)]
    values = torch.linalg.svdvals(torch.cat(rows).transpose(0, 1))
    return _all(values, product.outputs, max(product.outputs, product.inputs) * product.eps, "dense")


def _all(values: Tensor, outputs: int, rounding: float, method: str) -> Estimate:
    """All singular values are known, (block, value), largest first; what lies below rounding is 0."""
    # The threshold of a numerical rank: what lies below is rounding in the backward.
    values = torch.where(values > values[:, :1] * rounding, values, 0.0)
    condition = float((values[:, 0] / values[:, -1]).nan_to_num(nan=math.inf, posinf=math.inf).max())
    return Estimate(
        method,
        float(values.max()),
        math.sqrt(float(values.square().sum()) / (len(values) * outputs)),
        float(values.min()),
        condition=condition,
        distribution=Distribution.exact(values.flatten()),
    )


# -- without a matrix ----------------------------------------------------------------------------------


def iterated(product: Product, tolerance: float, generator: torch.Generator) -> Estimate:
    """The largest value, the RMS and the distribution from products with J and its transpose alone."""
    try:
        mismatch = product.adjoint_error(generator)
        why = (
            ""
            if mismatch <= 1000 * product.eps
            else f"its backward cannot be differentiated: <u, Jv> and <J'u, v> differ by {mismatch:.0e}"
        )
    except RuntimeError as raised:
        why = f"its backward cannot be differentiated: {str(raised).splitlines()[0]}"
    if why:
        squares = Squares(Side(product, flipped=False))
        squares.probe(tolerance, generator)
        return Estimate("golub-kahan", math.nan, squares.rms, None, math.nan, squares.error, unexamined=why)
    side = Side(product, flipped=product.inputs < product.outputs)
    first = Bidiagonal(side, generator)
    first.run(MOST_STEPS, lambda: first.steps >= QUADRATURE_STEPS and first.residual <= tolerance)
    squares = Squares(side, first)
    runs = [first.quadrature(product.eps)]
    value, residual = first.largest, first.residual
    while standard_error(runs, side.dimension) > tolerance / math.log(10) and len(runs) < MOST_RUNS:
        another = Bidiagonal(side, generator)
        another.run(QUADRATURE_STEPS, lambda: False)
        squares.add(another.start, another.first)
        runs.append(another.quadrature(product.eps))
        # Every run approaches from below: the largest is the nearest.
        if another.largest > value:
            value, residual = another.largest, another.residual
    squares.probe(tolerance, generator)
    return Estimate(
        "golub-kahan",
        value,
        squares.rms,
        None,
        residual,
        squares.error,
        distribution=pooled(runs, side.dimension),
    )


class Side:
    """The operator seen from its smaller side, where its Gram matrix has no zeros that are mere shape."""

    def __init__(self, product: Product, *, flipped: bool) -> None:
        self.blocks, self.outputs, self.eps = product.blocks, product.outputs, product.eps
        self.dimension = product.inputs if flipped else product.outputs
        self.far = product.outputs if flipped else product.inputs
        self._place = product.input if flipped else product.output
        self.across: Callable[[Tensor], Tensor] = product.jvp if flipped else product.vjp
        self.back: Callable[[Tensor], Tensor] = product.vjp if flipped else product.jvp

    def signs(self, generator: torch.Generator) -> Tensor:
        """(block, dimension)"""
        return self._place.random(self.blocks, generator)


class Basis:
    """Orthonormal vectors of each block: (block, vector, dimension), filled from the front."""

    def __init__(self, blocks: int, most: int, dimension: int, device: torch.device) -> None:
        self._held = torch.empty(blocks, most, dimension, dtype=torch.float64, device=device)
        self.count = 0

    @property
    def vectors(self) -> Tensor:
        """Those there are."""
        return self._held[:, : self.count]

    def append(self, vector: Tensor) -> None:
        self._held[:, self.count] = vector
        self.count += 1

    def coordinates(self, vector: Tensor) -> Tensor:
        """(block, vector): along each of them."""
        return torch.einsum("bkn,bn->bk", self.vectors, vector)

    def orthogonal(self, vector: Tensor) -> Tensor:
        """What is left of a vector without them; twice is enough (Parlett, 1980)."""
        for _ in range(2):
            vector = vector - torch.einsum("bkn,bk->bn", self.vectors, self.coordinates(vector))
        return vector


class Bidiagonal:
    """Golub and Kahan's lower bidiagonalisation from random signs (1965), fully reorthogonalised."""

    def __init__(self, side: Side, generator: torch.Generator) -> None:
        self.side = side
        self.start = side.signs(generator)
        self.alphas, self.betas = list[Tensor](), list[Tensor]()
        self.largest = self.residual = 0.0

    @property
    def steps(self) -> int:
        """Done so far."""
        return len(self.alphas)

    def run(self, most: int, done: Callable[[], bool]) -> None:
        """Up to `most` steps, each one product with J and one with its transpose."""
        side, most = self.side, min(most, self.side.dimension, self.side.far)
        self.near = Basis(side.blocks, most + 1, side.dimension, self.start.device)
        self.far = Basis(side.blocks, most, side.far, self.start.device)
        self.near.append(_normalised(self.start))
        while self.steps < most and not done():
            v = side.across(self.near.vectors[:, -1])
            if not self.alphas:
                self.first = v * self.start.norm(dim=1, keepdim=True)
            v = self.far.orthogonal(v)
            self.alphas.append(v.norm(dim=1))
            self.far.append(_normalised(v))
            u = self.near.orthogonal(side.back(self.far.vectors[:, -1]))
            self.betas.append(u.norm(dim=1))
            # What is left of an exhausted Krylov space is rounding: no direction to go on in.
            exhausted = self.betas[-1] <= side.eps * torch.stack(self.alphas).amax(0)
            self.near.append(torch.where(exhausted[:, None], 0.0, _normalised(u)))
            self._extreme()

    def matrix(self, steps: int) -> Tensor:
        """(block, step, step): the operator between the two bases."""
        matrix = torch.diag_embed(torch.stack(self.alphas[:steps], 1))
        if steps > 1:
            matrix = matrix + torch.diag_embed(torch.stack(self.betas[: steps - 1], 1), -1)
        return matrix

    def _extreme(self) -> None:
        _, values, vh = torch.linalg.svd(self.matrix(self.steps))
        self.largest = float(values[:, 0].max())
        # Left singular vectors pair with the next near vector: J v = s u + beta (e_k' y) u_(k+1).
        left_over = (self.betas[-1] * vh[:, 0, -1].abs()).max()
        self.residual = float(left_over) / self.largest if self.largest else 0.0

    def quadrature(self, rounding: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Nodes and weights, (block, node), of the Gauss rule, and of the one of half as many steps."""
        rules: list[Tensor] = []
        for steps in (self.steps, max(1, self.steps // 2)):
            u, values, _ = torch.linalg.svd(self.matrix(steps))
            rules += [torch.where(values > values[:, :1] * rounding, values, 0.0), u[:, 0].square()]
        return rules[0], rules[1], rules[2], rules[3]


class Squares:
    """||J||_F^2 from random signs u: the mean of ||J'u||^2 (Hutchinson, 1990).

    What a bidiagonalisation knows of the operator is taken out of it and added exactly (Hutch++; Meyer,
    Musco, Musco and Woodruff, 2021), which leaves the heavy tail of a deep product no variance.
    """

    def __init__(self, side: Side, known: Bidiagonal | None = None) -> None:
        self.side, self.known = side, known
        self.samples: list[Tensor] = []
        self._exact = 0.0
        if known is not None:
            self._matrix = known.matrix(known.steps)  # J' near = far matrix'
            self._exact = float(self._matrix.square().sum())

    def add(self, signs: Tensor, image: Tensor) -> None:
        """One sample: u and J'u."""
        if self.known is not None:
            along = torch.einsum("bkn,bn->bk", self.known.near.vectors[:, : self.known.steps], signs)
            image = image - torch.einsum("bkn,bjk,bj->bn", self.known.far.vectors, self._matrix, along)
        self.samples.append(image.square().sum(1))

    def probe(self, tolerance: float, generator: torch.Generator) -> None:
        """Further samples until the standard error is within the tolerance."""
        while len(self.samples) < FEWEST_PROBES or (
            self.error > tolerance and len(self.samples) < MOST_PROBES
        ):
            signs = self.side.signs(generator)
            self.add(signs, self.side.across(signs))

    @property
    def rms(self) -> float:
        """||J||_F / sqrt(outputs)."""
        return math.sqrt(self._sum / (self.side.blocks * self.side.outputs))

    @property
    def error(self) -> float:
        """Relative standard error of `rms`; blocks have probes of their own, and their variances add."""
        variance = float(torch.stack(self.samples).var(0).sum()) / len(self.samples)
        return math.sqrt(variance) / (2 * self._sum) if self._sum else 0.0

    @property
    def _sum(self) -> float:
        return self._exact + float(torch.stack(self.samples).sum()) / len(self.samples)


def _normalised(vector: Tensor) -> Tensor:
    length = vector.norm(dim=1, keepdim=True)
    return torch.where(length > 0, vector / length, 0.0)
