"""Watch a script that knows nothing of isograd: `isograd watch -- python train.py`.

`site/sitecustomize.py` calls `after_import` in each Python process of the run. Optimizers are noticed as they
are made; at the first backward or step after that, the models that own their parameters are found among the
living objects, and each model gets a `Monitor`. The value at the root of the backward is the loss.
"""

from __future__ import annotations

import atexit
import functools
import gc
import math
import os
import threading
import weakref
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

import msgspec
import torch
from torch import nn
from torch.autograd.graph import Node
from torch.optim.optimizer import register_optimizer_step_pre_hook

from isograd.graph.backbone import Graph
from isograd.graph.strangers import strangers, told
from isograd.integrations.loss import AccumulatedLoss
from isograd.integrations.owners import called, names_in_use, owners
from isograd.integrations.watched import Watched, say
from isograd.monitor import Monitor, scaling
from isograd.record import Run
from isograd.warning import warn

VARIABLE = "ISOGRAD_WATCH"
"""Environment variable with the `Settings`, as JSON."""
LIVE = (2.0, 5.0, 10.0, 30.0)
"""Seconds between two live lines; the last one repeats."""
MOST = 32
"""Optimizers that are watched: a search or a learner in a loop may make thousands."""
LASTED = 10
"""Steps of an optimizer that is followed by another over the same model: then to look for it has cost little."""
FULL = 2
"""Trainings whose diagnosis is printed in full, such as a generator and its critic; of the many of a search, what was found."""
UNSCALED = "_isograd_unscaled"
"""Where a loss that a scaler has multiplied keeps what it was."""


class Settings(msgspec.Struct, frozen=True):
    """What `isograd watch` was told."""

    run: str
    every: int = 1
    deep_every: int | None = None
    replay: bool = False
    budget: float = 0.01
    quiet: bool = False
    pid: int = 0
    """The process that `isograd watch` became; what that starts has others."""
    since: float = 0.0
    """When it was started, in seconds since the epoch: what has begun to record since then is one of its trainings."""


