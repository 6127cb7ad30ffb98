"""Which activations weigh another part of the signal, and which close all ways of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

from torch.autograd.graph import Node

from isograd.graph.backbone import Graph, closed
from isograd.graph.operations import is_trivial, operation_of
from isograd.graph.traced import Traced

PLAIN = {"add", "sub", "rsub", "mul", "div", "neg"}
"""Arithmetic: with one part of the signal in it, the rest are constants."""
BETWEEN = {"sigmoid", "hardsigmoid"}
"""Functions between 0 and 1: what they are multiplied with is the signal, though it be an activation too."""


def gates(run: Traced) -> set[Node]:
    """Activations that weigh another part of the signal, between the model's output and its input."""
    functions = _functions(run)
    parts = [[*s.nodes, *s.inside] for s in run.line.segments[run.line.exit :]]
    return {node for nodes in parts for node in _weighing(run.graph, nodes, functions)}


def abreast(run: Traced) -> set[Node]:
    """Activations that together close every way of the signal through a segment or a residual branch.

    Function by function. A gate only weighs the signal: the way through it is none.
    """
    functions = _functions(run)
    found = set[Node]()
    for segment, following in pairwise(run.line.segments[run.line.exit :]):
        inside = functions.keys() & segment.inside
        weighing = inside & _weighing(run.graph, [*segment.nodes, *segment.inside], functions)
        if not inside or closed(run.graph, segment, following, weighing):
            continue
        for name in {functions[node] for node in inside - weighing}:
            same = {node for node in inside - weighing if functions[node] == name}
            if closed(run.graph, segment, following, weighing | same):
                found |= same
    return found


def _functions(run: Traced) -> dict[Node, str]:
    return {a.node: a.function for a in run.trace.activations}


def _weighing(graph: Graph, nodes: Sequence[Node], functions: Mapping[Node, str]) -> set[Node]:
    """Activations that are multiplied with another part of the signal, as the gate of a GLU or of a squeeze-and-excitation.

    Of tanh(f) * sigmoid(g) the sigmoid is the gate. Views and arithmetic with constants may stand between: h * (1 - gate).
    """

    def parts(node: Node) -> list[Node]:
        return [child for child in graph.children[node] if not hasattr(child, "variable")]

    found = set[Node]()
    for node in nodes:
        factors = parts(node)
        if operation_of(node) != "mul" or len(factors) < 2:
            continue
        ends: list[Node] = []
        for factor in factors:
            while (is_trivial(operation_of(factor)) or operation_of(factor) in PLAIN) and len(
                parts(factor)
            ) == 1:
                (factor,) = parts(factor)
            ends.append(factor)
        active = {end for end in ends if end in functions}
        between = {end for end in active if functions[end] in BETWEEN}
        found |= between if between and len(active) == len(ends) else active
    return found
