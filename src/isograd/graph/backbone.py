"""The autograd graph of a loss and its backbone: the nodes that every backward path passes through.

The autograd graph *is* the product of Jacobians. Its nodes that no path from the loss to the input can
avoid - the dominators of the input - split any model into segments whose gains multiply exactly.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from torch.autograd.graph import Node

from isograd.graph.call import Call, Made
from isograd.graph.operations import IDENTITIES, WEIGHTED, kind_of_module
from isograd.graph.trace import Trace
from isograd.statistics import Site


class Graph:
    """The nodes below a loss in topological order, the loss first, so that gradients run forward.

    Built in time linear in nodes and edges, without recursion: a chain may have 100,000 nodes.
    """

    def __init__(self, root: Node) -> None:
        self.children: dict[Node, list[Node]] = {}
        finished: list[Node] = []
        stack: list[tuple[Node, Iterator[Node]]] = [(root, self._open(root))]
        while stack:
            node, rest = stack[-1]
            for child in rest:
                if child not in self.children:
                    stack.append((child, self._open(child)))
                    break
            else:
                finished.append(node)
                stack.pop()
        self.order: list[Node] = finished[::-1]

    def _open(self, node: Node) -> Iterator[Node]:
        self.children[node] = [child for child, _ in node.next_functions if child is not None]
        return iter(self.children[node])

    def below(self, top: Node, without: Collection[Node] = ()) -> set[Node]:
        """The nodes that a path from `top` leads to, itself included, and past those of `without`."""
        found, stack = {top}, [top]
        while stack:
            for child in self.children[stack.pop()]:
                if child not in found and child not in without:
                    found.add(child)
                    stack.append(child)
        return found

    def above(self, sink: Node) -> list[Node]:
        """The nodes on some path from the loss to the sink, both included, in topological order."""
        reaching = {sink}
        kept = [sink]
        for node in reversed(self.order):
            if node is not sink and any(child in reaching for child in self.children[node]):
                reaching.add(node)
                kept.append(node)
        return kept[::-1]

    def dominators(self, nodes: Sequence[Node]) -> list[Node]:
        """Those of `nodes` that every path from the first to the last passes through.

        `nodes` are in topological order and all lie on such a path. A node is avoidable exactly if
        some edge jumps over its position, so one sweep that remembers the furthest jump is enough.
        """
        position = {node: i for i, node in enumerate(nodes)}
        found: list[Node] = []
        furthest = 0
        for i, node in enumerate(nodes):
            if i >= furthest:
                found.append(node)
            furthest = max(furthest, max((position.get(c, 0) for c in self.children[node]), default=0))
        return found

    @cached_property
    def depth(self) -> dict[Node, int]:
        """Length of the longest path from the loss."""
        depth = dict.fromkeys(self.order, 0)
        for node in self.order:
            for child in self.children[node]:
                depth[child] = max(depth[child], depth[node] + 1)
        return depth


@dataclass
class Segment:
    """What lies between one backbone site and the next towards the input."""

    site: Site
    nodes: list[Node]
    """Its backbone nodes, output side first; the gradient is read and rescaled at the first."""
    made: Made
    inside: list[Node] = field(default_factory=list[Node])
    """Nodes between them and the next segment: what a residual branch does."""
    skip: set[tuple[Node, int]] = field(default_factory=set[tuple[Node, int]])
    """Edges (node, index) by which the skip path enters the next segment."""
    projected: bool = False
    """The skip path leads through layers of its own."""
    branch: Node | None = None
    """Where the residual branch ends: its last operation, next to the addition."""
    spine: list[Node] = field(default_factory=list[Node])
    """Backbone of the branch itself."""

    weighted: bool = False
    """Multiplies by weights: a layer in the sense of sigma^L."""
    outlets: list[Node] = field(default_factory=list[Node])
    """Results of the model inside of it that all gradient passes through, one or the other: what lies before them is
    the loss. Where it is read, the gradient of all of them together stands for the one at the first node."""


@dataclass
class Backbone:
    """Segments from the loss (first) to one input (last)."""

    segments: list[Segment]
    sink: Node
    exit: int
    """Index of the segment at the model's output: what lies before it belongs to the loss."""

    @property
    def tops(self) -> list[Node]:
        return [segment.nodes[0] for segment in self.segments]


