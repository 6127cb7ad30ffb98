"""How a model is changed: the few operations that edits need beside those of torch.

Code that a prescription prints contains these functions in full, so that it runs where isograd is not
installed: everything here depends on torch and on other names of this file only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def drawing(model: nn.Module, seed: int) -> Iterator[None]:
    """What is drawn at random inside is always the same, and the user's generators go on as if nothing was."""
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.is_cuda})
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


def put(model: nn.Module, place: str, new: nn.Module) -> nn.Module:
    """`new` in the place of the module there, wherever it is registered, in its mode, device and number format.

    `new` may hold the old module, which is not changed. Returns the model; at the root, `new`.
    """
    old = model.get_submodule(place)
    kept = {id(part) for part in (*old.modules(), *old.parameters(), *old.buffers())}
    like = next(old.parameters(), next(model.parameters(), None))
    for module in new.modules():
        if id(module) not in kept:
            module.training = old.training
    for tensor in (*new.parameters(), *new.buffers()):
        if id(tensor) not in kept and like is not None:
            tensor.data = tensor.data.to(
                like.device, like.dtype if tensor.is_floating_point() else tensor.dtype
            )
    if not place:
        return new
    for name in [name for name, module in model.named_modules(remove_duplicate=False) if module is old]:
        model.set_submodule(name, new)
    return model


def rebind(
    optimizer: torch.optim.Optimizer,
    old: Mapping[str, Tensor],
    model: nn.Module,
    renamed: Mapping[str, str],
    refilled: set[str],
) -> None:
    """Let an optimizer train `model` in place of the model whose parameters were `old`.

    Each parameter takes the group of the one it comes from, and its state unless it was refilled; parameters
    that are new go to the last group, those that are gone are dropped.
    """
    new = dict(model.named_parameters())
    heirs = {id(p): (name, new.pop(renamed.get(name, name), None)) for name, p in old.items()}
    for group in optimizer.param_groups:
        parameters: list[Tensor] = []
        for p in group["params"]:
            name, heir = heirs.get(id(p), ("", p))  # not of this model: it stays
            state = optimizer.state.pop(p, None)
            if heir is not None:
                parameters.append(heir)
                if state and name not in refilled and heir.shape == p.shape:
                    optimizer.state[heir] = state
        group["params"] = parameters
    optimizer.param_groups[-1]["params"].extend(p for p in new.values() if p.requires_grad)
