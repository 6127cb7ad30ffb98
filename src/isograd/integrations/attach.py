"""Watch a script that knows nothing of isograd: `isograd watch -- python train.py`.

`site/sitecustomize.py` calls `after_import` in each Python process of the run. Nothing happens until the
first backward or optimizer step; then the optimizers and the models that own their parameters are found among
the living objects, and each model gets a `Monitor`. The value at the root of the backward is the loss.
"""

from __future__ import annotations

import atexit
import functools
import gc
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from isograd.integrations.loss import AccumulatedLoss
from isograd.monitor import Monitor, watch

VARIABLE = "ISOGRAD_WATCH"
"""Environment variable with the `Settings`, as JSON."""
LIVE = (2.0, 5.0, 10.0, 30.0)
"""Seconds between two live lines; the last one repeats."""


class Settings(msgspec.Struct, frozen=True):
    """What `isograd watch` was told."""

    run: str
    every: int = 1
    deep_every: int | None = None
    budget: float = 0.01
    quiet: bool = False


@dataclass
class _Watched:
    monitor: Monitor
    model: nn.Module
    loss: AccumulatedLoss
    name: str
    run: Path


class Attachment:
    """The monitors of this process."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.watched: list[_Watched] = []
        self.known: set[int] = set()
        self.scalers: list[Any] = []
        self.looked = False
        self.inside = threading.local()
        self.broken = False
        self.closed = threading.Event()

    def install(self) -> None:
        """From now on each backward and each step of an optimizer is seen."""
        original = torch.autograd.backward

        @functools.wraps(original)
        def backward(tensors: Any, *args: Any, **kwargs: Any) -> None:
            # a backward inside a backward is reentrant checkpointing
            outermost = not getattr(self.inside, "backward", False)
            if outermost:
                self._safely(self._before_backward)
                self.inside.backward = True
            try:
                original(tensors, *args, **kwargs)
            finally:
                if outermost:
                    self.inside.backward = False
                    self._safely(lambda: self._after_backward(tensors))

        torch.autograd.backward = backward
        register_optimizer_step_pre_hook(
            lambda optimizer, args, kwargs: self._safely(lambda: self._before_step(optimizer))
        )
        atexit.register(self.close)

    def watch(self, model: nn.Module, optimizers: list[Any], name: str) -> Monitor:
        """A monitor of this model, recording into a run of its own."""
        number = len(self.watched)
        run = Path(self.settings.run + (f"-{number + 1}" if number else ""))
        monitor = watch(
            model,
            optimizers or None,
            run=run,
            every=self.settings.every,
            deep_every=self.settings.deep_every,
            budget=self.settings.budget,
        )
        self.watched.append(_Watched(monitor, model, AccumulatedLoss(model), name, run))
        if number == 0 and not self.settings.quiet and _writes():
            threading.Thread(target=self._live, name="isograd-live", daemon=True).start()
        return monitor

    def close(self) -> None:
        """Close the monitors and tell what they found."""
        self.closed.set()
        for watched in self.watched:
            self._safely(watched.monitor.close)
            if not self.settings.quiet and _writes():
                self._safely(functools.partial(_report, watched))

    def _safely(self, action: Callable[[], object]) -> None:
        """The training comes first: an error of ours is one warning, and the end of the watching."""
        if self.broken:
            return
        try:
            action()
        except Exception as error:
            self.broken = True
            warnings.warn(f"isograd stopped watching: {type(error).__name__}: {error}", stacklevel=2)

    def _before_backward(self) -> None:
        if not self.looked:
            self._look()
        for watched in self.watched:
            watched.loss.before_backward()

    def _after_backward(self, tensors: Any) -> None:
        if not isinstance(tensors, torch.Tensor) or tensors.numel() != 1:
            return
        loss = tensors.detach()
        for scaler in self.scalers:
            if scaler._scale is not None:
                loss = loss / scaler._scale
        for watched in self.watched:
            if watched.loss.reached():
                watched.monitor.log(loss=watched.loss.add(loss))

    def _before_step(self, optimizer: Any) -> None:
        if id(optimizer) not in self.known:
            self._look()

    def _look(self) -> None:
        """Find the optimizers, and the models that own their parameters."""
        objects = gc.get_objects()
        optimizers: list[Any] = [
            o for o in objects if issubclass(type(o), torch.optim.Optimizer) and _own_groups(o)
        ]
        new = [o for o in optimizers if id(o) not in self.known]
        self.known.update(map(id, new))
        self.looked = bool(self.known)
        self.scalers = [o for o in objects if issubclass(type(o), torch.amp.GradScaler) and o.is_enabled()]
        variables = _variables()
        order = {model: place for place, model in enumerate(variables)}
        owners = sorted(_owners(new, objects), key=lambda owner: order.get(id(owner[0]), len(order)))
        for model, own in owners:
            known = next((w for w in self.watched if w.model is model), None)
            if known is None:
                self.watch(model, own, variables.get(id(model), type(model).__name__))
            else:
                for optimizer in own:
                    known.monitor.add(optimizer)

    def _live(self) -> None:
        waits = iter(LIVE)
        wait, begin = next(waits), time.monotonic()
        while not self.closed.wait(wait):
            wait = next(waits, LIVE[-1])
            for watched in self.watched:
                reading = watched.monitor.newest()
                if reading is not None:
                    rate = reading.step / max(time.monotonic() - begin, 1e-9)
                    _say(
                        f"{_place(watched, self.watched)}{_line(reading.step, reading.scalars)}  {rate:.3g} steps/s"
                    )


def after_import(module: str) -> None:
    """Attach, once `torch` or `keras` has been imported in a watched process."""
    settings = msgspec.json.decode(os.environ[VARIABLE], type=Settings)
    global _attachment
    if _attachment is None:
        _attachment = Attachment(settings)
        _attachment.install()
    if module == "keras":
        _watch_keras(_attachment)


_attachment: Attachment | None = None
"""One a process: it stands for the process's torch, which is one too."""


