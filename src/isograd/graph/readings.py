"""What one backward left behind, as numbers: every scalar of a device comes back in one copy."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.autograd.graph import Node

from isograd.graph.backward import Backward
from isograd.graph.norm import norm
from isograd.graph.traced import Traced

LOG2 = math.log10(2.0)


class Readings:
    """Numbers of one forward and backward.

    Attributes:
        logs: log10 of the true gradient norm at every node that was read.
        scale: log10 of true over rescaled gradient, by the backward's key.
        rms: of the result of every operation.
        distinct: of what belongs to one token alone in it, where it has tokens.
        varying: of what differs between the samples in it.
        splits: norms of skip and branch contribution below a residual segment, as they passed, by its index.
        inputs, activations, losses, variances, given, spreads: the trace's statistics, in its order.
        weights: norm of every parameter, by name.
        means: mean of what a layer multiplies by, by the parameter's name.
        gradients: norm of its gradient as it passed and share of exact zeros in it, where it has one.
        loss: value of the loss.
    """

    def __init__(self, run: Traced, passed: Backward, grads: Mapping[str, Tensor | None]) -> None:
        scalars = _Scalars()
        trace = run.trace
        norms = {node: scalars.add(value) for node, value in passed.norms.items()}
        exponents = {key: scalars.add(value) for key, value in passed.exponents.items()}
        rms = {n: scalars.add(made.rms) for n, made in trace.made.items() if made.rms is not None}
        distinct = {n: scalars.add(m.distinct) for n, m in trace.made.items() if m.distinct is not None}
        varying = {n: scalars.add(m.varying) for n, m in trace.made.items() if m.varying is not None}
        splits = {i: (scalars.add(a), scalars.add(b)) for i, (a, b) in passed.splits.items()}
        inputs = {name: [scalars.add(v) for v in values] for name, values in trace.inputs.items()}
        weights = {name: scalars.add(norm([p])) for name, p in run.model.named_parameters() if p.numel()}
        multiply = trace.weights.fan_in
        means = {n: scalars.add(p.mean()) for n, p in run.model.named_parameters() if id(p) in multiply}
        gradients = {
            name: (scalars.add(norm([g])), scalars.add(1 - torch.count_nonzero(g) / max(g.numel(), 1)))
            for name, g in grads.items()
            if g is not None
        }
        activations = [[scalars.add(v) for v in a.values] for a in trace.activations]
        losses = [[scalars.add(v) for v in call.values] for call in trace.losses]
        variances = [scalars.add(seen.variance) for seen in trace.norms]
        given = {i: scalars.add(seen.given) for i, seen in enumerate(trace.norms) if seen.given is not None}
        spreads = [scalars.add(seen.spread) for seen in trace.attentions]
        value = scalars.add(run.value.detach().reshape(()))
        read = scalars.read()

        self.scale = {key: read[i] * LOG2 for key, i in exponents.items()}
        self.logs: dict[Node, float] = {
            node: log10(read[i]) + self.scale[passed.scale[node]] for node, i in norms.items()
        }
        self.rms = {node: read[i] for node, i in rms.items()}
        self.distinct = {node: read[i] for node, i in distinct.items()}
        self.varying = {node: read[i] for node, i in varying.items()}
        self.splits = {i: (read[a], read[b]) for i, (a, b) in splits.items()}
        self.inputs = {name: [read[i] for i in values] for name, values in inputs.items()}
        self.weights = {name: read[i] for name, i in weights.items()}
        self.means = {name: read[i] for name, i in means.items()}
        self.gradients = {name: (read[a], read[b]) for name, (a, b) in gradients.items()}
        self.activations = [[read[i] for i in values] for values in activations]
        self.losses = [[read[i] for i in values] for values in losses]
        self.variances = [read[i] for i in variances]
        self.given = [read[given[i]] if i in given else math.nan for i in range(len(variances))]
        self.spreads = [read[i] for i in spreads]
        self.loss = read[value]


class _Scalars:
    """Device scalars, read back together in one copy per device."""

    def __init__(self) -> None:
        self._tensors: list[Tensor] = []

    def add(self, value: Tensor) -> int:
        self._tensors.append(value.detach())
        return len(self._tensors) - 1

    def read(self) -> list[float]:
        result = [0.0] * len(self._tensors)
        for device in {t.device for t in self._tensors}:
            mine = [i for i, t in enumerate(self._tensors) if t.device == device]
            values: list[float] = torch.stack([self._tensors[i].double() for i in mine]).tolist()
            for i, value in zip(mine, values, strict=True):
                result[i] = value
        return result


def log10(value: float) -> float:
    """-inf of 0, nan of what is no norm."""
    if value > 0:
        return math.log10(value)
    return -math.inf if value == 0 else math.nan
