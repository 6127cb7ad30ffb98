"""The names of a model's parameters, as the user wrote them: without what wrappers add."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

ADDED = {
    "_orig_mod",
    "_forward_module",
    "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
    "_functional",
    "_torch_params",
}
"""Parts of a name that torch.compile, Fabric, FSDP, checkpoint wrappers and Keras put in."""

STRAY = "(not in the model)"
"""Begins the name of a parameter that only an optimizer knows."""
MANY = 32
"""Lists of parameters whose sites are remembered."""


class Names:
    """Sites of a watched model: parameters by their names, in the order of `named_parameters()`.

    Parameters that join during the training are found when they are first read; one that only an
    optimizer knows is named after its place there.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._refresh(())

    def find(self, parameters: Sequence[Tensor]) -> tuple[list[int], list[int]]:
        """Sites of these parameters, and their numbers of elements, whole where they are sharded.

        A complex number is two. Looked up where the same list comes again: it must not have been changed.
        """
        known = self._found.get(id(parameters))
        if known is None or known[0] is not parameters:
            if any(id(p) not in self._index for p in parameters):
                self._refresh(parameters)
            elements = [p.numel() * (2 if p.is_complex() else 1) for p in parameters]
            found = [self._index[id(p)] for p in parameters], elements
            if len(self._found) >= MANY:
                self._found.clear()
            self._found[id(parameters)] = known = parameters, found
        return known[1]

    def _refresh(self, strays: Sequence[Tensor]) -> None:
        named: dict[str, Tensor] = {clean(name, self._model): p for name, p in in_order(self._model)}
        known = {id(p) for p in named.values()}
        for p in strays:
            if id(p) not in known:
                named[f"{STRAY} {len(named)}"] = p
        self._held = list(named.values())  # no other tensor can come by the id of one that is held
        self._index = {id(p): i for i, p in enumerate(self._held)}
        self._found: dict[int, tuple[Sequence[Tensor], tuple[list[int], list[int]]]] = {}
        self.sites = tuple(named)
        self.shapes = tuple(tuple(p.shape) for p in self._held)


def in_order(model: nn.Module) -> list[tuple[str, Tensor]]:
    """`named_parameters()`, layer by layer: Keras keeps its own in the order of the alphabet, `dense_10` before `dense_2`."""
    named: list[tuple[str, Tensor]] = list(model.named_parameters())
    keras: Any = sys.modules.get("keras")
    if keras is None or not isinstance(model, keras.Model):
        return named
    variables: Any = model.variables
    places = {variable.path: i for i, variable in enumerate(variables)}
    return sorted(named, key=lambda one: places.get(one[0].rpartition(".")[2], len(places)))


def clean(name: str, model: nn.Module) -> str:
    """`module._orig_mod.fc.weight` of a DDP model -> `fc.weight`."""
    parts = name.split(".")
    while (
        isinstance(model, (DistributedDataParallel, DataParallel))
        or hasattr(model, "_forward_module")
        or hasattr(model, "_orig_mod")
    ):
        parts = parts[1:]
        model = next(model.children())
    return ".".join(part for part in parts if part not in ADDED)
