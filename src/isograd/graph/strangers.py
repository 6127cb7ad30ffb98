"""Parameters that a loss depends on and that are nobody's: layers in a plain list are trained by no optimizer."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import Any, cast

from torch import Tensor, nn
from torch.autograd.graph import Node

NESTED = 3
"""Lists of lists that are looked into: what holds itself has no end."""


def strangers(nodes: Iterable[Node], known: set[int]) -> list[Tensor]:
    """The parameters among these nodes of a graph that are not known by their id; tensors that were made by hand are none."""
    variables: Iterator[Any] = (
        getattr(node, "variable", None) for node in nodes if type(node).__name__ == "AccumulateGrad"
    )
    found = {id(v): v for v in variables if isinstance(v, nn.Parameter) and id(v) not in known}
    return list(found.values())


def held(model: nn.Module, found: Iterable[Tensor]) -> dict[int, str]:
    """Where plain lists and dicts of the model's own hold them, by their id: `encoders[0].weight`.

    A list of one is how another network is kept from being registered on purpose.
    """
    wanted, where = {id(p) for p in found}, dict[int, str]()
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if name not in ("_parameters", "_modules", "_buffers") and isinstance(value, list | tuple | dict):
                entries = cast("Collection[Any]", value)
                for place, p in _inside(entries, f"{path}.{name}".lstrip(".")) if len(entries) > 1 else ():
                    if id(p) in wanted:
                        where.setdefault(id(p), place)
    return where


def _inside(value: Any, place: str, depth: int = 0) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, nn.Parameter):
        yield place, value
    elif isinstance(value, nn.Module):
        yield from ((f"{place}.{name}", p) for name, p in value.named_parameters())
    elif isinstance(value, list | tuple | dict) and depth < NESTED:
        entries: Any = value
        for key, one in entries.items() if isinstance(entries, dict) else enumerate(entries):
            yield from _inside(one, f"{place}[{key!r}]", depth + 1)


def told(found: list[Tensor], nobody: str) -> str:
    """What is said of them. `nobody`: whose they are not."""
    largest = max(found, key=lambda p: p.numel())
    shape = " x ".join(map(str, largest.shape)) or "a single number"
    return (
        f"the loss depends on {len(found)} that are {nobody}, the largest {shape}: of another network, or of layers in a "
        "plain list or dict, which only nn.ModuleList and nn.ModuleDict register"
    )