def backbone(graph: Graph, trace: Trace, sink: Node) -> Backbone:
    """Named segments along the dominators of `sink`.

    Nodes of one torch call fold into one site, as do the parts of a small module that multiplies no
    weights (an RMSNorm written in five lines), and views and casts into the operation they follow.
    """
    above = graph.above(sink)
    position = {node: i for i, node in enumerate(above)}
    folded = _folded_invocations(trace)
    groups: list[list[Node]] = []
    last: object = None
    for node in graph.dominators(above):
        key = _key(trace.made.get(node), node, folded)
        # A concatenation with branches below it is a site of its own, not a part of what they start from.
        next_to = bool(groups) and position[node] == position[groups[-1][-1]] + 1
        if groups and (key == last if last is not None else next_to):
            groups[-1].append(node)
        else:
            groups.append([node])
        last = key
    segments: list[Segment] = []
    for i, nodes in enumerate(groups):
        following = groups[i + 1][0] if i + 1 < len(groups) else None
        end = position[following] if following is not None else position[nodes[-1]] + 1
        members = set(nodes)
        inside = [n for n in above[position[nodes[0]] + 1 : end] if n not in members]
        segments.append(_segment(graph, trace, nodes, inside, following, folded))
    end = _exit(graph, segments, trace)
    for segment in segments[:end]:
        segment.site = replace(segment.site, kind="loss")
    _name(segments)
    return Backbone(segments, sink, end)


def _key(made: Made | None, node: Node, folded: dict[int, str]) -> object:
    """What a node folds into; None: into whatever follows it towards the input."""
    if made is None:
        return node
    if made.call.invocation in folded:
        return made.call.invocation
    return None if made.call.kind == "reshape" else id(made.call)


def _folded_invocations(trace: Trace) -> dict[int, str]:
    """Module calls that are one site: modules without children whose calls multiply no weights."""
    kinds: dict[int, set[str]] = {}
    leaf: dict[int, str] = {}
    for made in trace.made.values():
        if made.call.leaf and made.call.module:
            kinds.setdefault(made.call.invocation, set()).add(made.call.kind)
            leaf[made.call.invocation] = made.call.leaf
    unfolded = WEIGHTED | {"product", "attention", "loss"}
    return {i: leaf[i] for i, found in kinds.items() if not found & unfolded and found != {"reshape"}}


def _segment(
    graph: Graph,
    trace: Trace,
    nodes: list[Node],
    inside: list[Node],
    following: Node | None,
    folded: dict[int, str],
) -> Segment:
    known = [trace.made[n] for n in nodes if n in trace.made]
    telling = [m for m in known if m.call.kind != "reshape"] or known
    made = telling[0] if telling else Made(Call("custom", "custom", "", 0, "", 0, ""))
    kind = made.call.kind
    if made.call.invocation in folded:
        kind = kind_of_module(folded[made.call.invocation], kind)
    shape = next((m.shape for m in (*telling, *known) if m.shape is not None), None) or ()
    dtype = next((m.dtype for m in (*telling, *known) if m.dtype), made.dtype)
    call = made.call
    site = Site(
        "", kind, call.operation, call.module, call.source, shape, dtype, 0, call.parameters, call.settings
    )
    segment = Segment(site, nodes, made, inside)
    segment.weighted = any(n in trace.made and trace.made[n].call.weighted for n in (*nodes, *inside))
    if following is not None and inside and kind == "addition":
        _split(graph, trace, segment, following)
    if segment.skip:
        segment.site = replace(site, kind="residual add")
    elif kind == "addition":
        segment.site = replace(site, kind="elementwise")
    return segment


def _split(graph: Graph, trace: Trace, segment: Segment, following: Node) -> None:
    """Tell the skip path of a residual addition from its branch."""
    top = segment.nodes[-1]
    inside = set(segment.inside)
    plain = {n for n in inside if n in trace.made and trace.made[n].call.kind in IDENTITIES}
    skip, path = _walk([top], plain, following)
    rest = [n for n in segment.inside if n not in path]
    if not skip and rest:  # a projection shortcut: the side with fewer weights
        sides = [child for child in dict.fromkeys(graph.children[top]) if child in inside]
        weights = {side: _weights_below(trace, side, inside, following) for side in sides}
        if len(sides) == 2 and weights[sides[0]] != weights[sides[1]]:
            small = min(sides, key=lambda s: weights[s])
            large = max(sides, key=lambda s: weights[s])
            other, taken = _walk([large], inside, following)
            mine, path = _walk([small], inside, following)
            skip = mine - other
            segment.projected = weights[small] > 0
            rest = [n for n in segment.inside if n in taken and n not in path]
    if not skip or not rest:
        return
    segment.skip = skip
    below = {child for n in rest for child in graph.children[n]}
    heads = [n for n in rest if n not in below]
    segment.branch = heads[0]
    if len(heads) == 1:
        segment.spine = graph.dominators([*rest, following])[:-1]