class Attachment:
    """The monitors of this process."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.process = os.getpid()
        self.watched: list[Watched] = []
        self.made: weakref.WeakSet[Any] = weakref.WeakSet()
        """Optimizers that were made and not yet looked at."""
        self.found = self.theirs = 0
        """Optimizers that are watched, and those that the script watches itself."""
        self.tried = False
        """An optimizer was made, or a backward begun."""
        self.inside = threading.local()
        self.broken = False
        self.closed = threading.Event()

    def install(self) -> None:
        """From now on each optimizer that is made, each backward and each step is seen."""
        make, scale, accumulate, leave = (
            torch.optim.Optimizer.__init__,
            torch.amp.GradScaler.scale,
            torch.autograd.backward,
            os._exit,
        )

        @functools.wraps(make)
        def init(optimizer: Any, *args: Any, **kwargs: Any) -> None:
            make(optimizer, *args, **kwargs)
            if not torch.compiler.is_compiling():
                self.made.add(optimizer)
                self.tried = True

        @functools.wraps(scale)
        def scaled(scaler: Any, outputs: Any) -> Any:
            result = scale(scaler, outputs)
            if isinstance(result, torch.Tensor) and result is not outputs:
                setattr(result, UNSCALED, outputs.detach())
            return result

        @functools.wraps(accumulate)
        def backward(tensors: Any, *args: Any, **kwargs: Any) -> None:
            # nothing of ours may go into a step that is compiled as a whole
            if torch.compiler.is_compiling():
                return accumulate(tensors, *args, **kwargs)
            # a backward inside a backward is reentrant checkpointing
            self.tried = True
            outermost = not getattr(self.inside, "backward", False)
            if outermost:
                self._safely(lambda: self._before_backward(tensors))
                self.inside.backward = True
            try:
                accumulate(tensors, *args, **kwargs)
            finally:
                if outermost:
                    self.inside.backward = False
                    self._safely(lambda: self._after_backward(tensors))

        @functools.wraps(leave)
        def left(
            status: int,
        ) -> NoReturn:  # so ends a process of a pool, and a script that does not wait for others
            self._safely(self.close)
            leave(status)

        os._exit = left
        torch.optim.Optimizer.__init__ = init  # pyright: ignore[reportAttributeAccessIssue]
        torch.amp.GradScaler.scale = scaled  # pyright: ignore[reportAttributeAccessIssue]
        torch.autograd.backward = backward
        register_optimizer_step_pre_hook(lambda optimizer, args, kwargs: self._before_step())
        atexit.register(self.close)

    def watch(self, model: nn.Module, optimizers: list[Any], name: str) -> Monitor:
        """A monitor of this model, recording into a run of its own; one that was watched before goes on there."""
        before = self._known(model)
        number = len(self.watched) + 1
        path, since = self.settings.run, self.settings.since
        if before is not None:
            path, since = before.path, math.inf
        elif int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0:  # torchrun has started it again
            path, since = path + (f"-{number}" if number > 1 else ""), math.inf
        monitor = Monitor(
            model,
            optimizers,
            run=lambda detectors: Run.create(path, detectors=detectors, since=since),
            every=self.settings.every,
            deep_every=self.settings.deep_every,
            replay=self.settings.replay,
            budget=self.settings.budget,
            known=before is not None,
        )
        if before is not None:
            self.watched.remove(before)
        loss, record = AccumulatedLoss(monitor, model), monitor.run
        path, began = str(getattr(record, "path", path)), record.last + 1 if isinstance(record, Run) else 0
        if before is not None and began - before.began >= LASTED:
            self.found -= len(optimizers)  # of these there may be many: one for each epoch or task
        self.watched.append(
            Watched(
                weakref.ref(monitor),
                weakref.ref(model),
                loss,
                name,
                path,
                record,
                os.getpid(),
                began if before is None else before.since,
                before is not None,
                began,
            )
        )
        if number == 1 and not self.settings.quiet and monitor.run is not None:
            threading.Thread(target=self._live, name="isograd-live", daemon=True).start()
        return monitor

    def close(self) -> None:
        """Close the monitors of this process and tell what they found."""
        if self.closed.is_set():
            return
        self.closed.set()
        mine = [watched for watched in self.watched if watched.process == os.getpid()]
        brief = len(mine) > FULL
        for watched in mine:
            monitor = watched.monitor()
            if monitor is not None:
                self._safely(monitor.close)
            if not self.settings.quiet and watched.record is not None:
                deep = self.settings.deep_every is not None
                self._safely(functools.partial(watched.report, deep, brief))
        if brief and not self.settings.quiet:
            say("what was examined in each of them: isograd check RUN")
        if self.theirs and not self.watched and not self.settings.quiet and os.getpid() == self.process:
            say("the script watches its own training: see the record that it keeps, if any")

    def _safely(self, action: Callable[[], object]) -> None:
        """The training comes first: an error of ours is one warning, and the end of the watching."""
        if self.broken:
            return
        try:
            action()
        except Exception as error:
            self.broken = True
            warn(f"isograd stopped watching: {type(error).__name__}: {error}")

    def _before_backward(self, tensors: Any) -> None:
        if self.made:
            self._look()
            if isinstance(tensors, torch.Tensor) and tensors.grad_fn is not None:
                self._strangers(tensors.grad_fn)
        for watched in self.watched:
            watched.loss.before_backward()

    def _after_backward(self, tensors: Any) -> None:
        if not isinstance(tensors, torch.Tensor) or tensors.numel() != 1:
            return
        loss = getattr(tensors, UNSCALED, tensors)
        for watched in self.watched:
            if watched.loss.reached():
                watched.loss.add(loss)

    def _before_step(self) -> None:
        if self.made and not torch.compiler.is_compiling():
            self._safely(self._look)

    def _look(self) -> None:
        """Find the models that own the parameters of the optimizers that were made."""
        made = list(self.made)
        self.made.clear()
        mine = [o for o in made if scaling.watched(o) is None]
        self.theirs += len(made) - len(mine)
        if not mine or self.found > MOST:
            return
        self.found += len(mine)
        if self.found > MOST:
            anew = any(watched.again for watched in self.watched)
            hint = (
                ". One that is made anew every few steps forgets its momentum: make it before the loop" * anew
            )
            say(f"the script has made more than {MOST} optimizers: the later ones are not watched{hint}")
            return
        if self.watched:
            gc.collect()  # a watched optimizer and its monitor refer to each other
        names, objects = names_in_use(), gc.get_objects()
        order = {key: place for place, key in enumerate(names)}
        found = sorted(owners(mine, objects, names), key=lambda owner: order.get(id(owner[0]), len(order)))
        for model, own in found:
            known = self._known(model)
            monitor = None if known is None else known.monitor()
            if monitor is None:
                self.watch(model, own, names.get(id(model)) or called(model))
            else:
                for optimizer in own:
                    monitor.add(optimizer)

    def _strangers(self, loss: Node) -> None:
        """Of each model that this loss is of: what else it depends on that no optimizer trains."""
        nodes = Graph(loss).order
        reached = {id(getattr(node, "variable", None)) for node in nodes}
        optimizers = [o for o in gc.get_objects() if issubclass(type(o), torch.optim.Optimizer)]
        held = {id(p) for o in optimizers for group in o.param_groups for p in group["params"]}
        mine = [(watched, model) for watched in self.watched if (model := watched.model()) is not None]
        held |= {id(p) for _, model in mine for p in model.parameters()}
        if found := strangers(nodes, held):
            for watched, model in mine:
                if any(id(p) in reached for p in model.parameters()):
                    watched.strangers = told(found, "in no module of the model and in no optimizer")

    def _known(self, model: nn.Module) -> Watched | None:
        return next((watched for watched in self.watched if watched.model() is model), None)

    def _live(self) -> None:
        waits = iter(LIVE)
        wait = next(waits)
        while not self.closed.wait(wait):
            wait = next(waits, LIVE[-1])
            several = len(self.watched) > 1
            for watched in list(self.watched):
                _say_where(watched, f"{watched.name}  " if several else "")


def _say_where(watched: Watched, name: str) -> None:
    """Where a training is, and what is new; nothing of it is held on to until the next time."""
    monitor = watched.monitor()
    reading = None if monitor is None else monitor.newest()
    if reading is not None:
        say(f"{name}{watched.line(reading)}")
    found = [] if monitor is None else monitor.found()[watched.told :]
    watched.told += len(found)
    for step, finding in found:
        say(f"{name}step {step}  {finding.severity.name.lower()} {finding.code}: {finding.message}")


def after_import(module: str) -> None:
    """Attach, once `torch` or `keras` has been imported in a watched process."""
    settings = msgspec.json.decode(os.environ[VARIABLE], type=Settings)
    global _attachment
    if _attachment is None:
        _attachment = Attachment(settings)
        _attachment.install()
    if module == "keras":
        _watch_keras(_attachment)


def has_told() -> bool:
    """Something was found in this process, and said at its end."""
    return _attachment is not None and bool(_attachment.watched or _attachment.theirs)


def has_tried() -> bool:
    """An optimizer was made in this process, or a backward begun."""
    return _attachment is not None and _attachment.tried


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
