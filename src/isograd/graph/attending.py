"""How open each attention is, and what made its logits: a product of queries and keys, a constant, what is added."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from torch.autograd.graph import Node

from isograd.flow import FACTORS
from isograd.graph.backbone import step_site
from isograd.graph.operations import ACTIVATIONS
from isograd.graph.readings import Readings
from isograd.graph.traced import Traced
from isograd.statistics import Attention, Logits

LEADING = {"softmax", "reshape", "linear", "elementwise", "addition", "dropout"}
"""Kinds by which additive attention comes from its tanh to its softmax; a product of two activations is another kind."""
SUMS = {"add", "radd", "iadd", "sub"}
SCALES = FACTORS - {"neg"}


def attentions(run: Traced, read: Readings) -> tuple[Attention, ...]:
    """Every attention of the forward, in one call or written out."""
    made, way = run.trace.made, _Way(run, read)
    slopes = {
        seen.node: values[0] / largest
        for seen, values in zip(run.trace.activations, read.activations, strict=True)
        if ACTIVATIONS[seen.function].bounded and (largest := ACTIVATIONS[seen.function].largest_slope)
    }
    return tuple(
        Attention(step_site(made[node]), spread, _through(run, node, slopes), way.of(node))
        for node, spread in _spreads(run, read)
        if made[node].call.kind != "softmax" or node in run.trace.mixing
    )


def choices(run: Traced, read: Readings) -> tuple[Attention, ...]:
    """Softmaxes that all of the signal passes through inside of the model."""
    segments = run.line.segments[run.line.exit + 1 :]
    inside = {node: segment.site for segment in segments for node in segment.nodes}
    return tuple(
        Attention(inside[node], spread)
        for node, spread in _spreads(run, read)
        if node in inside and node not in run.trace.mixing and inside[node].kind == "softmax"
    )


def _spreads(run: Traced, read: Readings) -> Iterator[tuple[Node, float]]:
    return zip((seen.node for seen in run.trace.attentions), read.spreads, strict=True)


def _through(run: Traced, node: Node, slopes: dict[Node, float]) -> float:
    """What the derivative of bounded functions leaves between the sums of queries and keys and their softmax."""
    stack, walked, left = [node], set[Node](), 1.0
    while stack:
        if (node := stack.pop()) in walked:
            continue
        walked.add(node)
        if node in slopes:
            left = min(left, slopes[node])
        elif node not in run.trace.made or run.trace.made[node].call.kind in LEADING:
            stack += run.graph.children[node]
    return left


class _Way:
    """From a softmax that is written out back to the product of queries and keys."""

    def __init__(self, run: Traced, read: Readings) -> None:
        self.run, self.read, self.made = run, read, run.trace.made

    def of(self, softmax: Node) -> Logits | None:
        """None: one call does it all, or the product was not found."""
        if self.made[softmax].call.kind != "softmax":
            return None
        node, found = self._end(softmax), Logits()
        while node is not None and self.made[node].call.kind != "product":
            call, end = self.made[node].call, self._end(node)
            if call.kind not in LEADING or end is None:
                return None
            size, given = self.read.rms[node], self.read.rms[end]
            if not (given > 0 and math.isfinite(size)):  # masked
                pass
            elif call.operation in SUMS and len(self.run.graph.children[node]) == 2:
                louder = math.sqrt(max(size**2 - given**2, 0.0)) / given
                found = replace(found, louder=louder, added=step_site(self.made[node]))
            elif call.operation in SCALES:
                found = replace(found, times=found.times * size / given, scaled=step_site(self.made[node]))
            node = end
        return found if node is not None else None

    def _end(self, node: Node) -> Node | None:
        """The nearest call of a known size on the way to the product, behind what gives its input another shape."""
        ways = [below for below in self.run.graph.children[node] if self._leads(below)]
        while len(ways) == 1:
            (node,) = ways
            if node in self.read.rms and self.made[node].call.kind not in ("reshape", "dropout"):
                return node
            ways = [below for below in self.run.graph.children[node] if self._leads(below)]
        return None

    def _leads(self, node: Node) -> bool:
        """Does a product of two activations lie behind it?"""
        stack, walked = [node], set[Node]()
        while stack:
            if (node := stack.pop()) in walked:
                continue
            walked.add(node)
            if node in self.made and self.made[node].call.kind == "product":
                return True
            if node not in self.made or self.made[node].call.kind in LEADING - {"linear"}:
                stack += self.run.graph.children[node]
        return False
