"""What the layers of a model multiply by and add: their parameters, with the fan-in of each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from isograd.graph.call import Call
from isograd.graph.operations import parameter_of, summed_over

PRODUCTS = ("matmul", "rmatmul", "mv", "dot", "inner", "vecdot")
"""Calls that multiply by a vector and add none."""


class Weights:
    """Filled call by call; everything is by the parameter's id."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._names = {id(p): name for name, p in model.named_parameters()}
        self.fan_in: dict[int, int] = {}
        """Of the parameters that layers multiply by."""
        self.generated: dict[int, int] = {}
        """Of the parameters whose layer makes a weight, as in a hypernetwork: that weight's fan-in."""
        self.packed: set[int] = set()
        """Those that make queries, keys and values at once, one below the other."""
        self.biases: set[int] = set()
        """The parameters that those layers add."""

    def weigh(
        self, call: Call, tensors: list[Tensor], equation: object, maker: Callable[[Tensor], Call | None]
    ) -> None:
        """Which parameter this layer multiplies by, and with what fan-in.

        `maker` tells which call made a weight that is no parameter.
        """
        owned = [(t, parameter_of(t)) for t in tensors]
        if call.operation == "linear" or call.kind == "convolution":
            # what comes first is no weight, even where it is learned, as the queries of a decoder are
            owned = owned[1:]
            if owned and owned[0][1] is None:
                self._generate(owned[0][0], maker(owned[0][0]))
        summed = summed_over(equation, tensors) if isinstance(equation, str) else []
        for i, (operand, parameter) in enumerate(owned):
            if parameter is None or id(parameter) not in self._names:
                continue
            if operand.ndim < 2:  # a vector that is added, or one that scores what it is multiplied by
                if call.operation in PRODUCTS:
                    self.fan_in[id(parameter)] = operand.numel()
                else:
                    self.biases.add(id(parameter))
            elif i < len(summed):
                self.fan_in[id(parameter)] = summed[i]
            elif call.operation == "linear" or call.kind == "convolution":
                self.fan_in[id(parameter)] = operand[0].numel()
            else:  # a matrix product: x @ w, or w @ x
                self.fan_in[id(parameter)] = operand.shape[-2 if i == len(owned) - 1 else -1]

    def project(self, given: dict[str, Any]) -> None:
        """The layers of an attention that projects inside of its one call."""
        for name, value in given.items():
            if not isinstance(value, Tensor) or id(value) not in self._names:
                continue
            if name.endswith("_weight"):
                self.fan_in[id(value)] = value.shape[1]
            elif name.endswith("_proj_bias"):  # the other biases are a key and a value of their own
                self.biases.add(id(value))
        if not given["use_separate_proj_weight"]:
            self.packed.add(id(given["in_proj_weight"]))

    def _generate(self, weight: Tensor, call: Call | None) -> None:
        """A layer whose weight is no parameter: another one may have made it."""
        if call is not None and call.kind == "linear":
            layer = [p for p in self._model.parameters() if self._names[id(p)] in call.parameters]
            self.generated |= {id(p): weight[0].numel() for p in layer if p.ndim > 1}
