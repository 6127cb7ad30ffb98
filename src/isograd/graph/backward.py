"""The backward pass, rescaled at every backbone node so that no depth under- or overflows, and its readings.

The norm at each backbone node is brought to [1/2, 1) by a power of two, which changes no digit of the
gradient, and the power is kept as a number: the true gradient is the one that passed times 2**exponent.
Where contributions that were rescaled differently meet off the backbone - tied weights, a bias shared by
all blocks, a memory that every decoder block reads - they are added at the largest of their scales.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

from isograd.graph.backbone import Backbone, Graph
from isograd.graph.norm import norm
from isograd.statistics import Failure

EVERY = 8
"""Operations within one site after which the gradient is rescaled again: none of float32 loses 4 decades."""

Gradients = tuple[Tensor | None, ...]


@dataclass
class _Meeting:
    """A node where gradients of different scales are added.

    Attributes:
        key: of the exponent of the sums.
        pending: contributions that have not arrived, by the output of the node that they belong to.
        sums: so far, by output; all at one scale.
    """

    key: int
    pending: Counter[int]
    sums: dict[int, Tensor] = field(default_factory=dict[int, Tensor])


class Backward:
    """Readings of one backward through a graph.

    Attributes:
        norms: norm of the incoming gradient of every node that was read, as it passed (rescaled).
        scale: key into `exponents` of the scale that a node's incoming gradient has.
        exponents: log2 of true over passed gradient, by key; float64 scalars on the device.
        rescalings: at how many sites a gradient of this scale was rescaled on its shortest way, by key.
        first: index of the segment behind which rescaling starts.
        splits: norms of skip and branch contribution below a residual segment, by its index.
        fired: the nodes read, in the order of execution.
    """

    def __init__(self, graph: Graph, line: Backbone, device: torch.device) -> None:
        self.graph, self.line = graph, line
        self.norms: dict[Node, Tensor] = {}
        self.splits: dict[int, tuple[Tensor, Tensor]] = {}
        self.fired: list[Node] = []
        self.exponents: dict[int, Tensor] = {0: torch.zeros((), dtype=torch.float64, device=device)}
        self.rescalings: dict[int, int] = {0: 0}
        self.scale: dict[Node, int] = {}
        # A loss needs no rescaling and has large tensors; but float16 may underflow in it already.
        half = any(segment.site.dtype == "float16" for segment in line.segments)
        self.first = 0 if half else line.exit
        self._tops = {node: i for i, node in enumerate(line.tops) if i > self.first}
        # A site may fold a loop of many operations: within it the gradient is rescaled too, now and then.
        self._between = {n for s in line.segments[line.exit :] for n in s.nodes[EVERY::EVERY]}
        self._held: dict[int, Tensor] = {}
        self._after: dict[Node, int] = {}
        self._meetings: dict[Node, list[tuple[int, int, int, _Meeting]]] = {}
        self._joint: dict[Node, _Meeting] = {}
        self._plan()

    def _plan(self) -> None:
        """Which scale each node's gradient has, and the edges by which different scales meet."""
        incoming: dict[Node, list[tuple[Node, int, int]]] = {}
        for node in self.graph.order:
            edges = incoming.pop(node, [])
            keys = {self._after[source] for source, _, _ in edges} or {0}
            if len(keys) == 1:
                key = keys.pop()
            else:
                key = len(self.rescalings)
                self.rescalings[key] = min(self.rescalings[k] for k in keys)
                meeting = _Meeting(key, Counter(output for _, _, output in edges))
                for source, index, output in edges:
                    scale = self._after[source]
                    self._meetings.setdefault(source, []).append((index, output, scale, meeting))
                if len(meeting.pending) > 1:
                    self._joint[node] = meeting
            self.scale[node] = self._after[node] = key
            if node in self._tops or node in self._between:
                self._after[node] = len(self.rescalings)
                self.rescalings[self._after[node]] = self.rescalings[key] + (node in self._tops)
            for index, (child, output) in enumerate(node.next_functions):
                if child is not None:
                    incoming.setdefault(child, []).append((node, index, output))

    def run(
        self, value: Tensor, wanted: Sequence[Tensor], read: Callable[[Node], bool]
    ) -> tuple[Gradients, Failure | None]:
        """Differentiate `value` by the wanted leaves; their gradients come back rescaled.

        Nothing is accumulated in any `.grad`. `read` tells off the backbone which nodes to read.
        """
        handles: list[Any] = []
        for i, segment in enumerate(self.line.segments):
            for node in {node for node, _ in segment.skip}:
                edges = [edge for source, edge in segment.skip if source is node]
                handles.append(node.register_hook(self._hold(i, edges)))
        handles += [node.register_hook(self._meet(edges)) for node, edges in self._meetings.items()]
        # before those that read what enters the node
        handles += [node.register_prehook(self._take_up(meeting)) for node, meeting in self._joint.items()]
        for node in self.graph.order:
            if node in self._tops or node in self._between:
                handles.append(node.register_prehook(self._renormalise(self._tops.get(node), node)))
            elif read(node):
                handles.append(node.register_prehook(self._read(node)))
        try:
            return torch.autograd.grad(value, wanted, allow_unused=True), None
        except Exception as error:
            text = "".join(traceback.format_exception_only(error)).strip()
            return (), Failure("backward", type(error).__name__, text, "")
        finally:
            self._held.clear()
            for handle in handles:
                handle.remove()

    def entering(self, index: int) -> float:
        """Norm, as it passed, with which the gradient entered segment `index`."""
        node = self.line.tops[index]
        length = self.norms[node]
        return float(torch.frexp(length).mantissa if node in self._tops else length)

    def _read(self, node: Node) -> Callable[[Gradients], None]:
        def hook(grads: Gradients) -> None:
            if any(g is not None for g in grads):
                self.norms[node] = norm(grads)
                self.fired.append(node)

        return hook

    def _renormalise(self, index: int | None, node: Node) -> Callable[[Gradients], Gradients]:
        def hook(grads: Gradients) -> Gradients:
            if all(g is None for g in grads):
                return grads
            length = norm(grads)
            self.norms[node] = length
            self.fired.append(node)
            if index is not None:
                self._split(index - 1, grads)
            dtype = next(g.dtype for g in grads if g is not None)
            exponent = _exponent(length, dtype)
            before = self.exponents[self.scale[node]].to(exponent.device)
            self.exponents[self._after[node]] = before + exponent
            factor = _power(-exponent, dtype)
            return tuple(None if g is None else g * factor for g in grads)

        return hook

    def _split(self, index: int, grads: Gradients) -> None:
        """Skip and branch share of what arrives below residual segment `index`."""
        held = self._held.pop(index, None)
        total = next((g for g in grads if g is not None), None)
        if held is not None and total is not None and held.shape == total.shape:
            self.splits[index] = (norm([held]), norm([total.detach() - held]))

    def _hold(self, index: int, edges: list[int]) -> Callable[[Gradients, Gradients], None]:
        def hook(grad_inputs: Gradients, grad_outputs: Gradients) -> None:
            for edge in edges:
                part = grad_inputs[edge]
                if part is not None:
                    self._held[index] = self._held[index] + part if index in self._held else part.detach()

        return hook

    def _meet(
        self, edges: list[tuple[int, int, int, _Meeting]]
    ) -> Callable[[Gradients, Gradients], Gradients]:
        """Hold contributions back until all have arrived, and pass on their sum with the last."""

        def hook(grad_inputs: Gradients, grad_outputs: Gradients) -> Gradients:
            passed = list(grad_inputs)
            for edge, output, key, meeting in edges:
                part, passed[edge] = passed[edge], None
                meeting.pending[output] -= 1
                if part is not None:
                    self._add(meeting, output, part, self.exponents[key])
                if not meeting.pending[output]:
                    passed[edge] = meeting.sums.get(output)
                    if len(meeting.pending) == 1:
                        meeting.sums.clear()
            return tuple(passed)

        return hook

    def _take_up(self, meeting: _Meeting) -> Callable[[Gradients], Gradients]:
        """The sums of a node's outputs at their common scale: each was passed on at the scale of its time."""

        def hook(grads: Gradients) -> Gradients:
            taken = tuple(meeting.sums.get(output, grad) for output, grad in enumerate(grads))
            meeting.sums.clear()
            return taken

        return hook

    def _add(self, meeting: _Meeting, output: int, part: Tensor, exponent: Tensor) -> None:
        """sum * 2**a + part * 2**b, both of norm about 1, at the larger exponent: no factor exceeds 1."""
        shift = _exponent(norm([part]), part.dtype)
        part, exponent = part * _power(-shift, part.dtype), exponent.to(shift.device) + shift
        if meeting.sums:
            before = self.exponents[meeting.key]
            largest = torch.maximum(before, exponent)
            part = part * _power(exponent - largest, part.dtype)
            meeting.sums = {n: s * _power(before - largest, s.dtype) for n, s in meeting.sums.items()}
            exponent = largest
        self.exponents[meeting.key] = exponent
        meeting.sums[output] = meeting.sums[output] + part if output in meeting.sums else part


def _exponent(length: Tensor, dtype: torch.dtype) -> Tensor:
    """The power of two that brings a norm to [1/2, 1), as far as the dtype can take it out at once."""
    exponent = torch.frexp(length).exponent.double().clamp(-_limit(dtype), _limit(dtype))
    return torch.where(torch.isfinite(length) & (length > 0), exponent, torch.zeros_like(exponent))


def _limit(dtype: torch.dtype) -> float:
    """Largest exponent of two that is taken out at once."""
    return 14.0 if dtype == torch.float16 else 126.0


def _power(exponent: Tensor, dtype: torch.dtype) -> Tensor:
    """2**exponent, exactly; what lies beyond the dtype's range is beyond its digits too."""
    return torch.exp2(exponent.clamp(-_limit(dtype), _limit(dtype))).to(dtype)
