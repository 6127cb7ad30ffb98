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
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import msgspec
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from isograd.integrations.loss import AccumulatedLoss
from isograd.monitor import Monitor, scaling
from isograd.record import Run
from isograd.record.verdict import verdict
from isograd.warning import warn

VARIABLE = "ISOGRAD_WATCH"
"""Environment variable with the `Settings`, as JSON."""
LIVE = (2.0, 5.0, 10.0, 30.0)
"""Seconds between two live lines; the last one repeats."""
MOST = 32
"""Optimizers that are watched: a search or a learner in a loop may make thousands."""
MANY = 10_000
"""Elements of a list or dict in which parameters are looked for: others hold data."""
UNEXAMINED = {
    "loss": "none was seen: it is read where a backward starts, from one number: loss.backward()",
    "activations": "isograd watch --deep-every 1000 looks at every thousandth step from inside",
}
"""What `isograd.watch` says of the line that is missing in a script is said of the command."""
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


@dataclass
class _Watched:
    """A model that was found. The script alone keeps it alive: models of a search go when it lets go of them."""

    monitor: weakref.ref[Monitor]
    model: weakref.ref[nn.Module]
    loss: AccumulatedLoss
    name: str
    path: str
    record: Any
    """What is kept there; None in all processes but one."""
    process: int
    """Which process trains it: one that is forked from it does not."""
    since: int
    """Step of the record at which this process began to train it."""
    again: bool
    """Another optimizer has trained it before in this process: the record knows what was found then."""
    shown: tuple[float, int] | None = None
    """When a line of it was first shown, and the step."""
    told: int = 0
    """Findings that were said as they came."""


