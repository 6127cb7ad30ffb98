"""One change at one place of a model, as data; how it is made, and how it reads in code."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Literal

import torch
from torch import Tensor, nn

from isograd import surgery

Value = bool | int | float | str | None | tuple[int, ...] | tuple[float, ...] | tuple[str, ...]
Verb = Literal["fill", "alter", "set", "replace", "wrap", "configure"]


ROOTS = {
    "torch": "torch",
    "nn": "torch.nn",
    "surgery": "isograd.surgery",
    "modules": "isograd.modules",
    "recurrences": "isograd.recurrences",
    "calls": "isograd.calls",
}
"""Where the callables of edits live."""


@dataclass(frozen=True, slots=True)
class Edit:
    """One change at one place.

    fill       `of(tensor, **arguments)` on the parameter or buffer at `place`, in place, without gradient;
               `of=".mul_"` is the tensor's own method
    alter      `of(module, **arguments)` on the module at `place`, in place
    set        the attribute at `place` becomes `arguments["value"]`, or the callable that `of` names
    replace    the module at `place` becomes `of(**arguments)`
    wrap       the module at `place` becomes `of(module, **arguments)`, which holds it
    configure  nothing in the model: the training's `place` (clip_grad_norm, lr, …) becomes `arguments["value"]`
    """

    place: str
    """Dotted name as in `named_modules` or `named_parameters`; '' is the model itself."""
    verb: Verb
    of: str = ""
    """Dotted name under one of `ROOTS`: 'nn.init.orthogonal_', 'nn.ReLU', 'modules.Residual'."""
    arguments: Mapping[str, Value] = field(default_factory=dict[str, Value])
    rows: tuple[int, int] | None = None
    """Only these rows of the tensor, from and to: one gate of a bias, the values of a joint projection."""
    before: str = ""
    """What stood there, for the diff: 'Sigmoid()', 'std 0.0722'."""
    source: str = ""
    """`file.py:17` where the user would make the change by hand, if it is not where the module is made."""


def perform(model: nn.Module, edit: Edit) -> nn.Module:
    """Make one edit in place; the model, or what has taken its place at the root."""
    match edit.verb:
        case "fill":
            tensor = _tensor(model, edit.place)
            rows = tensor if edit.rows is None else tensor[slice(*edit.rows)]
            with torch.no_grad():
                if edit.of.startswith("."):
                    getattr(rows, edit.of[1:])(*edit.arguments.values())
                else:
                    named(edit.of)(rows, **edit.arguments)
        case "alter":
            with torch.no_grad():
                named(edit.of)(model.get_submodule(edit.place), **edit.arguments)
        case "set":
            owner, _, name = edit.place.rpartition(".")
            value = named(edit.of) if edit.of else edit.arguments["value"]
            setattr(model.get_submodule(owner), name, value)
        case "replace":
            return surgery.put(model, edit.place, named(edit.of)(**edit.arguments))
        case "wrap":
            return surgery.put(
                model, edit.place, named(edit.of)(model.get_submodule(edit.place), **edit.arguments)
            )
        case "configure":
            pass
    return model


def has(model: nn.Module, place: str, verb: Verb) -> bool:
    """Is there anything at the place of an edit? An attribute may be new to its module."""
    owner, _, leaf = place.rpartition(".")
    try:
        model.get_submodule(owner if verb in ("fill", "set") else place)
    except AttributeError:
        return False
    return verb != "fill" or hasattr(model.get_submodule(owner), leaf)


def _tensor(model: nn.Module, name: str) -> Tensor:
    owner, _, leaf = name.rpartition(".")
    return getattr(model.get_submodule(owner), leaf)


def named(of: str) -> Callable[..., Any]:
    """The callable that a dotted name stands for."""
    root, *path = of.split(".")
    found: Any = import_module(ROOTS[root])
    for name in path:
        found = getattr(found, name)
    return found


def printed(edit: Edit) -> str:
    """What is put there, as in the code: `nn.init.orthogonal_(gain=1.41)`."""
    if edit.verb in ("set", "configure"):
        return edit.of or repr(edit.arguments["value"])
    values = [f"{name}={value!r}" for name, value in edit.arguments.items()]
    if edit.of.startswith("."):
        values = [repr(value) for value in edit.arguments.values()]
    return f"{edit.of.removeprefix('.')}({', '.join(values)})"
