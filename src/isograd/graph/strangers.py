"""Parameters that a loss depends on and that are nobody's: layers in a plain list are trained by no optimizer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import Node


def strangers(nodes: Iterable[Node], known: set[int]) -> list[Tensor]:
    """The parameters among these nodes of a graph that are not known by their id; tensors that were made by hand are none."""
    variables: Iterator[Any] = (
        getattr(node, "variable", None) for node in nodes if type(node).__name__ == "AccumulateGrad"
    )
    found = {id(v): v for v in variables if isinstance(v, nn.Parameter) and id(v) not in known}
    return list(found.values())


def told(found: list[Tensor], nobody: str) -> str:
    """What is said of them. `nobody`: whose they are not."""
    largest = max(found, key=lambda p: p.numel())
    shape = " x ".join(map(str, largest.shape)) or "a single number"
    return (
        f"the loss depends on {len(found)} that are {nobody}, the largest {shape}: of another network, or of layers in a "
        "plain list or dict, which only nn.ModuleList and nn.ModuleDict register"
    )