def _watch_keras(attachment: Attachment) -> None:
    """Keras optimizers are not torch's: its own callback is added to each `fit`."""
    import keras  # pyright: ignore[reportMissingTypeStubs]

    if keras.backend.backend() != "torch":
        return
    from isograd.integrations.keras import IsogradCallback

    trained: Any = keras.Model
    original = trained.fit

    @functools.wraps(original)
    def fit(model: Any, *args: Any, **kwargs: Any) -> Any:
        def opened() -> Monitor:
            return attachment.watch(model, [], model.name)

        given = kwargs.get("callbacks") or []
        if not isinstance(given, keras.callbacks.CallbackList):
            kwargs["callbacks"] = [
                *(given if isinstance(given, Iterable) else [given]),
                IsogradCallback(opened=opened),
            ]
        return original(model, *args, **kwargs)

    trained.fit = fit


def _own_groups(optimizer: Any) -> bool:
    """False for wrappers (Accelerate's) that show the groups of the optimizer inside them."""
    return "param_groups" in vars(optimizer)


def _variables() -> dict[int, str]:
    """Names of the modules that the running functions hold, in the order of their variables."""
    found: dict[int, str] = {}
    frame = sys._getframe(1)
    while frame is not None:
        for name, value in list(frame.f_locals.items()):
            if issubclass(type(value), nn.Module):
                found.setdefault(id(value), name)
        frame = frame.f_back
    return found


def _owners(optimizers: list[Any], objects: list[Any]) -> list[tuple[Any, list[Any]]]:
    """The outermost module that owns each optimizer's parameters, with its optimizers."""
    modules = [o for o in objects if issubclass(type(o), nn.Module)]
    inner = {id(child) for module in modules for child in module.children()}
    roots = [m for m in modules if id(m) not in inner]
    owned = {id(root): {id(p) for p in root.parameters()} for root in roots}
    found: dict[int, tuple[Any, list[Any]]] = {}
    for optimizer in optimizers:
        trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
        # the smallest of those that own the most: a metric or a wrapper beside the model owns the same
        best = max(roots, key=lambda r: (len(trained & owned[id(r)]), -len(owned[id(r)])), default=None)
        if best is None or not trained & owned[id(best)]:
            names = (p for group in optimizer.param_groups for p in group["params"])
            best = nn.ParameterList(p for p in names if isinstance(p, torch.nn.Parameter))
        found.setdefault(id(best), (best, []))[1].append(optimizer)
    return list(found.values())


def _report(watched: _Watched) -> None:
    reading = watched.monitor.newest()
    if reading is None:
        _say(f"{watched.name} was found, but no step of its optimizer was seen")
        return
    print(watched.monitor.diagnosis(), file=sys.stderr)
    _say(f"{reading.step + 1} steps of {watched.name} recorded: isograd report {watched.run}")


def _line(step: int, scalars: dict[str, float]) -> str:
    parts = [f"step {step}"]
    for name, words in (("loss", "loss"), ("grad_norm", "gradient norm")):
        if name in scalars:
            parts.append(f"{words} {scalars[name]:.4g}")
    return "  ".join(parts)


def _place(watched: _Watched, all_of_them: list[_Watched]) -> str:
    return f"{watched.name}  " if len(all_of_them) > 1 else ""


def _writes() -> bool:
    """One process of a distributed run speaks."""
    return os.environ.get("RANK", "0") == "0"


def _say(words: str) -> None:
    print(f"isograd: {words}", file=sys.stderr, flush=True)
