"""The layers of a model as a flow saw them: which weights multiply, with what fan-in, and what acts after them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor, nn

from isograd.flow import Flow
from isograd.graph.operations import ACTIVATIONS, WEIGHTED
from isograd.own import slopes

UNSEEN = 100
"""Time steps to remember where the length of the sequences was not seen."""


@dataclass(frozen=True, slots=True)
class Layer:
    """A weight that the signal is multiplied by. Frozen ones are not among the layers: they are not ours to draw."""

    weight: str
    """Parameter name."""
    biases: tuple[str, ...]
    """Parameters of its module that are added."""
    module: str
    shape: tuple[int, ...]
    fan_in: int
    sigma_w: float
    """Root mean square of the weights times sqrt(fan_in): theory's sigma_w."""
    activation: str
    """Function that the output goes through before the next layer; 'linear': none."""
    calls: int
    """Times that it acts along the backbone: several in a recurrence or a shared layer, 0 beside it."""
    head: bool
    """The last layer before the loss."""
    convolution: bool = False
    rows: tuple[int, int] | None = None
    """Of the parameter, from and to: it holds several layers; None: all of them."""
    attends: bool = False
    """A projection of an attention: what is multiplied with other activations, or comes of it."""
    half: bool = False
    """In a number format of 16 bits, in which torch factorises no matrices."""
    times: float = 1.0
    """Constant by which its output is multiplied before anything else, as in sin(30 W x): a part of its gain."""

    @property
    def fan_out(self) -> int:
        matrix = self.shape[1:] if self.stacked else self.shape
        return max(math.prod(matrix) // self.fan_in, 1)

    @property
    def stacked(self) -> bool:
        """Several matrices in one parameter, (layer, in, out)."""
        three = len(self.shape) == 3 and min(self.shape) > 1
        return three and not self.convolution and self.fan_in in self.shape[1:]


@dataclass(frozen=True, slots=True)
class _Place:
    kind: str
    operation: str
    module: str


def layers(flow: Flow, model: nn.Module, exchanged: Mapping[str, str] | None = None) -> list[Layer]:
    """The trainable layers in the order of their parameters.

    Args:
        flow: measured on `model`.
        model: looked at only.
        exchanged: activation functions that are to be another, the user's own among them: {'sigmoid': 'tanh'}.
    """
    line = list(_line(flow))
    after = _after(line, ACTIVATIONS.keys() | (exchanged or {}).keys())
    calls = Counter(p.module for p in line if p.kind in ("linear", "convolution"))
    convolutions, times = {p.module for p in line if p.kind == "convolution"}, multiplied(flow, model)
    common = common_activation(flow)
    plain = not flow.splits and sum(p.kind == "activation" for p in line) > 0
    parameters = dict(model.named_parameters())
    depths = {p.name: p.depth for p in flow.parameters if p.fan_in and p.state != "frozen"}
    deepest = max((d for d in depths.values() if not math.isnan(d)), default=math.nan)
    last = next((p.module for p in reversed(line) if p.kind in WEIGHTED), "")
    of_head = {id(p) for p in model.get_submodule(last).parameters(recurse=False)} if last else set[int]()
    attending = _attending(flow)
    biases: dict[str, list[str]] = {}
    for known in flow.parameters:
        if known.bias and known.state != "frozen":
            biases.setdefault(known.name.rpartition(".")[0], []).append(known.name)
    found: list[Layer] = []
    for known in flow.parameters:
        if not known.fan_in or known.state == "frozen" or known.name not in parameters:
            continue
        module = known.name.rpartition(".")[0]
        head = id(parameters[known.name]) in of_head if last else known.depth == deepest
        attends = known.name in attending
        function = "linear" if head or attends else after.get(module, common if plain else "linear")
        whole = parameters[known.name]
        for part, tensor in enumerate(whole.chunk(known.matrices)):
            rows = (part * len(tensor), (part + 1) * len(tensor))
            found.append(
                Layer(
                    known.name,
                    tuple(biases.get(module, ()) if module and part == 0 else ()),
                    module,
                    tuple(tensor.shape),
                    known.fan_in,
                    rms(tensor) * math.sqrt(known.fan_in),
                    (exchanged or {}).get(function, function),
                    calls[module],
                    head,
                    module in convolutions
                    or (not module and tensor.ndim > 2 and tensor[0].numel() == known.fan_in),
                    rows if known.matrices > 1 else None,
                    attends,
                    tensor.element_size() < 4,
                    1.0 if head else times.get(module, 1.0),
                )
            )
    return found


def _attending(flow: Flow) -> set[str]:
    """Parameters of the projections of attentions, as far as the attentions themselves know them."""
    sites = (*flow.sites, *(step.site for steps in flow.ledgers.values() for step in steps))
    return {name for site in sites if site.kind == "attention" for name in site.parameters}


def recurrent(found: list[Layer]) -> list[Layer]:
    """Layers that the signal goes through again and again, as the state of a recurrence does."""
    return [layer for layer in found if layer.calls > 2 and layer.fan_in == layer.fan_out]


def is_chain(flow: Flow, found: list[Layer]) -> bool:
    """One layer after the other, with nothing but activations between them: what theory's gain per layer is of."""
    plain = not flow.splits and all(p.kind not in ("normalisation", "attention") for p in _line(flow))
    inside = (step.site.kind for steps in flow.ledgers.values() for step in steps)
    plain = plain and not any(kind in WEIGHTED for kind in inside)  # a segment with layers side by side
    return plain and all(layer.calls <= 1 for layer in found) and sum(not la.head for la in found) > 1


def steps_of(flow: Flow, place: str, module: nn.Module) -> int:
    """Time steps of a recurrent module: of the sequences that it was given, or how often a cell was called."""
    sites = [s for s in flow.sites if s.module == place and s.kind == "recurrent"]
    if len(sites) == 1 and len(sites[0].shape) in (2, 3):
        batched = len(sites[0].shape) == 3
        return sites[0].shape[1 if batched and getattr(module, "batch_first", False) else 0]
    return len(sites) if len(sites) > 1 else UNSEEN


def batch_norms(flow: Flow) -> int:
    """Batch normalisations that the signal cannot get round."""
    return 0 if flow.splits else sum("batch_norm" in site.operation for site in flow.sites)


def norms(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Normalisation layers, of torch or of anybody: known by their name, as all of them are called."""
    for name, module in model.named_modules():
        if "norm" in type(module).__name__.lower() and next(module.children(), None) is None:
            yield name, module


def rms(tensor: Tensor) -> float:
    """Root mean square of the elements."""
    return float(tensor.detach().float().square().mean().sqrt()) if tensor.numel() else math.nan


def common_activation(flow: Flow) -> str:
    """The activation function that most of the hidden signal goes through; 'linear' without one."""
    seen = Counter(a.function for a in flow.hidden_activations)
    return seen.most_common(1)[0][0] if seen else "linear"


def multiplied(flow: Flow, model: nn.Module) -> dict[str, float]:
    """What multiplies the output of a layer, by its module: constants right behind it on the backbone, which scale signal
    and gradient alike, what a function of the user's own is at its critical point, and where the layer is the weight of
    another one the root of that one's fan-in (Chang et al. 2020).
    """
    before = {site.depth: layer for layer, site in pairwise(flow.sites)}
    constants = {
        before[depth].module: times
        for depth, times in flow.factors.items()
        if before[depth].kind in ("linear", "convolution")
    }
    made = {p.name.rpartition(".")[0]: math.sqrt(p.generates) for p in flow.parameters if p.generates}
    return slopes(flow, model) | constants | made


def _line(flow: Flow) -> Iterator[_Place]:
    """Everything that the signal goes through, input first: the backbone with the inside of its segments."""
    for site in flow.sites:
        for step in reversed(flow.ledgers.get(site.depth, ())):
            yield _Place(step.site.kind, step.site.operation, step.site.module)
        yield _Place(site.kind, site.operation, site.module)


def _after(line: list[_Place], activations: Collection[str]) -> dict[str, str]:
    """The activation between each layer's module and the next layer, where there is one."""
    found: dict[str, str] = {}
    module = ""
    for place in line:
        if place.kind in WEIGHTED:
            if module and module not in found:
                found[module] = "linear"
            module = place.module
        elif place.kind in ("residual add", "attention", "loss"):
            if module:
                found.setdefault(module, "linear")
            module = ""
        elif place.operation in activations and module:
            found[module] = place.operation
            module = ""
    return found
