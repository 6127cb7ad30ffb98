"""A backward whose gradients carry their exponent: nothing under- or overflows, on any graph.

`backward.py` rescales at the nodes that all gradient passes through. Along time there is none: an LSTM hands
on two tensors, a stack of layers more. Here every gradient is a sum of terms, each a tensor of moderate size
times a power of two, and every node of the graph is called once for each term. Where the gradients of
thousands of steps meet in one tensor, that of step 1,000 and that of step 1 are different terms, and neither
drowns in the other.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from isograd.graph.backbone import Graph

Terms = dict[int, Tensor]
"""exponent -> tensor; the gradient is the sum of tensor * 2**exponent."""


class ScaledBackward:
    """Gradients of one output by any places of its graph, any number of times."""

    def __init__(self, root: GradientEdge, places: Sequence[GradientEdge]) -> None:
        self.root, self.places = root, places
        graph = Graph(root.node)
        targets = {place.node for place in places}
        # A node is called if a place lies below it; the rest, and that is all parameters, is left alone.
        self.needed: set[Node] = set()
        for node in reversed(graph.order):
            if any(child in self.needed or child in targets for child in graph.children[node]):
                self.needed.add(node)
        self.order = [node for node in graph.order if node in self.needed]
        self._wanted = {(place.node, place.output_nr) for place in places}
        self._own: dict[Node, dict[tuple[int, int], Tensor]] = {}
        # Read once: a node's metadata is made anew on each request, and an unbind has thousands of outputs.
        self._like: dict[Node, Any] = {
            node: node._input_metadata  # pyright: ignore[reportAttributeAccessIssue]
            for node in {*self.needed, *targets, root.node}
        }

    @property
    def connected(self) -> bool:
        """Does any path lead from the output to any of the places?"""
        return bool(self.order) or any(place.node is self.root.node for place in self.places)

    def __call__(self, cotangent: Tensor) -> list[Terms]:
        """Terms of the gradient at each place; empty where it is exactly zero."""
        waiting: dict[Node, dict[int, Terms]] = {}
        self._add(waiting, self.root.node, self.root.output_nr, cotangent, 0)
        found: dict[tuple[Node, int], Terms] = {}
        with torch.no_grad():
            for node in [*self.order, *(p.node for p in self.places if p.node not in self.needed)]:
                terms = waiting.pop(node, {})
                self._own.pop(node, None)
                found |= {(node, nr): given for nr, given in terms.items() if (node, nr) in self._wanted}
                if node in self.needed:
                    self._pass(node, terms, waiting)
        return [found.get((place.node, place.output_nr), {}) for place in self.places]

    def _pass(self, node: Node, terms: dict[int, Terms], waiting: dict[Node, dict[int, Terms]]) -> None:
        outputs = len(self._like[node])
        for exponent in sorted({e for given in terms.values() for e in given}):
            grads = [terms.get(nr, {}).get(exponent) for nr in range(outputs)]
            if node.name() == "SelectBackward0":  # one step of many: a loop over x[:, t] has thousands
                assert grads[0] is not None
                self._put(waiting, node, grads[0], exponent)
                continue
            passed = _called(node, grads)
            for (child, nr), grad in zip(node.next_functions, passed, strict=False):
                if grad is not None and child is not None and self._leads(child, nr):
                    self._add(waiting, child, nr, grad, exponent)

    def _add(
        self, waiting: dict[Node, dict[int, Terms]], node: Node, nr: int, grad: Tensor, exponent: int
    ) -> None:
        """As the engine hands it on: in the shape and dtype of the forward value, broadcasting summed up."""
        like = self._like[node][nr]
        if grad.shape != like.shape:
            grad = grad.sum_to_size(like.shape)
        if grad.dtype != like.dtype:
            grad = grad.to(like.dtype)
        scaled = _scaled(grad, exponent)
        if scaled is not None:
            grad, exponent = scaled
            terms = waiting.setdefault(node, {}).setdefault(nr, {})
            known = terms.get(exponent)
            terms[exponent] = grad if known is None else known + grad

    def _put(self, waiting: dict[Node, dict[int, Terms]], node: Any, grad: Tensor, exponent: int) -> None:
        """The backward of a select, without a tensor of zeros for every step."""
        child, nr = node.next_functions[0]
        scaled = _scaled(grad, exponent)
        if scaled is None or not self._leads(child, nr):
            return
        grad, exponent = scaled
        like, terms = self._like[child][nr], waiting.setdefault(child, {}).setdefault(nr, {})
        known, own = terms.get(exponent), self._own.setdefault(child, {})
        if known is None:
            terms[exponent] = torch.zeros(like.shape, dtype=grad.dtype, device=grad.device)
        elif known is not own.get((nr, exponent)):  # it may be a view of what others hold
            terms[exponent] = known.clone()
        own[nr, exponent] = terms[exponent]
        index = node._saved_index
        # Torch shows a negative index as the unsigned number of the same bits.
        terms[exponent].select(node._saved_dim, index - 2**64 if index >= 2**63 else index).add_(grad)

    def _leads(self, node: Node, nr: int) -> bool:
        return node in self.needed or (node, nr) in self._wanted


def _called(node: Any, grads: list[Tensor | None]) -> Iterator[Tensor | None]:
    out = node.apply(*grads) if hasattr(node, "_forward_cls") else node(*grads)
    return iter(out if isinstance(out, tuple) else (out,))


def _scaled(grad: Tensor, exponent: int) -> tuple[Tensor, int] | None:
    """The term with its norm near 1; None for an exact zero."""
    size = _size(grad)
    if size == 0:
        return None
    if math.isfinite(size):
        window = _window(grad.dtype)
        shift = max(-1, min(1, round(math.frexp(size)[1] / window))) * window
        if shift:
            return grad * 2.0**-shift, exponent + shift
    return grad, exponent


def _window(dtype: torch.dtype) -> int:
    """Exponents of terms are multiples of this; a norm within half of it either way stays as it is."""
    return {torch.float16: 8, torch.float64: 512}.get(dtype, 48)


def _size(grad: Tensor) -> float:
    """Norm, or the largest magnitude where squares would leave the range of the dtype."""
    if grad.numel() == 0:
        return 0.0
    half = grad.dtype in (torch.float16, torch.bfloat16)
    length = float(torch.linalg.vector_norm(grad, dtype=torch.float32 if half else None))
    return length if 1e-15 < length < 1e18 else float(grad.abs().max())


def log10_norms(terms: Terms, axis: int, length: int) -> Tensor:
    """log10 of the norm of each slice along an axis: float64 of shape (length,), -inf where exactly zero."""
    logs = torch.full((length,), -math.inf, dtype=torch.float64)
    if not terms:
        return logs
    flat = {e: t.detach().movedim(axis, 0).reshape(length, -1).double().cpu() for e, t in terms.items()}
    sizes = {e: torch.linalg.vector_norm(t, dim=1).log2() + e for e, t in flat.items()}
    largest = torch.stack(list(sizes.values())).amax(0)
    scale = largest.clamp(min=-1e9)  # finite, where all is zero
    total = torch.stack(
        [t * torch.exp2((e - scale).clamp(max=1000.0))[:, None] for e, t in flat.items()]
    ).sum(0)
    return (torch.linalg.vector_norm(total, dim=1).log2() + scale) * math.log10(2.0)
