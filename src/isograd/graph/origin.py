"""Where the first value that is not finite came from."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch.autograd.graph import Node

from isograd.flow import NonFinite
from isograd.graph.backbone import Graph, step_site
from isograd.graph.backward import Backward
from isograd.graph.trace import Made
from isograd.graph.traced import Traced


def first_nonfinite(
    run: Traced, passed: Backward, rms: Mapping[Node, float], *, reached: bool
) -> NonFinite | None:
    """The first operation, in order of execution, that made a non-finite value out of finite ones.

    `reached`: such a gradient reached a parameter. Where none did, a clamp or a mask has caught it.
    """
    made = run.trace.made
    if not math.isfinite(float(run.value.detach())):
        first = min(
            (n for n in run.graph.order if not math.isfinite(rms.get(n, 0.0))),
            key=lambda n: made[n].call.order,
            default=None,
        )
        return None if first is None else _nonfinite("forward", made[first], rms[first])
    order = {node: i for i, node in enumerate(passed.fired)}
    bad = [node for node in order if not math.isfinite(float(passed.norms[node]))]
    if not bad or not reached:
        return None
    # Its gradient is a sum: of those that contributed, the last made it what it is.
    feeding = [n for n in order if n not in bad and bad[0] in _next_read(run.graph, passed, n)]
    origin = max(feeding, key=lambda node: order[node], default=bad[0])
    return _nonfinite("backward", made[origin], math.nan)


def _next_read(graph: Graph, passed: Backward, node: Node) -> set[Node]:
    """The nearest nodes below whose gradient was read."""
    found: set[Node] = set()
    stack, seen = list(graph.children[node]), set[Node]()
    while stack:
        child = stack.pop()
        if child in seen:
            continue
        seen.add(child)
        if child in passed.norms:
            found.add(child)
        else:
            stack.extend(graph.children[child])
    return found


def _nonfinite(phase: str, made: Made, value: float) -> NonFinite:
    elements = math.prod(made.shape or ())
    return NonFinite(phase, step_site(made), int(math.isnan(value)), int(math.isinf(value)), elements)
