"""The Jacobian between two places of an autograd graph, as an operator, and its singular values.

Nothing is assembled that need not be: one backward gives a product with the transpose, and
differentiating that backward gives a product with the Jacobian itself, so a block of a million
dimensions works. Vectors are packed to float64 of shape (block, dimension); a batch whose samples do
not see each other is a block-diagonal operator, and its blocks are iterated on together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

LARGEST_DENSE = 512
"""Outputs of one block up to which the Jacobian is assembled: one backward each."""
LARGEST_ASSEMBLED = 2**25
"""Elements of all assembled blocks together: 256 MB in float64."""
MOST_STEPS = 100
MOST_PROBES = 64
FEWEST_PROBES = 8


@dataclass(frozen=True)
class Place:
    """What carries the signal at one backbone site: all outputs of its node that are used above it."""

    edges: tuple[GradientEdge, ...]
    like: tuple[Tensor, ...]
    """Gradients there, for their shape, dtype and device."""

    @property
    def rows(self) -> int:
        """Leading dimension common to all its tensors; 1 where there is none."""
        leading = {t.shape[0] if t.ndim > 1 else 1 for t in self.like}
        return leading.pop() if len(leading) == 1 else 1

    @property
    def eps(self) -> float:
        """Spacing of its numbers around 1."""
        return max(torch.finfo(t.dtype).eps for t in self.like)

    def pack(self, tensors: Sequence[Tensor], blocks: int) -> Tensor:
        """All elements as float64 of shape (block, dimension)."""
        return torch.cat([t.detach().reshape(blocks, -1).double() for t in tensors], 1)

    def unpack(self, vector: Tensor) -> list[Tensor]:
        """The inverse of `pack`."""
        sizes = [t.numel() // vector.shape[0] for t in self.like]
        parts = vector.split(sizes, 1)
        return [part.reshape(t.shape).to(t.dtype) for part, t in zip(parts, self.like, strict=True)]

    def random(self, blocks: int, generator: torch.Generator) -> Tensor:
        """A vector of independent signs: unbiased in Hutchinson's estimate, with the least variance."""
        size = sum(t.numel() for t in self.like)
        signs = torch.randint(2, (blocks, size // blocks), generator=generator, dtype=torch.float64)
        return (2 * signs - 1).to(self.like[0].device)


@dataclass
class Jacobian:
    """d(output place)/d(input place), divided by 10**log10."""

    output: Place
    input: Place
    log10: float = 0.0

    def __post_init__(self) -> None:
        self._cotangent: list[Tensor] = []
        self._pulled: list[Tensor] = []

    def vjp(self, cotangent: Sequence[Tensor]) -> list[Tensor]:
        """J'u by one backward."""
        scaled = [u * 10**-self.log10 for u in cotangent]
        found = torch.autograd.grad(
            self.output.edges, self.input.edges, scaled, retain_graph=True, allow_unused=True
        )
        return _filled(found, self.input.like)

    def jvp(self, tangent: Sequence[Tensor]) -> list[Tensor]:
        """Jv by differentiating the backward, which is linear in its cotangent."""
        if not self._pulled:
            self._cotangent = [torch.zeros_like(t, requires_grad=True) for t in self.output.like]
            pulled = torch.autograd.grad(
                self.output.edges, self.input.edges, self._cotangent, create_graph=True, allow_unused=True
            )
            self._pulled = _filled(pulled, self.input.like)
        live = [
            (p, v * 10**-self.log10) for p, v in zip(self._pulled, tangent, strict=True) if p.requires_grad
        ]
        if not live:
            return [torch.zeros_like(t) for t in self.output.like]
        found = torch.autograd.grad(
            [p for p, _ in live], self._cotangent, [v for _, v in live], retain_graph=True, allow_unused=True
        )
        return _filled(found, self.output.like)


class Product:
    """A chain of Jacobians, output side first: J = J_1 J_2 … J_k, and the packed operator of it."""

    def __init__(self, factors: Sequence[Jacobian]) -> None:
        self.factors = tuple(factors)
        self.output, self.input = factors[0].output, factors[-1].input
        self.log10 = sum(factor.log10 for factor in factors)
        self.eps = max(self.output.eps, self.input.eps)
        """Spacing of the coarser end's numbers around 1: a float32 head on a bfloat16 body is no finer."""
        self.blocks = 1
        if self.output.rows == self.input.rows > 1 and not self._coupled():
            self.blocks = self.output.rows

    @property
    def outputs(self) -> int:
        """Output dimension of one block."""
        return sum(t.numel() for t in self.output.like) // self.blocks

    @property
    def inputs(self) -> int:
        """Input dimension of one block."""
        return sum(t.numel() for t in self.input.like) // self.blocks

    def vjp(self, cotangent: Tensor) -> Tensor:
        """(block, output) -> (block, input)."""
        found = self.output.unpack(cotangent)
        for factor in self.factors:
            found = factor.vjp(found)
        return self.input.pack(found, self.blocks)

    def jvp(self, tangent: Tensor) -> Tensor:
        """(block, input) -> (block, output)."""
        found = self.input.unpack(tangent)
        for factor in self.factors[::-1]:
            found = factor.jvp(found)
        return self.output.pack(found, self.blocks)

    def _coupled(self) -> bool:
        """Does any row of the batch reach another one, as under BatchNorm? Exact.

        Two different row numbers differ in some bit, so a cotangent on the rows with that bit, and one on
        those without, show every coupling between them.
        """
        rows = torch.arange(self.output.rows)
        generator = torch.Generator().manual_seed(0)
        probe = self.output.unpack(self.output.random(1, generator))
        for bit in range((self.output.rows - 1).bit_length()):
            for side in (0, 1):
                kept = ((rows >> bit) & 1) == side
                masked = [_masked(t, kept) for t in probe]
                for factor in self.factors:
                    masked = factor.vjp(masked)
                if any(bool(t[~kept.to(t.device)].count_nonzero()) for t in masked):
                    return True
        return False

    def adjoint_error(self, generator: torch.Generator) -> float:
        """|<u, Jv> - <J'u, v>| over |u| |Jv|: a function that cannot be differentiated twice shows here."""
        u, v = self.output.random(self.blocks, generator), self.input.random(self.blocks, generator)
        down, up = self.vjp(u), self.jvp(v)
        scale = max(float(u.norm() * up.norm()), float(v.norm() * down.norm()))
        return float(((u * up).sum() - (down * v).sum()).abs()) / scale if scale else 0.0


def _masked(tensor: Tensor, kept: Tensor) -> Tensor:
    return tensor * kept.to(tensor.device, tensor.dtype).reshape(-1, *[1] * (tensor.ndim - 1))


def _filled(found: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor]:
    return [torch.zeros_like(t) if g is None else g for g, t in zip(found, like, strict=True)]


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
    values = values.abs()
    return _all(values.amax(1), values.amin(1), values.square().mean(), "diagonal")


def dense(product: Product) -> Estimate:
    """All singular values of the assembled matrix: one backward per output."""
    rows: list[Tensor] = []
    for j in range(product.outputs):
        unit = torch.zeros(product.blocks, product.outputs, dtype=torch.float64)
        unit[:, j] = 1
        rows.append(product.vjp(unit.to(product.output.like[0].device)))
    values = torch.linalg.svdvals(torch.stack(rows, 1))
    mean_square = values.square().sum() / (product.blocks * product.outputs)
    # The threshold of a numerical rank: what lies below is rounding in the backward.
    rounding = values[:, 0] * max(product.outputs, product.inputs) * product.eps
    smallest = torch.where(values[:, -1] > rounding, values[:, -1], 0.0)
    return _all(values[:, 0], smallest, mean_square, "dense")


def _all(largest: Tensor, smallest: Tensor, mean_square: Tensor, method: str) -> Estimate:
    """All singular values are known: extremes of each block."""
    condition = float((largest / smallest).nan_to_num(nan=math.inf, posinf=math.inf).max())
    return Estimate(
        method, float(largest.max()), float(mean_square.sqrt()), float(smallest.min()), condition=condition
    )


def fits_dense(product: Product) -> bool:
    """Is assembling the matrix affordable in time and memory?"""
    size = product.blocks * product.outputs * product.inputs
    return product.outputs <= LARGEST_DENSE and size <= LARGEST_ASSEMBLED


def hutchinson(product: Product, tolerance: float, generator: torch.Generator) -> tuple[float, float]:
    """RMS singular value, ||J||_F / sqrt(outputs), and its relative standard error.

    The mean of ||J'u||^2 over random signs u is ||J||_F^2 (Hutchinson, 1990).
    """
    found: list[float] = []
    mean = error = math.nan
    while len(found) < MOST_PROBES:
        u = product.output.random(product.blocks, generator)
        found.append(float(product.vjp(u).square().sum() / u.numel()))
        if len(found) < FEWEST_PROBES:
            continue
        seen = torch.tensor(found, dtype=torch.float64)
        mean = float(seen.mean())
        error = float(seen.std()) / len(found) ** 0.5 / (2 * mean) if mean else 0.0
        if not error > tolerance:
            break
    return math.sqrt(mean), error


def golub_kahan(product: Product, tolerance: float, generator: torch.Generator) -> tuple[float, float]:
    """Largest singular value and its relative residual, by bidiagonalisation (Golub and Kahan, 1965).

    All blocks at once, every vector orthogonalised twice against all before it. The value approaches the
    true one from below; it stops when its residual is within `tolerance` of it. The smallest values of
    the bidiagonal matrix are no estimate of the operator's, and are not returned.
    """
    u = _normalised(product.output.random(product.blocks, generator))
    left, right = [u], list[Tensor]()
    alphas, betas = list[Tensor](), list[Tensor]()
    value = residual = 0.0
    for _ in range(min(MOST_STEPS, product.outputs, product.inputs)):
        v = _orthogonal(product.vjp(left[-1]), right)
        alphas.append(v.norm(dim=1))
        right.append(_normalised(v))
        u = _orthogonal(product.jvp(right[-1]), left)
        betas.append(u.norm(dim=1))
        # What is left of an exhausted Krylov space is rounding: no direction to go on in.
        exhausted = betas[-1] <= product.eps * torch.stack(alphas).amax(0)
        left.append(torch.where(exhausted[:, None], 0.0, _normalised(u)))
        bidiagonal = torch.diag_embed(torch.stack(alphas, 1))
        if len(alphas) > 1:
            bidiagonal += torch.diag_embed(torch.stack(betas[:-1], 1), -1)
        _, values, vh = torch.linalg.svd(bidiagonal)
        largest, last = values[:, 0], vh[:, 0, -1]
        value = float(largest.max())
        # Left singular vectors pair with the next output-side vector: J v = s u + beta (e_k' y) u_(k+1).
        residual = float((betas[-1] * last.abs()).max()) / value if value else 0.0
        if len(alphas) > 2 and residual <= tolerance:
            break
    return value, residual


def _orthogonal(vector: Tensor, basis: Sequence[Tensor]) -> Tensor:
    for _ in range(2):
        for other in basis:
            vector = vector - (vector * other).sum(1, keepdim=True) * other
    return vector


def _normalised(vector: Tensor) -> Tensor:
    length = vector.norm(dim=1, keepdim=True)
    return torch.where(length > 0, vector / length, 0.0)


def estimate(product: Product, tolerance: float, seed: int) -> tuple[Estimate, str]:
    """The singular values by the cheapest method that is exact enough, and why the largest is missing, if so."""
    generator = torch.Generator().manual_seed(seed)
    found = diagonal(product, generator) or (dense(product) if fits_dense(product) else None)
    if found is not None:
        return found, ""
    rms, rms_error = hutchinson(product, tolerance, generator)
    largest, error, why = math.nan, math.nan, ""
    try:
        mismatch = product.adjoint_error(generator)
        if mismatch <= 1000 * product.eps:
            largest, error = golub_kahan(product, tolerance, generator)
        else:
            why = f"its backward cannot be differentiated: <u, Jv> and <J'u, v> differ by {mismatch:.0e}"
    except RuntimeError as raised:
        why = f"its backward cannot be differentiated: {str(raised).splitlines()[0]}"
    return Estimate("golub-kahan", largest, rms, None, error, rms_error), why