def _walk(
    starts: Sequence[Node], allowed: Collection[Node], end: Node
) -> tuple[set[tuple[Node, int]], set[Node]]:
    """Edges into `end` on paths through allowed nodes only, and the nodes of these paths."""
    edges: set[tuple[Node, int]] = set()
    above: dict[Node, list[Node]] = {start: [] for start in starts}
    stack = list(starts)
    while stack:
        node = stack.pop()
        for index, (child, _) in enumerate(node.next_functions):
            if child is end:
                edges.add((node, index))
            elif child is not None and child in allowed:
                if child not in above:
                    stack.append(child)
                above.setdefault(child, []).append(node)
    arriving, stack = set[Node](), [node for node, _ in edges]
    while stack:
        if (node := stack.pop()) not in arriving:
            arriving.add(node)
            stack.extend(above[node])
    return edges, arriving


def _weights_below(trace: Trace, start: Node, inside: set[Node], end: Node) -> int:
    _, seen = _walk([start], inside, end)
    calls = {id(trace.made[n].call) for n in seen if n in trace.made and trace.made[n].call.weighted}
    return len(calls)


def _exit(graph: Graph, segments: list[Segment], trace: Trace) -> int:
    """Where the model ends and the loss begins.

    Where several results of the model enter the loss, all gradient passes through no single one of them but through
    one or the other. What the loss makes of one number holds its factors, and is no gain of the model.
    """
    results = {n for n in trace.results if n in trace.made and trace.made[n].shape}
    for i, segment in enumerate(segments):
        if segment.site.kind != "loss" and results & set(segment.nodes):
            return i
    layers = [
        i
        for i, segment in enumerate(segments)
        if segment.weighted or segment.site.kind in ("normalisation", "residual add", "input")
    ]
    for i in layers:
        if i + 1 < len(segments) and (outlets := _outlets(graph, segments[i], segments[i + 1], results)):
            segments[i].outlets = outlets
            segments[i].skip = set()  # two terms of a loss are no block with a skip around it
            segments[i].site = replace(segments[i].site, operation="outputs", kind="elementwise")
            return i
        if segments[i].site.shape != ():
            return i
    return layers[0] if layers else 0


def _outlets(graph: Graph, segment: Segment, following: Segment, results: set[Node]) -> list[Node]:
    """The results inside of a segment, where no way from its top to the next segment leads past them."""
    return [n for n in segment.inside if n in results] if closed(graph, segment, following, results) else []


def closed(graph: Graph, segment: Segment, following: Segment, nodes: Collection[Node]) -> bool:
    """Does no way through a segment, or through its residual branch, lead past these nodes?"""
    starts = [segment.branch] if segment.branch is not None else segment.nodes[-1:]
    if segment.branch in nodes:
        return True
    past, _ = _walk(starts, set(segment.inside).difference(nodes), following.nodes[0])
    return not past


def _name(segments: list[Segment]) -> None:
    """Names as the user would say them, depths from the input."""
    total = Counter((s.site.module, s.site.kind, s.site.operation) for s in segments)
    seen: Counter[tuple[str, str, str]] = Counter()
    for depth, segment in enumerate(reversed(segments)):
        site = segment.site
        key = (site.module, site.kind, site.operation)
        seen[key] += 1
        what = site.kind if site.kind in SAID_BY_KIND else site.operation.replace("_", " ")
        repeat = f" #{seen[key]}" if total[key] > 1 else ""
        name = f"{site.module} · {what}{repeat}" if site.module else f"{what}{repeat}"
        segment.site = replace(site, name=name, depth=depth)


SAID_BY_KIND = {"residual add", "input", "attention", "normalisation", "embedding", "linear", "convolution"}


def step_site(made: Made) -> Site:
    """The place of one operation inside a segment."""
    call = made.call
    name = f"{call.module} · {call.operation}" if call.module else call.operation
    return Site(
        name,
        call.kind,
        call.operation,
        call.module,
        call.source,
        made.shape or (),
        made.dtype,
        -1,
        call.parameters,
        call.settings,
    )
