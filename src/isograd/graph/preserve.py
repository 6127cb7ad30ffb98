"""Leave the user's model, and every random generator, as they were found."""

from __future__ import annotations

import copy
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree


@contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """Restore buffers (BatchNorm statistics), train/eval mode, `.grad` and random generators, bit by bit.

    Costs one copy of the buffers. Parameters are never written by a measurement. Their `.grad` are taken away
    meanwhile: reversible layers run a backward of their own inside of the backward, and it accumulates.
    """
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(m, dict(m._buffers), set(m._non_persistent_buffers_set)) for m in model.modules()]
    copies = {id(b): b.clone() for _, held, _ in buffers for b in held.values() if isinstance(b, Tensor)}
    drawing = generators()
    grads = [(p, p.grad) for p in model.parameters() if p.is_leaf]
    for p, _ in grads:
        p.grad = None
    try:
        yield
    finally:
        for p, grad in grads:
            p.grad = grad
        for module, training in modes:
            module.training = training
        with torch.no_grad():
            for module, held, passing in buffers:
                module._buffers.clear()
                module._buffers.update(held)
                module._non_persistent_buffers_set = passing
                for buffer in held.values():
                    if buffer is not None and not _same_bits(buffer, copies[id(buffer)]):
                        buffer.copy_(copies[id(buffer)])
        for restore, state in drawing:
            restore(state)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a, b)


def generators() -> list[tuple[Callable[[Any], object], Any]]:
    """What sets each random generator that a forward may draw from, and its state."""
    states: list[tuple[Callable[[Any], object], Any]] = [
        (torch.set_rng_state, torch.get_rng_state()),
        (random.setstate, random.getstate()),
    ]
    device: Any = torch.get_device_module()  # of the accelerator
    if device is not torch.cpu and getattr(device, "is_initialized", lambda: True)():
        if hasattr(device, "get_rng_state_all"):
            states.append((device.set_rng_state_all, device.get_rng_state_all()))
        else:  # there is but one
            states.append((device.set_rng_state, device.get_rng_state()))
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        states.append((numpy.random.set_state, numpy.random.get_state()))
    return states


def drawn() -> list[Tensor]:
    """The states of torch's generators: what has drawn from one has changed it."""
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else ())]


def copied(model: nn.Module) -> nn.Module:
    """A deep copy; results of the last forward that the model keeps are copied as numbers.

    torch refuses to copy a tensor that has a graph: features kept for a second loss, attention maps kept for a
    picture, and the weight that the old `weight_norm` makes in each forward. What Python refuses to copy and holds
    no tensor (a lock, a logger, a file) is shared with the original.
    """
    kept = (
        t for module in model.modules() for t in pytree.tree_leaves(vars(module)) if isinstance(t, Tensor)
    )
    done: dict[int, Any] = {id(t): t.detach().clone() for t in kept if not t.is_leaf}
    try:
        return copy.deepcopy(model, dict(done))
    except Exception:
        tried = dict(done)
        shared = {id(value): value for module in model.modules() for value in _uncopied(module, tried)}
        if not shared:
            raise
        return copy.deepcopy(model, done | shared)


def _uncopied(module: nn.Module, tried: dict[int, Any]) -> Iterator[Any]:
    """Values among the attributes of a module that cannot be copied and hold no part of a model."""
    for name, value in vars(module).items():
        if name in vars(nn.Module()) or any(
            isinstance(leaf, Tensor | nn.Module) for leaf in pytree.tree_leaves(value)
        ):
            continue
        try:
            copy.deepcopy(value, tried)
        except Exception:
            yield value
