"""Where the first value that is not finite came from."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from torch.autograd.graph import Node

from isograd.graph.backbone import Graph, step_site
from isograd.graph.backward import Backward
from isograd.graph.call import Call
from isograd.graph.operations import operation_of
from isograd.graph.traced import Traced
from isograd.statistics import NonFinite

GROWN = 1e6
"""rms of what an operation was given, from which its Inf is the end of a growth and no fault of its own: a product of two
overflows float32 at 1e19, a layer at 1e37, an exponential at 89."""


def first_nonfinite(
    run: Traced, passed: Backward, rms: Mapping[Node, float], *, reached: bool
) -> NonFinite | None:
    """The first operation, in order of execution, that made a non-finite value or was given one.

    `reached`: such a gradient reached a parameter. Where none did, a clamp or a mask has caught it.
    """
    if not math.isfinite(float(run.value.detach())):
        return _forward(run, rms)
    made = run.trace.made
    order = {node: i for i, node in enumerate(passed.fired)}
    bad = [node for node in order if not math.isfinite(float(passed.norms[node]))]
    if not bad or not reached:
        return None
    # Its gradient is a sum: of those that contributed, the last made it what it is.
    feeding = [n for n in order if n not in bad and bad[0] in _nearest(run.graph, passed.norms, n)]
    origin = max(feeding, key=lambda node: order[node], default=bad[0])
    operation, value = made[origin].call.operation, rms.get(origin, 0.0)
    words = f"the derivative of {operation} is not finite at its input"
    if not math.isfinite(value):
        words = f"{operation} made {_called(value)} in the forward, which did not reach the loss; its derivative does"
    return NonFinite("backward", step_site(made[origin]), _called(value), "numerics", words)


def _forward(run: Traced, rms: Mapping[Node, float]) -> NonFinite | None:
    """Of the values that are not finite and reach the loss as such, the first."""
    made = run.trace.made
    bad = sorted(_reaching(run.graph, rms), key=lambda n: made[n].call.order)
    if not bad:
        return None
    node, call = bad[0], made[bad[0]].call
    buffers = {id(buffer): name for name, buffer in run.model.named_buffers()}
    spoiled = [(name, tensor) for name, tensor in call.given if not bool(tensor.isfinite().all())]
    broken = [f"buffer {buffers[id(tensor)]}" for _, tensor in spoiled if id(tensor) in buffers]
    broken += [f"weight {name}" for name, p in run.model.named_parameters() if not bool(p.isfinite().all())]
    data = [(name, tensor) for name, tensor in spoiled if id(tensor) not in buffers]

    def found(cause: str, words: str) -> NonFinite:
        return NonFinite("forward", step_site(made[node]), _called(rms[node]), cause, words)

    if broken:
        return found("weights", f"not finite before the forward began: {', '.join(broken[:3])}")
    if call.operation == "input" or any(bool(tensor.isnan().any()) for _, tensor in data):
        who = f"; {data[0][0]} of {call.operation} held it" if data else ""
        return found("data", f"it came with the data, and no operation made it{who}")
    if data or _infinite(call):  # a mask: no fault before something makes a NaN of it
        who = (
            f"{data[0][0]} of {step_site(made[node]).place} held"
            if data
            else f"{step_site(made[node]).place} put in"
        )
        node = next((n for n in bad if math.isnan(rms[n])), None) or node
        operation = made[node].call.operation
        row = made[node].call.kind in ("softmax", "attention")
        words = f"{operation} made {_called(rms[node])} of the Inf that {who}"
        return found("mask", words + ": a row of it is masked throughout" if row else words)
    if nothing := _nothing(run, node):
        return found("empty", f"{call.operation} of nothing: {nothing}")
    if made[node].dtype == "float16" and math.isinf(rms[node]):
        return found("precision", f"{call.operation} went beyond 65504, the largest number of float16")
    if (size := _given(run.graph, rms, node)) > GROWN:
        return found("growth", f"{call.operation} made {_called(rms[node])} of what had grown to {size:.0e}")
    words = f"{call.operation} made {_called(rms[node])} out of finite values"
    if any(operation_of(n) == "copy_slices" and made[n].call is call for n in made):
        words += ", or of what was written into its input in place"
    return found("numerics", words)


def _given(graph: Graph, rms: Mapping[Node, float], node: Node) -> float:
    """Root mean square of the largest that an operation was given; 0: none was read."""
    return max((rms[below] for below in _nearest(graph, rms, node)), default=0.0)


def _called(value: float) -> str:
    return "a NaN" if math.isnan(value) else "an Inf"


def _infinite(call: Call) -> bool:
    """Is one of its own arguments infinite, as the -Inf of a masked_fill?"""
    return any(isinstance(value, float) and math.isinf(value) for _, value in call.settings)


def _nothing(run: Traced, node: Node) -> str:
    """Why there is nothing to average; '' where there is something."""
    if any(0 in shape for shape in _shapes_below(run, node)):
        return "its input is empty"
    for call in run.trace.losses:
        low, high = call.values[4:6].tolist()
        if call.node is node and call.target == "classes" and low == high < 0:
            return f"every target is {low:.0f}, which is ignored"
    return ""


def _shapes_below(run: Traced, node: Node) -> Iterator[tuple[int, ...]]:
    """Shapes of what a call was given, behind the steps that it is made of: a cross entropy is of two."""
    for child in run.graph.children[node]:
        made = run.trace.made.get(child)
        if made is not None:
            yield from _shapes_below(run, child) if made.shape is None else (made.shape,)


def _reaching(graph: Graph, rms: Mapping[Node, float]) -> list[Node]:
    """Operations whose result is not finite, and from which such values lead to the loss without a break."""
    found: list[Node] = []
    stack, seen = [graph.order[0]], set[Node]()
    while stack:
        node = stack.pop()
        if node in seen or math.isfinite(rms.get(node, math.nan)):
            continue
        seen.add(node)
        if node in rms:
            found.append(node)
        stack.extend(graph.children[node])
    return found


def _nearest(graph: Graph, read: Mapping[Node, object], node: Node) -> set[Node]:
    """The nearest nodes below that were read."""
    found: set[Node] = set()
    stack, seen = list(graph.children[node]), set[Node]()
    while stack:
        child = stack.pop()
        if child in seen:
            continue
        seen.add(child)
        if child in read:
            found.add(child)
        else:
            stack.extend(graph.children[child])
    return found
