"""Where the model's data comes in: the ends of the backward that a backbone can lead to."""

from __future__ import annotations

from itertools import pairwise

from torch.autograd.graph import Node

from isograd.graph.backbone import Graph
from isograd.graph.call import Call
from isograd.graph.trace import Trace


def sinks(graph: Graph, trace: Trace) -> list[Node]:
    """The nodes where the model's data comes in, the deepest of the user's own inputs first.

    They are the float inputs, the embeddings of integer inputs and, where a closure hides both, the
    operations that read data which no gradient reaches.
    """
    found: list[tuple[bool, int, int, Node]] = []
    for i, node in enumerate(graph.order):
        made = trace.made.get(node)
        if made is None or made.shape is None:
            continue
        entrance = made.call.data and made.call.kind in ("embedding", "linear", "convolution", "recurrent")
        entrance = entrance and not _nothing(made.call)
        if made.call.kind == "input" or (entrance and not _has_signal(graph, trace, node)):
            found.append((made.call.user_input, graph.depth[node], -i, node))
    if not found:  # no data that we saw: the deepest operation that is more than a view of a parameter
        made_here = [
            n for n in graph.order if n in trace.made and trace.made[n].call.kind not in ("reshape",)
        ]
        deepest = max(made_here or graph.order[:1], key=lambda n: graph.depth[n])
        return [deepest]
    ordered = [node for *_, node in sorted(found, key=lambda f: f[:3], reverse=True)]
    if trace.made[ordered[0]].call.kind == "input":
        first = _first_layer(graph, trace)
        # A model that scales its output by statistics of its input passes gradient around all its layers.
        if first is not None and _layers(graph, trace, first) > 2 * _layers(graph, trace, ordered[0]) + 1:
            ordered.insert(0, first)
    return ordered


def _nothing(call: Call) -> bool:
    """Zeros alone: the state that a recurrence written by hand starts from is no data."""
    return call.kind != "embedding" and bool(call.given) and not any(bool(t.any()) for _, t in call.given)


def _first_layer(graph: Graph, trace: Trace) -> Node | None:
    """The deepest layer below which there is no other."""
    layers = [
        n
        for n in graph.order
        if n in trace.made and trace.made[n].shape is not None and trace.made[n].call.weighted
    ]
    return max(layers, key=lambda n: graph.depth[n], default=None)


def _layers(graph: Graph, trace: Trace, sink: Node) -> int:
    """Segments with a layer between the loss and this sink."""
    above = graph.above(sink)
    position = {node: i for i, node in enumerate(above)}
    weighted = [0]
    for node in above:
        weighted.append(weighted[-1] + (node in trace.made and trace.made[node].call.weighted))
    ends = [position[node] for node in graph.dominators(above)]
    return sum(weighted[b + 1] > weighted[a + 1] for a, b in pairwise(ends))


def _has_signal(graph: Graph, trace: Trace, node: Node) -> bool:
    """Does the gradient go on from this node into anything but its own call and parameters?"""
    call = trace.made[node].call
    stack, seen = list(graph.children[node]), set[Node]()
    while stack:
        child = stack.pop()
        if child in seen or child not in trace.made:
            continue
        seen.add(child)
        if trace.made[child].call is not call and trace.made[child].call.kind != "reshape":
            return True
        stack.extend(graph.children[child])
    return False
