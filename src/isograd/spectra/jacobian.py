"""The Jacobian between two places of an autograd graph, as an operator.

Nothing is assembled that need not be: one backward gives a product with the transpose, and
differentiating that backward gives a product with the Jacobian itself, so a block of a million
dimensions works. Vectors are packed to float64 of shape (block, dimension); a batch whose samples do
not see each other is a block-diagonal operator, and its blocks are iterated on together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge


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
        """All elements as float64 of shape (…, block, dimension); … are dimensions before those of `like`."""
        batch = tensors[0].shape[: tensors[0].ndim - self.like[0].ndim]
        return torch.cat([t.detach().reshape(*batch, blocks, -1).double() for t in tensors], -1)

    def unpack(self, vector: Tensor) -> list[Tensor]:
        """The inverse of `pack`."""
        *batch, blocks, _ = vector.shape
        parts = vector.split([t.numel() // blocks for t in self.like], -1)
        return [part.reshape(*batch, *t.shape).to(t.dtype) for part, t in zip(parts, self.like, strict=True)]

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

    def vjp(self, cotangent: Sequence[Tensor], *, batched: bool = False) -> list[Tensor]:
        """J'u by one backward; of many u at once along a first dimension."""
        found = torch.autograd.grad(
            self.output.edges,
            self.input.edges,
            [u * 10**-self.log10 for u in cotangent],
            retain_graph=True,
            allow_unused=True,
            is_grads_batched=batched,
        )
        like = (
            [t.expand(len(cotangent[0]), *t.shape) for t in self.input.like] if batched else self.input.like
        )
        return _filled(found, like)

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
        self._batches = True
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

    def vjps(self, cotangents: Tensor) -> Tensor:
        """(probe, block, output) -> (probe, block, input), at once where every operation allows it."""
        if self._batches:
            try:
                found = self.output.unpack(cotangents)
                for factor in self.factors:
                    found = factor.vjp(found, batched=True)
                return self.input.pack(found, self.blocks)
            except RuntimeError:  # some operation's backward has no batching rule
                self._batches = False
        return torch.stack([self.vjp(cotangent) for cotangent in cotangents])

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
