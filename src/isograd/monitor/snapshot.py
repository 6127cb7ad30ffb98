"""Weights, buffers and optimizer state of one moment, to which a training can go back in place."""

from __future__ import annotations

from collections.abc import Collection
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from isograd.monitor.monitor import Monitor
from isograd.monitor.sharding import PLAIN, local

GIVEN = ("params", "lr")
"""Of an optimizer's group: what is given to it, and the rate, which is the user's or a schedule's."""
PLAIN_STATE = (bool, int, float, str, type(None), Tensor)


class Snapshot:
    """Weights, buffers and optimizer state of one moment, in host memory."""

    def __init__(self, step: int, monitor: Monitor, losses: list[float], norms: list[float]) -> None:
        self.step, self.losses, self.norms = step, list(losses), list(norms)
        model, optimizers = monitor.model, monitor.optimizers
        stepped = [(o, p) for o in optimizers for group in o.param_groups for p in group["params"]]
        self._buffers = [
            (module, name, _copy(buffer))
            for module in model.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]
        held = [*model.parameters(), *(p for _, p in stepped)]
        self._weights = [(t, _copy(t)) for t in {id(t): t for t in held}.values()]
        self._states = [(o, p, _saved(o.state[p]) if p in o.state else None) for o, p in stepped]
        self._groups = [(group, _saved(_own(group))) for o in optimizers for group in o.param_groups]

    def restore(self, own: Collection[str] = ()) -> None:
        """In place. Parameters that came later keep what they have; one that had no optimizer state starts afresh. `own`: names
        of what optimizers keep in their groups, as Prodigy its distance; all else there is a schedule's, which goes on.

        Where it is interrupted, as by Ctrl-C, it is done all the same: half of a state is none.
        """
        try:
            self._restore(own)
        except BaseException:
            self._restore(own)
            raise

    def _restore(self, own: Collection[str]) -> None:
        with torch.no_grad():
            for tensor, saved in self._weights:
                if local(tensor).shape == saved.shape:  # else it is another, of which nothing is known
                    local(tensor).copy_(saved)
            for module, name, saved in self._buffers:
                _put(module, name, saved)
            for optimizer, parameter, saved in self._states:
                state = optimizer.state.get(parameter)
                if saved is None or state is None or state.keys() != saved.keys():
                    optimizer.state.pop(parameter, None)
                    continue
                _write(state, saved)
            for group, saved in self._groups:
                _write(group, {name: value for name, value in saved.items() if name in own})

    def mend(self) -> None:
        """Buffers that are not finite: the forward of a batch that breaks goes into the averages of batch normalisation."""
        with torch.no_grad():
            for module, name, saved in self._buffers:
                buffer = module._buffers.get(name)
                if buffer is not None and not local(buffer).isfinite().all():
                    _put(module, name, saved)


def values(group: dict[str, Any]) -> dict[str, Any]:
    """What is in an optimizer's group, in a form that tells whether it was changed; a tensor is not looked at."""
    return {
        name: (id(value), value._version) if isinstance(value, Tensor) else value
        for name, value in _own(group).items()
    }


def _own(group: dict[str, Any]) -> dict[str, Any]:
    """What may be its state: numbers, words and tensors."""
    return {
        name: value for name, value in group.items() if isinstance(value, PLAIN_STATE) and name not in GIVEN
    }


def _write(held: dict[str, Any], saved: dict[str, Any]) -> None:
    for name, value in saved.items():
        if isinstance(value, Tensor) and isinstance(held.get(name), Tensor):
            local(held[name]).copy_(value)
        else:
            held[name] = deepcopy(value)


def _put(module: nn.Module, name: str, saved: Tensor) -> None:
    """In place, unless there is nothing to write (one that is expanded cannot be written to) or it has grown, as a queue.
    By its name: a buffer may be another tensor after each forward."""
    buffer = module._buffers.get(name)
    if buffer is None or torch.equal(local(buffer).cpu(), saved):
        return
    if local(buffer).shape == saved.shape:
        local(buffer).copy_(saved)
    elif type(buffer) in PLAIN:
        module._buffers[name] = saved.to(buffer.device, copy=True)


def _copy(tensor: Tensor) -> Tensor:
    return local(tensor.detach()).to("cpu", copy=True)


def _saved(state: dict[str, Any]) -> dict[str, Any]:
    return {k: _copy(v) if isinstance(v, Tensor) else deepcopy(v) for k, v in state.items()}