class Attachment:
    """The monitors of this process."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.process = os.getpid()
        self.watched: list[_Watched] = []
        self.made: weakref.WeakSet[Any] = weakref.WeakSet()
        """Optimizers that were made and not yet looked at."""
        self.found = self.theirs = 0
        """Optimizers that are watched, and those that the script watches itself."""
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
            outermost = not getattr(self.inside, "backward", False)
            if outermost:
                self._safely(self._before_backward)
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
        self.watched.append(
            _Watched(
                weakref.ref(monitor),
                weakref.ref(model),
                loss,
                name,
                path,
                record,
                os.getpid(),
                began if before is None else before.since,
                before is not None,
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
        for watched in self.watched:
            if watched.process != os.getpid():
                continue
            monitor = watched.monitor()
            if monitor is not None:
                self._safely(monitor.close)
            if not self.settings.quiet and watched.record is not None:
                self._safely(functools.partial(_report, watched, self.settings.deep_every is not None))
        if self.theirs and not self.watched and not self.settings.quiet and os.getpid() == self.process:
            _say("the script watches its own training: see the record that it keeps, if any")

    def _safely(self, action: Callable[[], object]) -> None:
        """The training comes first: an error of ours is one warning, and the end of the watching."""
        if self.broken:
            return
        try:
            action()
        except Exception as error:
            self.broken = True
            warn(f"isograd stopped watching: {type(error).__name__}: {error}")

    def _before_backward(self) -> None:
        if self.made:
            self._look()
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
            _say(f"the script has made more than {MOST} optimizers: the later ones are not watched")
            return
        if self.watched:
            gc.collect()  # a watched optimizer and its monitor refer to each other
        names, objects = _names(), gc.get_objects()
        order = {key: place for place, key in enumerate(names)}
        owners = sorted(_owners(mine, objects, names), key=lambda owner: order.get(id(owner[0]), len(order)))
        for model, own in owners:
            known = self._known(model)
            monitor = None if known is None else known.monitor()
            if monitor is None:
                self.watch(model, own, names.get(id(model)) or _called(model))
            else:
                for optimizer in own:
                    monitor.add(optimizer)

    def _known(self, model: nn.Module) -> _Watched | None:
        return next((watched for watched in self.watched if watched.model() is model), None)

    def _live(self) -> None:
        waits = iter(LIVE)
        wait = next(waits)
        while not self.closed.wait(wait):
            wait = next(waits, LIVE[-1])
            several = len(self.watched) > 1
            for watched in list(self.watched):
                monitor = watched.monitor()
                reading = None if monitor is None else monitor.newest()
                name = f"{watched.name}  " if several else ""
                if reading is not None:
                    _say(f"{name}{_line(reading.step, reading.scalars)}{_rate(watched, reading.step)}")
                found = [] if monitor is None else monitor.found()[watched.told :]
                watched.told += len(found)
                for step, finding in found:
                    _say(
                        f"{name}step {step}  {finding.severity.name.lower()} {finding.code}: {finding.message}"
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


def has_told() -> bool:
    """Something was found in this process, and said at its end."""
    return _attachment is not None and bool(_attachment.watched or _attachment.theirs)


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


def _names() -> dict[int, str]:
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


def _owners(optimizers: list[Any], objects: list[Any], names: dict[int, str]) -> list[tuple[Any, list[Any]]]:
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


def _called(model: nn.Module) -> str:
    """A model that no running function has a variable for."""
    if isinstance(model, Parts):
        return " and ".join(name for name, _ in model.named_children()) or "the parameters"
    return type(model).__name__


def _joined(modules: list[Any], loose: list[Tensor], names: dict[int, str]) -> Parts:
    order = {key: place for place, key in enumerate(names)}
    modules = sorted(modules, key=lambda module: order.get(id(module), len(order)))
    called: dict[str, Any] = {}
    for one in (*modules, *loose):
        name = names.get(id(one), type(one).__name__.lower())
        called[name if name not in called else f"{name} {len(called)}"] = one
    return Parts(
        {name: one for name, one in called.items() if isinstance(one, nn.Module)},
        {name: one for name, one in called.items() if isinstance(one, Tensor)},
    )


def _report(watched: _Watched, deep: bool) -> None:
    record, monitor = watched.record, watched.monitor()
    if monitor is not None:
        newest = monitor.newest()
        steps, diagnosis = 0 if newest is None else newest.step + 1, monitor.diagnosis()
        if watched.again and record.recording:
            with Run.open(record.path) as run:
                whole = verdict(run, watched.since)
            known = {finding.code for finding in whole.findings}
            inside = (finding for finding in diagnosis.findings if finding.code not in known)
            healthy = {code: words for code, words in diagnosis.healthy.items() if code not in known}
            diagnosis = replace(diagnosis, findings=(*whole.findings, *inside), healthy=healthy)
        asked = {name: words for name, words in UNEXAMINED.items() if name in diagnosis.unexamined}
        if deep:  # then it says why not
            asked.pop("activations", None)
        diagnosis = replace(diagnosis, unexamined=diagnosis.unexamined | asked)
    elif record.recording:  # the script let go of the model
        with Run.open(record.path) as run:
            steps, diagnosis = run.last + 1, verdict(run)
    else:
        return
    if not steps:
        why = "" if monitor is None else diagnosis.unexamined.get("training", "")
        _say(f"{watched.name} was found, but {why or 'no step of its optimizer was seen'}")
        return
    print(diagnosis, file=sys.stderr)
    kept = f"recorded: isograd report {record.path}" if record.recording else "watched, and not recorded"
    if record.recording and record.missed:
        kept = f"watched, the last {record.missed} of them not recorded: isograd report {record.path}"
    _say(f"{steps} steps of {watched.name} {kept}")


def _rate(watched: _Watched, step: int) -> str:
    now = time.monotonic()
    if watched.shown is None:
        watched.shown = now, step
        return ""
    since, first = watched.shown
    return f"  {(step - first) / (now - since):.3g} steps/s"


def _line(step: int, scalars: dict[str, float]) -> str:
    parts = [f"step {step}"]
    for name, words in (("loss", "loss"), ("grad_norm", "gradient norm")):
        if name in scalars:
            parts.append(f"{words} {scalars[name]:.4g}")
    return "  ".join(parts)


def _say(words: str) -> None:
    print(f"isograd: {words}", file=sys.stderr, flush=True)
