"""Where in a model a structural change belongs, read off its flow: layers, residual branches, parts that keep their width.

The backbone tells what the names of an architecture do not: which modules the signal passes one after another, where a
branch leaves the stream and where it comes back. Everything here looks and changes nothing.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, takewhile

from torch import Tensor, nn

from isograd import theory
from isograd.flow import Flow
from isograd.statistics import Site
from isograd.theory import Operation

NORMS = {
    "layer_norm": theory.LayerNorm(),
    "group_norm": theory.LayerNorm(),
    "rms_norm": theory.RMSNorm(),
    "batch_norm": theory.BatchNorm(),
}
"""What theory knows of the normalisations on a backbone; groups of channels average like all of them."""


@dataclass(frozen=True)
class Layer:
    """One linear layer or convolution on the backbone, with what follows it up to the next."""

    place: str
    """Module path."""
    module: nn.Module
    index: int
    """Of its site among the flow's sites."""
    site: Site
    fan_in: int
    between: tuple[Site, ...]
    """Sites after it and before the next layer."""

    @property
    def features(self) -> int:
        return self.site.shape[-1 - self.dims]

    @property
    def dims(self) -> int:
        """Dimensions of a convolution; 0: linear."""
        weight = getattr(self.module, "weight", None)
        return weight.ndim - 2 if self.site.kind == "convolution" and isinstance(weight, Tensor) else 0

    @property
    def normalised(self) -> bool:
        return any(site.kind == "normalisation" for site in self.between)

    @property
    def frozen(self) -> bool:
        return all(not p.requires_grad for p in self.module.parameters())

    @property
    def activation(self) -> str:
        return next((site.operation for site in self.between if site.kind == "activation"), "")

    def operations(self) -> list[Operation]:
        """This layer as theory sees it, with the weights it has; raises ValueError for an unknown activation."""
        weight = getattr(self.module, "weight", None)
        deviation = (
            float(weight.detach().float().square().mean().sqrt()) if isinstance(weight, Tensor) else 0.0
        )
        found: list[Operation] = [theory.Linear(self.fan_in, self.features, deviation)]
        for site in self.between:
            if site.kind == "activation" and site.operation not in theory.NAMES:
                raise ValueError(f"theory has no {site.operation}")
            if site.kind == "activation":
                found.append(theory.Interpolated(site.operation))
            elif site.operation in NORMS:
                found.append(NORMS[site.operation])
        return found


@dataclass(frozen=True)
class Branch:
    """One residual branch: where it leaves the stream, where it is added, and which norms are there."""

    entrance: str
    """Path of the largest module that holds the start of the branch and not the addition; '': none does."""
    addition: Site
    entered: tuple[int, ...]
    """Shape of the stream where the branch leaves it."""
    first: Site
    """The operation at its start."""
    inside: bool
    """A normalisation stands on the branch."""
    after: Site | None
    """The normalisation that follows the addition."""
    skip: float
    """Factor of the skip path on the gradient: 1 for a plain h + f(h)."""

    @property
    def convolutional(self) -> bool:
        return self.first.kind == "convolution"


@dataclass(frozen=True, slots=True)
class Part:
    """A stretch of the backbone that can be skipped: one module, or a run of an `nn.Sequential`'s children."""

    place: str
    """Module path; of the container, for a run."""
    run: tuple[int, int] | None
    """First child and the one after the last; None: the module as a whole."""
    entered: tuple[int, ...]
    left: tuple[int, ...]
    """Shapes of the signal before and after."""
    layers: tuple[Layer, ...]

    @property
    def keeps(self) -> bool:
        return self.entered == self.left


def layers(flow: Flow, model: nn.Module) -> list[Layer]:
    """Linear layers and convolutions on the backbone in forward order, the head last. Each module once."""
    modules = dict(model.named_modules())
    fan_in = {p.name: p.fan_in for p in flow.parameters}
    weighted = [i for i in flow.weighted if flow.sites[i].kind in ("linear", "convolution")]
    found: dict[str, Layer] = {}
    for number, i in enumerate(weighted):
        site = flow.sites[i]
        module = modules.get(site.module)
        fan = fan_in.get(f"{site.module}.weight", 0)
        if module is None or not fan or next(module.children(), None) is not None or site.module in found:
            continue
        if not site.shape:  # its result was not seen
            continue
        end = weighted[number + 1] if number + 1 < len(weighted) else len(flow.sites)
        between = tuple(s for s in flow.sites[i + 1 : end] if s.kind != "loss")
        found[site.module] = Layer(site.module, module, i, site, fan, between)
    return list(found.values())


