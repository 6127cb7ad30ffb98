"""Which models own the parameters of optimizers: found among the living objects, named by the running functions."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from isograd.monitor.names import STRAY

MANY = 10_000
"""Elements of a list or dict in which parameters are looked for: others hold data."""


class Parts(nn.Module):
    """What an optimizer trains that is no single module: several of them, and parameters that are in none."""

    def __init__(self, modules: dict[str, Any], loose: dict[str, Tensor]) -> None:
        super().__init__()
        # As they are: registering would ask for nn.Parameter, and for names without a dot.
        self._modules |= modules
        vars(self)["_parameters"] |= loose


def _variables() -> Iterator[tuple[str, Any]]:
    """The variables of the running functions, innermost first, in their order."""
    frame = sys._getframe(1)
    while frame is not None:
        yield from list(frame.f_locals.items())
        frame = frame.f_back


def names_in_use() -> dict[int, str]:
    """What the running functions call modules and tensors, by identity; those in a list or dict by their place in it."""
    found: dict[int, str] = {}
    for name, value in _variables():
        held: list[tuple[Any, Any]] = [(name, value)]
        if (
            type(value) in (dict, list, tuple) and len(value) <= MANY
        ):  # no others: those may run code of the user's
            dictionary = type(value) is dict
            held += value.items() if dictionary else ((f"{name}.{i}", one) for i, one in enumerate(value))
        for key, one in held:
            if issubclass(type(one), nn.Module | Tensor):
                found.setdefault(id(one), str(key))
    return found


def owners(optimizers: list[Any], objects: list[Any], names: dict[int, str]) -> list[tuple[Any, list[Any]]]:
    """What owns each optimizer's parameters, with its optimizers: the outermost module, or `Parts`."""
    modules = [o for o in objects if issubclass(type(o), nn.Module)]
    inner = {id(child) for module in modules for child in module.children()}
    roots = [m for m in modules if id(m) not in inner]
    owned = {id(root): {id(p) for p in root.parameters()} for root in roots}
    found: dict[int, tuple[Any, list[Any]]] = {}
    for optimizer in optimizers:
        trained = {id(p): p for group in optimizer.param_groups for p in group["params"]}
        parts: list[Any] = []
        while roots:
            # the smallest of those that own the most: a metric or a wrapper beside the model owns the same
            best = max(roots, key=lambda r: (len(trained.keys() & owned[id(r)]), -len(owned[id(r)])))
            if not trained.keys() & owned[id(best)]:
                break
            parts.append(best)
            trained = {key: p for key, p in trained.items() if key not in owned[id(best)]}
        owner = parts[0] if len(parts) == 1 and not trained else _joined(parts, list(trained.values()), names)
        found.setdefault(id(owner), (owner, []))[1].append(optimizer)
    return list(found.values())


def called(model: nn.Module) -> str:
    """A model that no running function has a variable for."""
    if isinstance(model, Parts):
        return " and ".join(name for name, _ in model.named_children()) or "the parameters"
    return type(model).__name__


def _joined(modules: list[Any], loose: list[Tensor], names: dict[int, str]) -> Parts:
    order = {key: place for place, key in enumerate(names)}
    modules = sorted(modules, key=lambda module: order.get(id(module), len(order)))
    called: dict[str, Any] = {}
    for one in (*modules, *loose):
        stray = modules and isinstance(one, Tensor)
        name = names.get(id(one), STRAY if stray else type(one).__name__.lower())
        called[name if name not in called else f"{name} {len(called)}"] = one
    return Parts(
        {name: one for name, one in called.items() if isinstance(one, nn.Module)},
        {name: one for name, one in called.items() if isinstance(one, Tensor)},
    )
