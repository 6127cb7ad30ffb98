"""A step that broke is repeated on the side, forward by forward: what made its first NaN or Inf is named, with its line."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch
from torch import distributed, nn
from torch.nn.utils import get_total_norm

from isograd.diagnosis import Finding, Severity
from isograd.monitor.call import Call, Staying
from isograd.monitor.deep import in_parts, repeatable
from isograd.monitor.sharding import local, rank
from isograd.nonfinite import find_nonfinite
from isograd.record.row import Told, encoded
from isograd.symptoms import nonfinite_backward

REPLAYS = 3
"""Steps that are repeated until one of them tells where it broke."""
WAIT = 10.0
"""Seconds that process 0 waits for the others to repeat theirs: a forward and a backward, which all of them begin at once."""
OTHERS = "the optimizer is none of torch's: a step is told of when the weights have changed already"
"""Why a step that breaks is not repeated."""
MOST = 8
"""Forwards that are kept of a step: both of a critic, the parts of a model, the networks of an agent. Each holds a batch."""


_numbers = itertools.count()


class Replay:
    """Keeps the forwards of a step, of the model or of its parts, and names what made a NaN in them.

    Of accumulated micro-batches those are let go that have left finite gradients, and after the first that has not none is
    taken any more: it is the one to repeat.

    Attributes:
        left: steps that may still be repeated.
        refused: why this model cannot be repeated; '' where it can.
        missed: why the last step that broke was not located; '' where it was.
    """

    def __init__(self, model: nn.Module, asked: bool) -> None:
        self._model, self.refused = repeatable(model)
        self.left, self.missed = REPLAYS if asked else 0, ""
        self._board = f"isograd/replay/{next(_numbers) if asked else ''}"
        """Where processes leave what they have found: watched in the same order, they count alike."""
        self._found: tuple[Finding, ...] = ()
        self._handles: list[Any] = []
        self._calls: list[tuple[nn.Module, Call]] = []
        self._depth = 0
        """Modules with a hook that are running: only the outermost is kept."""
        self._broken = False

    def prepare(self) -> None:
        """Another step begins."""
        if self.refused or not self.left:
            self.disarm()
            return
        self._calls, self._depth, self._broken = [], 0, False
        for name, module in () if self._handles else _called(self._model):
            self._handles += [
                module.register_forward_pre_hook(Staying(self._begun(name)), with_kwargs=True, prepend=True),
                module.register_forward_hook(Staying(self._ended), always_call=True),
            ]

    def disarm(self) -> None:
        """Let go of the batches and of the model."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._calls = [], []

    def repeat(self) -> None:
        """The step broke whose backward has ended: tell where."""
        if not self.left:
            return
        found = self._located()
        if not self.refused and distributed.is_available() and distributed.is_initialized():
            found = self._of_all(found)
        self._found = () if found is None else (found,)
        self.left = 0 if found else self.left - 1

    def _of_all(self, found: Finding | None) -> Finding | None:
        """What the first process has found that has found any: process 0 alone writes, and the batch that broke the gradients
        of all may have been another's. Nothing is sent in a step that is well, and none but process 0 waits."""
        from torch.distributed.distributed_c10d import _get_default_store

        store: Any = _get_default_store()
        me, turn = rank(), f"{self._board}/{self.left}"
        if me:
            store.set(f"{turn}/{me}", "" if found is None else encoded(found))
            return found
        end = time.monotonic() + WAIT
        for other in range(1, distributed.get_world_size()) if found is None else ():
            key, left = f"{turn}/{other}", max(end - time.monotonic(), 0.001)
            try:
                store.wait([key], timedelta(seconds=left))
            except RuntimeError:  # it is not watched, or has not broken
                continue
            if text := store.get(key).decode():
                told = Told(0, 0, json.loads(text)).finding()
                self.missed = ""
                return replace(told, message=f"in process {other}: {told.message}")
        return found

    def taken(self) -> tuple[Finding, ...]:
        """What was found in the step that ends."""
        found, self._found = self._found, ()
        return found

    @property
    def unexamined(self) -> str:
        """Why a step that broke, or that might, was not located; '' where it was."""
        return self.refused if self.left and self.refused else self.missed

    def _located(self) -> Finding | None:
        """What made the first value that is not finite in the step whose backward has ended; None: nothing in its forwards."""
        calls = [(module, call) for module, call in self._calls if call.cotangents]
        self.disarm()
        if not calls:
            self.missed = (
                self.refused
                or "a step broke, and no forward of the model or of its parts was seen whose output got a gradient"
            )
            return None
        self.missed = ""
        backward: list[Finding] = []
        for module, call in calls:  # the first forward that breaks
            found = _repeated(module, call)
            if found is not None and found.code == "NF401":
                return found
            backward += [] if found is None else [found]
        if backward:  # the last forward is the first of the backward
            return backward[-1]
        self.missed = (
            "a step broke, and nothing in its last forwards here: it was one before them, or another process"
            if all(call.finite for _, call in calls)
            else "a step broke, and did not when it was repeated: its forward takes more than batch, weights and random states"
        )
        return None

    def _begun(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._depth += 1
            if self._depth > 1 or not torch.is_grad_enabled():  # a part of what is kept, or a validation pass
                return
            self._let_go()
            if not self._broken:
                self._calls = [*self._calls[1 - MOST :], (module, Call(module, args, kwargs, name))]

        return hook

    def _ended(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._depth -= 1
        if self._depth == 0 and torch.is_grad_enabled() and not self._broken and self._calls:
            self._calls[-1][1].returned(output)

    def _let_go(self) -> None:
        """Of forwards whose backward has been, if it was well."""
        if not any(call.cotangents for _, call in self._calls):
            return
        gradients = [local(p.grad) for p in self._model.parameters() if p.grad is not None]
        if bool(get_total_norm(gradients).isfinite()):
            self._calls = [(module, call) for module, call in self._calls if not call.cotangents]
        else:
            self._broken = True


def _called(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The model and, as a trainer or a script may call them one by one, its parts: those that can be called."""
    if not in_parts(model):
        yield "", model
    waiting = list(model.named_children())
    while waiting:
        name, part = waiting.pop(0)
        if in_parts(part):  # a list or dict of modules
            waiting += [(f"{name}.{key}", child) for key, child in part.named_children()]
            continue
        module, refused = repeatable(part)
        if not refused:
            yield name, module


def _repeated(module: nn.Module, call: Call) -> Finding | None:
    """What breaks in one forward and its backward; that the gradient which came to it is not finite, if nothing does."""
    loss, broken = call.loss()
    try:
        with torch.enable_grad():
            found = find_nonfinite(module, loss)
    except (TypeError, ValueError):  # without parameters, as a loss
        return None
    if found is None:
        what = call.name or "the model"
        return _by_loss(what) if broken and call.finite else None
    if not call.name:
        return found
    sites = tuple(f"{call.name}.{site}" for site in found.sites)
    return replace(found, message=f"in {call.name}: {found.message}", sites=sites)


def _by_loss(what: str) -> Finding:
    return Finding(
        nonfinite_backward.CODE,
        nonfinite_backward.NAME,
        Severity.ERROR,
        f"the output of {what} is finite, and the gradient that the loss sends back to it is not",
        cause="the loss function, its targets, or what the script does between the model and it",
        evidence={"operation": "", "source": "", "phase": "loss"},
        remedies=("safe-loss", "safe-derivative"),
    )