def hidden(flow: Flow, model: nn.Module) -> list[Layer]:
    """Layers that something may be put behind: not the head, not inside an attention, not between residual sums."""
    inside = attentions(flow)
    return [layer for layer in layers(flow, model)[:-1] if not any(_within(layer.place, a) for a in inside)]


def attentions(flow: Flow) -> list[str]:
    """Paths of the modules that multiply activations with each other, as attention does; never the root."""
    sites = [*flow.sites, *(step.site for steps in flow.ledgers.values() for step in steps)]
    return list(dict.fromkeys(s.module for s in sites if s.kind in ("attention", "product") and s.module))


def branches(flow: Flow, model: nn.Module) -> list[Branch]:
    """Residual branches along the backbone, input first."""
    modules = dict(model.named_modules())
    classes = {name: type(module).__name__.lower() for name, module in modules.items()}
    found: list[Branch] = []
    for depth in sorted(flow.splits):
        steps = [step.site for step in flow.ledgers.get(depth, ()) if step.branch]
        if not steps:
            continue
        addition, first = flow.sites[depth], steps[-1]
        following = flow.sites[depth + 1] if depth + 1 < len(flow.sites) else None
        found.append(
            Branch(
                _climbed(first.module, addition.module, modules) if first.module in classes else "",
                addition,
                flow.sites[max(depth - 1, 0)].shape,
                first,
                any(s.kind == "normalisation" or "norm" in classes.get(s.module, "") for s in steps),
                following if following is not None and following.kind == "normalisation" else None,
                flow.splits[depth].skip,
            )
        )
    return found


def _climbed(path: str, outside: str, modules: dict[str, nn.Module]) -> str:
    """The longest way up from `path` that does not come to hold `outside`, to what is called and no mere list."""
    best = ""
    while path and not _within(outside, path):
        best = best if isinstance(modules[path], nn.ModuleList | nn.ModuleDict) else path
        path = path.rpartition(".")[0]
    return best


def _within(path: str, place: str) -> bool:
    return path == place or path.startswith(f"{place}.") or not place


