"""What `GradScaler` does to watched gradients: it unscales them in place, and leaves out steps that overflow.

An overflow never calls `optimizer.step`: without a word from the scaler exactly the step that exploded
would be missing. So two of its methods tell of it, for as long as an optimizer is watched.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer


class Scaled(Protocol):
    """A watched optimizer."""

    def unscaling(self) -> None: ...
    def unscaled(self, scale: Tensor | None) -> None: ...
    def scaler_stepping(self) -> None: ...
    def scaler_stepped(self) -> None: ...


_watched: weakref.WeakValueDictionary[int, Scaled] = weakref.WeakValueDictionary()
_originals: dict[str, Callable[..., Any]] = {}


def watched(optimizer: Optimizer) -> Scaled | None:
    """The one that watches this optimizer."""
    return _watched.get(id(optimizer))


def everyone() -> list[Scaled]:
    """All that watch an optimizer."""
    return list(_watched.values())


def add(optimizer: Optimizer, watcher: Scaled) -> None:
    """Tell `watcher` what scalers do with this optimizer."""
    if not _originals:
        _originals.update(unscale_=GradScaler.unscale_, step=GradScaler.step)
        GradScaler.unscale_ = _unscale(GradScaler.unscale_)
        GradScaler.step = _step(GradScaler.step)
    _watched[id(optimizer)] = watcher


def remove(optimizer: Optimizer) -> None:
    """Tell no longer; the last one out leaves the scaler as it was."""
    _watched.pop(id(optimizer), None)
    if not _watched and _originals:
        GradScaler.unscale_, GradScaler.step = _originals["unscale_"], _originals["step"]
        _originals.clear()


def _unscale(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def unscale_(self: GradScaler, optimizer: Optimizer) -> Any:
        watcher = _find(optimizer) if self.is_enabled() else None
        if watcher is not None:
            watcher.unscaling()
        result = original(self, optimizer)
        if watcher is not None:
            watcher.unscaled(self._scale)
        return result

    return unscale_


def _step(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def step(self: GradScaler, optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
        watcher = _find(optimizer) if self.is_enabled() else None
        if watcher is None:
            return original(self, optimizer, *args, **kwargs)
        watcher.scaler_stepping()
        result = original(self, optimizer, *args, **kwargs)
        watcher.scaler_stepped()
        return result

    return step


def _find(optimizer: Any) -> Scaled | None:
    while optimizer is not None:
        if id(optimizer) in _watched:
            return _watched[id(optimizer)]
        optimizer = getattr(optimizer, "optimizer", None)
    return None
