"""Where tensors go on without their gradient, and which parameters lie behind them."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from torch import Tensor
from torch.autograd.graph import Node

from isograd.graph.source import source

MOST_WALKED = 200_000
"""Nodes that are looked at for what lies behind detached tensors: a tenth of a second."""


class Cuts:
    """The places where a model detaches tensors, in the order in which it does."""

    def __init__(self, parameters: Collection[int]) -> None:
        self._parameters = parameters
        self._walked = 0
        self._behind: dict[str, set[int]] = {}

    def of(self, parameters: set[int]) -> tuple[str, ...]:
        """`detach at net.py:17` for each place behind which one of these parameters lies, given by their ids."""
        return tuple(place for place, behind in self._behind.items() if behind & parameters)

    def add(self, how: str, args: Iterable[Any]) -> None:
        """Remember which parameters lie behind tensors that are detached in this way by the user's current line."""
        given = [a for a in args if isinstance(a, Tensor)]
        stack: list[Node | Tensor] = [a if a.grad_fn is None else a.grad_fn for a in given]
        stack = [entry for entry in stack if not isinstance(entry, Tensor) or id(entry) in self._parameters]
        if not stack or self._walked > MOST_WALKED or not (where := source()):
            return
        behind = self._behind.setdefault(f"{how} at {where}", set())
        seen = set[Any]()
        while stack:
            node = stack.pop()
            if isinstance(node, Tensor):
                behind.add(id(node))
            elif node not in seen:
                seen.add(node)
                if (variable := getattr(node, "variable", None)) is not None:
                    behind.add(id(variable))
                stack.extend(child for child, _ in node.next_functions if child is not None)
        self._walked += len(seen)