def shared(path: str, other: str) -> str:
    """Path of the smallest module that holds both."""
    pairs = zip(path.split("."), other.split("."), strict=False)
    return ".".join(a for a, _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def keeps(flow: Flow, place: str) -> bool:
    """Does the signal leave a module inside the model, at each of its calls, in the shape in which it came?"""
    steps = list(pairwise(flow.sites))
    entered = [a.shape for a, b in steps if _within(b.module, place) and not _within(a.module, place)]
    left = [a.shape for a, b in steps if _within(a.module, place) and not _within(b.module, place)]
    return bool(place) and entered == left


MOST_LAYERS = 4
"""Layers that one skip connection may span: a branch of a transformer or of a bottleneck has up to three."""


def parts(flow: Flow, model: nn.Module) -> list[Part]:
    """The backbone between input layer and head, cut into the smallest parts that keep the signal's shape.

    A layer for which no part keeps its shape stands alone, with what follows it in its module.
    """
    found: list[Part] = []
    line = _Line(flow, model)
    at = 0
    while at < len(line.layers) - 1:
        here = list(line.around(line.layers[at]))
        chosen = next((part for part in here if part.keeps), here[0] if here else None)
        if chosen is not None:
            found.append(chosen)
        at += len(chosen.layers) if chosen is not None else 1
    return found


class _Line:
    """The backbone seen by its modules: where the sites of each begin and end."""

    def __init__(self, flow: Flow, model: nn.Module) -> None:
        self.flow, self.model = flow, model
        self.layers = layers(flow, model)
        self.spans: dict[str, tuple[int, int, int]] = {}
        """First and last site of a module path, and how many there are."""
        for i, site in enumerate(flow.sites):
            path = site.module
            while path:
                first, _, count = self.spans.get(path, (i, i, 0))
                self.spans[path] = first, i, count + 1
                path = path.rpartition(".")[0]
        self.names = {name: list(dict(module.named_children())) for name, module in model.named_modules()}
        self.positions = {
            f"{name}.{child}".lstrip("."): i
            for name, names in self.names.items()
            for i, child in enumerate(names)
        }

    def around(self, layer: Layer) -> Iterator[Part]:
        """Parts that begin with this layer and have at most `MOST_LAYERS`, the smallest first."""
        inner = layer.place
        while inner:
            outer = inner.rpartition(".")[0]
            parent = self.model.get_submodule(outer)
            chain = type(parent).forward is nn.Sequential.forward
            for part in self._runs(outer, self.positions[inner]) if chain else self._whole(inner):
                if not part.layers or part.layers[0].index != layer.index or len(part.layers) > MOST_LAYERS:
                    return
                yield part
            inner = outer

    def _runs(self, container: str, first: int) -> Iterator[Part]:
        """Runs of an `nn.Sequential`'s children from the given one on, short of the container as a whole."""
        names, held = self.names[container], list[str]()
        for last in range(first + 1, len(names) + 1):
            held.append(f"{container}.{names[last - 1]}".lstrip("."))
            if (first, last) == (0, len(names)) and container:
                return
            following = (
                None
                if last == len(names)
                else self.model.get_submodule(f"{container}.{names[last]}".lstrip("."))
            )
            if following is not None and not _weighs(following):
                continue  # an activation or a norm goes with the layer before it
            part = self._part(container, (first, last), held)
            if part is None:
                return
            yield part

    def _whole(self, place: str) -> Iterator[Part]:
        part = self._part(place, None, [place])
        if part is not None:
            yield part

    def _part(self, place: str, run: tuple[int, int] | None, held: list[str]) -> Part | None:
        """None: interleaved with other modules, holds the head, or joins and shrinks the signal."""
        spans = [self.spans[path] for path in held if path in self.spans]
        if not spans:
            return None
        first, last = min(a for a, _, _ in spans), max(b for _, b, _ in spans)
        whole = sum(n for _, _, n in spans) == last - first + 1
        if not whole or first == 0 or last >= self.layers[-1].index:
            return None
        if any(site.kind in ("pooling", "residual add") for site in self.flow.sites[first : last + 1]):
            return None
        begin = bisect_left(self.layers, first, key=lambda one: one.index)
        end = bisect_right(self.layers, last, key=lambda one: one.index)
        return Part(
            place,
            run,
            self.flow.sites[first - 1].shape,
            self.flow.sites[last].shape,
            tuple(self.layers[begin:end]),
        )


def _weighs(module: nn.Module) -> bool:
    """Begins a new part: has weights of a layer, or rearranges the signal."""
    shapes = isinstance(module, nn.Flatten | nn.Unflatten) or "pool" in type(module).__name__.lower()
    return shapes or any(p.ndim > 1 for p in module.parameters())


LONG = 24
"""Layers of a chain that theory is asked for one by one (some ms each): by then the signal is at its fixed point."""


def expected(
    flow: Flow, chain: Sequence[Layer], change: Callable[[Layer], list[Operation]]
) -> tuple[float, float]:
    """Decades that theory expects along a chain of layers, each seen by `change`, and their spread; NaN: unknown.

    Of a chain longer than `LONG`, the second half of its first layers stands for the rest.
    """
    if not chain:
        return math.nan, math.nan
    rms = float(flow.column("activation_rms")[max(chain[0].index - 1, 0)])
    try:
        layers = [change(layer) for layer in chain[:LONG]]
        operations = [operation for layer in layers for operation in layer]
        shared = 0.0 if any(map(_asks, operations)) else math.nan
        result = theory.expected(operations, rms=rms, shared=shared)
    except (ValueError, ArithmeticError):
        return math.nan, math.nan
    half = sum(len(layer) for layer in layers[: LONG // 2])
    rest = len(chain) - len(layers)
    each = sum(step.decades for step in result.steps[half:]) / (LONG // 2)
    return result.decades + rest * each, result.spread * math.sqrt(len(chain) / len(layers))


def _asks(operation: Operation) -> bool:
    """Does it need to know what two samples share?"""
    inside = operation.branch if isinstance(operation, theory.Residual) else ()
    return isinstance(operation, theory.BatchNorm) or any(map(_asks, inside))


def in_words(decades: float, spread: float, layers: int) -> str:
    """`-0.4 ± 0.2 decades over 20 layers`, or that theory is silent."""
    if math.isnan(decades):
        return "theory has no number for this chain of operations; measured by `repair`"
    return f"{decades:+.1f} ± {spread:.1f} decades over {layers} layers"
